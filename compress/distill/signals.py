"""The teacher's signal, made once and kept: a second epoch, a second student, QAT or a search
never runs the teacher again.

A folder of shards, local or anything fsspec can open (s3://, gs://, hf://). `meta.json` names
schema, teacher, tokenizer, data, scheme, seed and precision, and what made it; a folder whose meta
differs from what is asked is refused. Each shard `NNNNN-<sha256[:16]>.safetensors` holds
ROWS_PER_SHARD sequences, is a pure function of (meta, its number), appears whole and is checked
against its name whenever it is read. Shards are only ever added: making goes on where it stopped,
and several processes make every world-th shard each.

A scheme says how distributions are written down, `encode` and `decode` being pure functions. With p
= softmax(t / T), for each token:

    sampled  every p >= tau exactly ("heads"); the rest, mass r, is drawn by systematic sampling: S
             = ceil(r / tau) points (u + i) r / S, i < S, on the cumulative sum of the rest, one
             uniform u a token; each hit weighs r / S <= tau. E[sum_k w_k f(id_k)] = sum_v p_v f(v)
             for any f, and the weights add up to 1 exactly, so that losses and gradients are
             unbiased, where top-k teaches the student that the tail does not exist (arXiv
             2503.16870, sections 3-4). A threshold spends bytes where they lower the variance:
             certain tokens take one id, flat ones up to 1 / tau. (Ordering the ids by similar head
             rows before drawing was tried: no smaller gradient error.)
             r itself is kept in fp16 beside the heads, and all are scaled to add up to 1 where they
                 are read: a head rounded to 1 would leave no tail, and 1 minus rounded heads is off
                 by up to 2e-4 where r may be as small.
    hidden   final hidden states as int8, one fp16 scale per GROUP; times the teacher's head they
             are all logits

`entropy` of p is kept in fp16 by `sampled`, so that the KL itself, not only its gradient, can be
reported.

Legend: R rows (sequences), L positions, N = R L tokens, V vocabulary, H hidden, C tokens a chunk, M
hits in all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import torch
from accelerate.utils import send_to_device
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load, save
from torch import Tensor

from compress.distill.losses import Dense, Sparse, Target
from compress.distill.schemes import Scheme, Shard, decode, encode
from compress.errors import ResourceError
from compress.keys import SIGNALS, sources_digest, versions_of
from compress.models.checkpoint import best_device, check, load_model, weights_digest
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.empty import empty_model, fill_head
from compress.models.head import Head, head_of, hidden_states
from compress.models.reading import read_in, reading
from compress.models.tokenizer import load_tokenizer, token_count, tokenizer_digest
from compress.store import sha256_json, write_whole
from compress.train import parallel
from compress.train.packed import Packed, Windows

ROWS_PER_SHARD = 16
SHARDS_IN_MEMORY = 64
WINDOW_SHARDS = 16  # whose rows are mixed, where more shards are read than memory holds


def as_target(batch: dict[str, Tensor], head: Head | None) -> Target | None:
    """The teacher in a batch as `losses.py` wants it; `head` is the teacher's, without which hidden
    states say nothing.
    """
    if "entropy" in batch:
        return Sparse(batch["ids"], batch["probs"], batch["entropy"])
    if head is None or "teacher_hidden" not in batch:
        return None
    return Dense(batch["teacher_hidden"], head)


def made_with(folder: str | None = None) -> dict[str, Any]:
    """What a signal's numbers depend on besides its meta: recorded, part of a stage's key, no
    reason to refuse a folder.

    Of the signal in `folder` if there is one, else of one made here and now.
    """
    # What is there says it itself.
    if folder is not None:
        fs, path = fsspec.core.url_to_fs(folder)
        if fs.exists(f"{path}/meta.json"):
            return dict(json.loads(fs.cat_file(f"{path}/meta.json"))["made_with"])

    # What would be made here: the modules that compute it, and what they run on.
    sources = sources_digest(
        "compress.distill.signals:",
        "compress.distill.schemes:",
        "compress.models.head",
        "compress.models.reading:",
        "compress.models.cpu_kernels",
        "compress.models.checkpoint",
    )
    here = {"threads": torch.get_num_threads(), "device": best_device().type}
    return here | {"sources": sources, "versions": versions_of(*SIGNALS)}


class Signals:
    """Signals of one teacher on one packed text. Reading makes what is missing first."""

    def __init__(
        self,
        root: Path | str,
        teacher: Path,
        data: Packed,
        scheme: Scheme,
        *,
        seed: int,
        precision: str,
        log: Callable[[str], None],
        own_folder: bool = False,
        load: str = "plain",
        tokens_of: Path | None = None,
    ) -> None:
        """In a folder below `root` named by the meta; with `own_folder` in `root` itself.
        `tokens_of`: the checkpoint in whose tokens `data` is, where it is not the teacher.
        ValueError when a signal of another meta is there, or as `reading`.
        """
        self.teacher = teacher
        self.tokens_of = tokens_of or teacher
        self.fold = reading(self.tokens_of, teacher)
        self.data = data
        self.scheme = scheme
        self.log = log
        self.load = load

        # All that decides the numbers; a folder of another meta is refused.
        fields = ("threshold", "temperature") if scheme.name == "sampled" else ()
        self.meta: dict[str, Any] = {
            "schema": 3,
            "scheme": scheme.name,
            **{field: getattr(scheme, field) for field in fields},
            "teacher": weights_digest(teacher),
            "teacher_load": load,
            "tokenizer": tokenizer_digest(self.tokens_of),
            "data": data.digest,
            "seed": seed,
            "rows_per_shard": ROWS_PER_SHARD,
            "precision": "fp32" if precision == "fp32" else "bf16",
        }

        # The folder, and what of it is open: shards read, their paths, bytes on their way.
        base = str(root) if own_folder else f"{root}/{sha256_json(self.meta | made_with())[:32]}"
        self.fs, self.folder = fsspec.core.url_to_fs(base)
        self._head: Head | None = None  # of the scheme "hidden", once the teacher was open
        self._shards: dict[int, list[Shard]] = {}
        self._paths: dict[int, str] = {}
        self._fetched: dict[int, Future[bytes]] = {}
        self._reader = ThreadPoolExecutor(1)
        self._open_folder()

    def _open_folder(self) -> None:
        """Write the meta where there is none, else hold what is there against what is asked.
        ValueError when they differ; a line where only what made it does.
        """
        self.fs.makedirs(self.folder, exist_ok=True)
        if not self.fs.exists(f"{self.folder}/meta.json"):
            self._put(
                "meta.json", json.dumps(self.meta | {"made_with": made_with()}, indent=2).encode()
            )
        recorded = json.loads(self.fs.cat_file(f"{self.folder}/meta.json"))

        # Numbers of another meta are no signal of this teacher on this text.
        for key, asked in self.meta.items():
            if recorded.get(key) != asked:
                raise ValueError(
                    f"the teacher signal in {self.folder} was made with another {key}: it has"
                    f" {recorded.get(key)!r}, this run needs {asked!r}; give signal.path an empty"
                    " folder, or change what differs"
                )

        # Who made them, and on what, is said and no reason to refuse (`made_with`).
        recorded_maker = recorded.get("made_with", {})
        differing = [
            name for name, value in made_with().items() if recorded_maker.get(name, value) != value
        ]
        if differing:
            self.log(
                f"the teacher signal in {self.folder} was made with other {', '.join(differing)}"
                " than here; it is used as it is"
            )

    def _put(self, name: str, data: bytes) -> None:
        """A file that appears whole: object stores do that by themselves."""
        if isinstance(self.fs, LocalFileSystem):
            write_whole(Path(self.folder) / name, data)
        else:
            self.fs.pipe_file(f"{self.folder}/{name}", data)

    @property
    def teacher_head(self) -> Head | None:
        """The head that turns kept hidden states into logits; None for `sampled`."""
        if self.scheme.name == "hidden" and self._head is None:
            self._open_head()
        return self._head

    def read(self, rows: list[int]) -> dict[str, Tensor]:
        """The teacher's tensors of these rows, N = len(rows) * L tokens, as `decode` gives them.
        ValueError when a shard is damaged.
        """
        return decode(
            [self._shard(row // ROWS_PER_SHARD)[row % ROWS_PER_SHARD] for row in rows], self.scheme
        )

    def prefetch(self, rows: list[int]) -> None:
        """Start fetching the shards of these rows; only bytes move, so that the thread leaves the
        cores to training.
        """
        numbers = {row // ROWS_PER_SHARD for row in rows}
        for number in numbers - self._shards.keys() - self._fetched.keys():
            if path := self._paths.get(number) or self._present().get(number):
                self._fetched[number] = self._reader.submit(self.fs.cat_file, path)

    def windows(self, rows: int) -> Windows | None:
        """How the first `rows` sequences are to be shuffled, so that each shard is read once an
        epoch; None, in any order, where memory holds all of them.
        """
        shards = -(-min(rows, len(self.data.ids)) // ROWS_PER_SHARD)
        if shards <= SHARDS_IN_MEMORY:
            return None
        return Windows(ROWS_PER_SHARD, WINDOW_SHARDS)

    def make(self, rows: int) -> None:
        """Make this rank's part of what lacks of the first `rows` sequences' shards. ResourceError
        when the disk has no place for them.
        """
        numbers = range(-(-rows // ROWS_PER_SHARD))
        present = self._present()
        missing = [
            n for n in numbers if n not in present and n % parallel.world() == parallel.rank()
        ]

        start = time.monotonic()
        teacher = self._open_teacher() if missing else ()
        for done, number in enumerate(missing, 1):
            size = self._write(number, *teacher)[1]
            if done == 1:
                self._check_room(size * (len(missing) - 1))

            seconds_left = (time.monotonic() - start) / done * (len(missing) - done)
            self.log(
                f"teacher signal {done}/{len(missing)} shards, {size / self._tokens(number):.0f}"
                f" bytes a token, {seconds_left:.0f} s left"
            )

    def _check_room(self, more: int) -> None:
        """ResourceError where a local disk has no place for so many bytes more."""
        if not Path(self.folder).is_dir():
            return
        free = shutil.disk_usage(self.folder).free
        if more > free:
            raise ResourceError(
                f"the teacher signal needs {more / 1e9:.1f} GB more in {self.folder},"
                f" {free / 1e9:.1f} GB are free; set signal.path"
            )

    def refresh(self) -> None:
        """Forget listings of the folder: file systems far away keep them, and other processes have
        written there since.
        """
        self.fs.invalidate_cache(self.folder)

    def bytes_per_token(self) -> float:
        """Bytes of all shards over their tokens."""
        present = self._present()
        return sum(self.fs.size(path) for path in present.values()) / max(
            1, sum(self._tokens(number) for number in present)
        )

    def _tokens(self, number: int) -> int:
        return min(ROWS_PER_SHARD, len(self.data.ids) - number * ROWS_PER_SHARD) * (
            self.data.ids.shape[1] - 1
        )

    def _present(self) -> dict[int, str]:
        paths = self.fs.glob(f"{self.folder}/*.safetensors")
        self._paths = {int(path.rsplit("/", 1)[1].split("-")[0]): path for path in sorted(paths)}
        return self._paths

    def _shard(self, number: int) -> list[Shard]:
        """The rows of a shard: from memory, from the folder, or made now."""
        if number in self._shards:
            return self._shards[number]
        path = (
            self._paths.get(number)
            or self._present().get(number)
            or self._write(number, *self._open_teacher())[0]
        )

        # Its bytes, checked against its name.
        data = (
            self._fetched.pop(number).result()
            if number in self._fetched
            else self.fs.cat_file(path)
        )
        if path.rsplit("/", 1)[1] != _name(number, data):
            raise ValueError(
                f"teacher signal {path} is damaged (its checksum differs from its name); delete"
                " it and run again"
            )

        # The one read first makes room.
        while len(self._shards) >= SHARDS_IN_MEMORY:
            del self._shards[next(iter(self._shards))]

        # Tensors of all rows, one after the other, back to one a row.
        tensors = load(data)
        columns = {
            name: tensors[name].split(tensors[f"{name}.lengths"].tolist())
            for name in tensors
            if f"{name}.lengths" in tensors
        }
        self._shards[number] = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        return self._shards[number]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.meta["precision"] == "fp32" else torch.bfloat16

    def _open_head(self) -> None:
        """The head for `teacher_head`, without the rest of the teacher where its files allow."""
        check(self.teacher)
        alone = self.load == "plain" and self.fold is None
        model = empty_model(self.teacher, self._dtype) if alone else None
        if model is None:
            self._open_teacher()
            return
        fill_head(model, best_device())
        self._head = self._without_padding(head_of(model).detach())

    def _without_padding(self, head: Head) -> Head:
        """Rows behind the tokenizer's ids are padding."""
        return head.first(min(head.ids_count, token_count(load_tokenizer(self.tokens_of))))

    def _open_teacher(self) -> tuple[Any, Head]:
        """The teacher and its head, of which a copy stays where `teacher_head` gives it."""
        model: Any = load_model(self.teacher, self._dtype, self.load)
        use_cpu_kernels(model)
        model.to(best_device())

        head = self._without_padding(read_in(model, self.fold).detach())
        if self.scheme.name == "hidden":
            self._head = replace(head, weight_VH=head.weight_VH.clone())
        return model, head

    def _write(self, number: int, model: Any, head: Head) -> tuple[str, int]:
        """Make one shard; its path and size in bytes."""
        generator = torch.Generator().manual_seed(self.meta["seed"] * 1_000_003 + number)
        first = number * ROWS_PER_SHARD
        last = min((number + 1) * ROWS_PER_SHARD, len(self.data.ids))

        # Each row goes through the teacher by itself.
        encoded: list[Shard] = []
        with torch.inference_mode():
            for row in range(first, last):
                inputs = send_to_device(self.data.inputs([row]), model.device)
                hidden_LH = hidden_states(model, **inputs)
                encoded.append(encode(hidden_LH, head, self.scheme, generator))

        # Each tensor of all rows, one after the other, and the rows' lengths in it.
        lengths = {
            f"{name}.lengths": torch.tensor([len(row[name]) for row in encoded])
            for name in encoded[0]
        }
        joined = {name: torch.cat([row[name] for row in encoded]) for name in encoded[0]}
        data = save(joined | lengths)
        self._put(_name(number, data), data)
        return f"{self.folder}/{_name(number, data)}", len(data)


def _name(number: int, data: bytes) -> str:
    return f"{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
