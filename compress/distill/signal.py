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
    = ceil(r / tau) points
             (u + i) r / S, i < S, on the cumulative sum of the rest, one uniform u a token; each
             hit weighs r / S <= tau. E[sum_k w_k f(id_k)] = sum_v p_v f(v) for any f, and the
             weights add up to 1 exactly, so that losses and gradients are unbiased, where top-k
             teaches the student that the tail does not exist (arXiv 2503.16870, sections 3-4). A
             threshold spends bytes where they lower the variance: certain tokens take one id, flat
             ones up to 1 / tau. (Ordering the ids by similar head rows before drawing was tried: no
             smaller gradient error.)
    topk     the K most probable ids and probabilities; the rest becomes one bucket (biased, for
    comparison)

             r itself is kept in fp16 beside the heads, and all are scaled to add up to 1 where they
             are read: a head rounded to 1 would leave no tail, and 1 minus rounded heads is off by
             up to 2e-4 where r may be as small.
    hidden   final hidden states as int8, one fp16 scale per GROUP; times the teacher's head they
    are all logits full     all logits in fp16 (tests only: 2 V bytes a token)

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
from typing import Any, NamedTuple

import fsspec
import torch
from accelerate.utils import send_to_device
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load, save
from torch import Tensor

from compress.distill.losses import Bucket, Dense, Sparse, Target
from compress.errors import ResourceError
from compress.keys import SIGNALS, sources_digest, versions_of
from compress.models.checkpoint import best_device, load_model, weights_digest
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.head import Head, head_of, hidden_states
from compress.models.tokenizer import load_tokenizer, token_count, tokenizer_digest
from compress.store import sha256_json, write_whole
from compress.train import parallel
from compress.train.packed import Packed

CHUNK = 32  # tokens whose full logits are held at once
BLOCK = 64  # ids summed up together; a hit is looked for in the sums first
GROUP = 64  # int8 hidden states sharing a scale
ROWS_PER_SHARD, SHARDS_IN_MEMORY = 16, 64
Shard = dict[str, Tensor]


class Scheme(NamedTuple):
    """What is kept of each token; `stages/training.py` checks the values."""

    name: str = "sampled"
    threshold: float = 1 / 20  # sampled: tau
    top: int = 64  # topk: K
    temperature: float = 1.0  # sampled and topk: T


@torch.inference_mode()
def encode(hidden_LH: Tensor, head: Head, scheme: Scheme, generator: torch.Generator) -> Shard:
    """What is kept of one sequence: named tensors, on the CPU."""
    if scheme.name == "hidden":
        length, width = hidden_LH.shape
        groups = torch.nn.functional.pad(hidden_LH.float(), (0, -width % GROUP)).view(
            length, -1, GROUP
        )
        scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(6e-8).half()
        codes = (groups / scale.float()).round().clamp(-127, 127).to(torch.int8)
        return {
            "codes": codes.flatten(1)[:, :width].contiguous().cpu(),
            "scales": scale[..., 0].cpu(),
        }
    parts: list[Shard] = []
    for chunk in hidden_LH.split(CHUNK):
        logits_CV = head.logits(chunk)
        if scheme.name != "full" and scheme.temperature != 1.0:
            logits_CV.div_(scheme.temperature)
        if scheme.name == "full":
            parts.append({"logits": logits_CV.half()})
        elif scheme.name == "topk":
            p_CV = logits_CV.softmax(-1)
            p_CK, ids_CK = p_CV.topk(min(scheme.top, logits_CV.shape[1] - 1))
            parts.append(
                {
                    "ids": ids_CK,
                    "probs": p_CK.half(),
                    "rest": p_CV.scatter_(1, ids_CK, 0.0).sum(-1).half(),
                }
            )
        else:
            u_C = torch.rand(len(chunk), generator=generator, dtype=torch.float64).to(
                logits_CV.device
            )
            parts.append(sample(logits_CV, scheme.threshold, u_C))
    whole = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    if (
        "ids" in whole
    ):  # in two bytes, and a third in a tensor of its own where the vocabulary needs it
        ids = whole.pop("ids")
        whole["ids_low"] = (ids & 0xFFFF).to(torch.uint16)
        if len(head.weight_VH) > 1 << 16:
            whole["ids_high"] = (ids >> 16).to(torch.uint8)
    return whole


def sample(logits_CV: Tensor, tau: float, u_C: Tensor) -> Shard:
    """`sampled` of fp32 logits with one uniform u in [0, 1) a token.

    heads, draws (C,) uint8; ids of heads, then of draws, token by token; fp16 probabilities of the
    heads; rest, entropy (C,) fp16.
    """
    tokens, device = len(logits_CV), logits_CV.device
    max_C1 = logits_CV.amax(-1, keepdim=True)
    p_CV = (logits_CV - max_C1).exp_()
    sum_C1 = p_CV.sum(-1, keepdim=True)
    p_CV.div_(sum_C1)
    entropy_C = (max_C1 + sum_C1.log())[:, 0] - torch.linalg.vecdot(p_CV, logits_CV)
    head_token, head_column = (p_CV >= tau).nonzero(as_tuple=True)
    head_p = p_CV[head_token, head_column].half()
    p_CV[head_token, head_column] = 0.0
    rest_C = p_CV.sum(-1).half()
    draws_C = (rest_C.double() / tau).ceil().long().clamp_max(255)
    draw_token = torch.repeat_interleave(torch.arange(tokens, device=device), draws_C)
    first_C = draws_C.cumsum(0) - draws_C
    number = torch.arange(len(draw_token), device=device) - first_C[draw_token]
    draw_column = _systematic(p_CV, draw_token, (u_C[draw_token] + number) / draws_C[draw_token])
    token, column = torch.cat([head_token, draw_token]), torch.cat([head_column, draw_column])
    by_token = torch.sort(token, stable=True).indices  # a token's heads stay before its draws
    heads_C = torch.bincount(head_token, minlength=tokens)
    return {
        "heads": heads_C.to(torch.uint8), "draws": draws_C.to(torch.uint8), "ids": column[by_token],
        "probs": head_p, "rest": rest_C, "entropy": entropy_C.clamp_min(0).half(),
    }  # fmt: skip


def _systematic(rest_CV: Tensor, token_M: Tensor, quantile_M: Tensor) -> Tensor:
    """Columns (M,) where the cumulative sum of the token's row reaches its quantile in [0, 1) of
    the row's total.
    """
    rest_CV = torch.nn.functional.pad(rest_CV, (0, -rest_CV.shape[1] % BLOCK))
    blocks_CBb = rest_CV.view(len(rest_CV), -1, BLOCK)
    ends_CB = blocks_CBb.sum(-1).double().cumsum(-1)
    point_M = quantile_M * ends_CB[token_M, -1]
    block_M = torch.searchsorted(ends_CB[token_M], point_M[:, None], right=True)[:, 0].clamp_max(
        ends_CB.shape[1] - 1
    )
    before_M = torch.where(block_M > 0, ends_CB[token_M, (block_M - 1).clamp_min(0)], 0.0)
    inside_Mb = blocks_CBb[token_M, block_M].double().cumsum(-1)
    column_M = torch.searchsorted(inside_Mb, (point_M - before_M)[:, None], right=True)[
        :, 0
    ].clamp_max(BLOCK - 1)
    return block_M * BLOCK + column_M


def decode(rows: list[Shard], scheme: Scheme) -> dict[str, Tensor]:
    """Tensors of a batch out of `encode`'s, for N tokens in all: what `as_target` takes."""
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    if scheme.name == "full":
        return {"teacher_logits": joined["logits"].float()}
    if scheme.name == "hidden":
        codes, scales = joined["codes"], joined["scales"].float()
        return {
            "teacher_hidden": (
                codes.float() * scales.repeat_interleave(GROUP, 1)[:, : codes.shape[1]]
            )
        }
    ids, probs, rest_N = (
        joined["ids_low"].view(torch.int16).long() & 0xFFFF,
        joined["probs"].float(),
        joined["rest"].float(),
    )
    if "ids_high" in joined:
        ids += joined["ids_high"].long() << 16
    if scheme.name == "topk":
        return {"ids": ids, "probs": probs / (probs.sum(-1) + rest_N)[:, None]}
    heads_N, draws_N = joined["heads"].long(), joined["draws"].long()
    count_N, tokens = heads_N + draws_N, torch.arange(len(heads_N))
    token = torch.repeat_interleave(tokens, count_N)
    place = torch.arange(len(ids)) - (count_N.cumsum(0) - count_N)[token]
    is_head = place < heads_N[token]
    kept_N = torch.zeros(len(heads_N)).index_add_(0, token[is_head], probs)
    p = (rest_N / draws_N.clamp_min(1))[token]
    p[is_head] = probs
    p /= (kept_N + rest_N)[token]
    shape = (len(heads_N), max(1, int(count_N.max())))
    return {
        "ids": torch.zeros(shape, dtype=torch.long).index_put_((token, place), ids),
        "probs": torch.zeros(shape).index_put_((token, place), p),
        "entropy": joined["entropy"].float(),
    }  # fmt: skip


def as_target(batch: dict[str, Tensor], head: Head | None) -> Target | None:
    """The teacher in a batch as `losses.py` wants it; `head` is the teacher's,
    for hidden states.
    """
    if "entropy" in batch:
        return Sparse(batch["ids"], batch["probs"], batch["entropy"])
    if "ids" in batch:
        return Bucket(batch["ids"], batch["probs"])
    if "teacher_logits" in batch:
        return Dense(batch["teacher_logits"], None)
    return Dense(batch["teacher_hidden"], head) if "teacher_hidden" in batch else None


def made_with(folder: str | None = None) -> dict[str, Any]:
    """What a signal's numbers depend on besides its meta: recorded, part of a stage's key, no
    reason to refuse a folder.

    Of the signal in `folder` if there is one, else of one made here and now.
    """
    if folder is not None:
        fs, path = fsspec.core.url_to_fs(folder)
        if fs.exists(f"{path}/meta.json"):
            return dict(json.loads(fs.cat_file(f"{path}/meta.json"))["made_with"])
    sources = sources_digest(
        "compress.distill.signal:",
        "compress.models.head",
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
    ) -> None:
        """In a folder below `root` named by the meta; with `own_folder` in `root` itself.
        ValueError when a signal of another meta is there.
        """
        self.teacher, self.data, self.scheme, self.log, self.load = teacher, data, scheme, log, load
        fields = {"sampled": ("threshold", "temperature"), "topk": ("top", "temperature")}.get(
            scheme.name, ()
        )  # that decide a scheme's bytes
        self.meta: dict[str, Any] = {
            "schema": 3,
            "scheme": scheme.name,
            **{field: getattr(scheme, field) for field in fields},
            "teacher": weights_digest(teacher),
            "teacher_load": load,
            "tokenizer": tokenizer_digest(teacher),
            "data": data.digest,
            "seed": seed,
            "rows_per_shard": ROWS_PER_SHARD,
            "precision": "fp32" if precision == "fp32" else "bf16",
        }
        base = str(root) if own_folder else f"{root}/{sha256_json(self.meta | made_with())[:32]}"
        self.fs, self.folder = fsspec.core.url_to_fs(base)
        self._head: Head | None = None  # of the scheme "hidden", once the teacher was open
        self._shards: dict[int, list[Shard]] = {}
        self._paths: dict[int, str] = {}
        self._fetched: dict[int, Future[bytes]] = {}
        self._reader = ThreadPoolExecutor(1)
        self.fs.makedirs(self.folder, exist_ok=True)
        if not self.fs.exists(f"{self.folder}/meta.json"):
            self._put(
                "meta.json", json.dumps(self.meta | {"made_with": made_with()}, indent=2).encode()
            )
        found = json.loads(self.fs.cat_file(f"{self.folder}/meta.json"))
        for key, asked in self.meta.items():
            if found.get(key) != asked:
                made = (
                    f"was made with another {key}: it has {found.get(key)!r}, this run needs"
                    f" {asked!r}"
                )
                raise ValueError(
                    f"the teacher signal in {self.folder} {made}; give signal.path an empty folder,"
                    " or change what differs"
                )
        if differing := [
            name
            for name, value in made_with().items()
            if found.get("made_with", {}).get(name, value) != value
        ]:
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
        """The head that turns kept hidden states into logits; None for the other schemes."""
        if self.scheme.name == "hidden" and self._head is None:
            self._open_teacher()
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
        for number in (
            {row // ROWS_PER_SHARD for row in rows} - self._shards.keys() - self._fetched.keys()
        ):
            if path := self._paths.get(number) or self._present().get(number):
                self._fetched[number] = self._reader.submit(self.fs.cat_file, path)

    def make(self, rows: int) -> None:
        """Make this rank's part of what lacks of the first `rows` sequences' shards. ResourceError
        when the disk has no place for them.
        """
        numbers, present = range(-(-rows // ROWS_PER_SHARD)), self._present()
        missing = [
            n for n in numbers if n not in present and n % parallel.world() == parallel.rank()
        ]
        start, teacher = time.monotonic(), self._open_teacher() if missing else ()
        for done, number in enumerate(missing, 1):
            size = self._write(number, *teacher)[1]
            more = size * (len(missing) - 1)
            if (
                done == 1
                and Path(self.folder).is_dir()
                and more > (free := shutil.disk_usage(self.folder).free)
            ):
                needs = f"needs {more / 1e9:.1f} GB more in {self.folder}"
                raise ResourceError(
                    f"the teacher signal {needs}, {free / 1e9:.1f} GB are free; set signal.path"
                )
            left = (time.monotonic() - start) / done * (len(missing) - done)
            self.log(
                f"teacher signal {done}/{len(missing)} shards, {size / self._tokens(number):.0f}"
                f" bytes a token, {left:.0f} s left"
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
        if number not in self._shards:
            path = (
                self._paths.get(number)
                or self._present().get(number)
                or self._write(number, *self._open_teacher())[0]
            )
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
            while len(self._shards) >= SHARDS_IN_MEMORY:
                del self._shards[next(iter(self._shards))]
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

    def _open_teacher(self) -> tuple[Any, Head]:
        """The teacher and its head, of which a copy stays where `teacher_head` gives it."""
        model: Any = load_model(
            self.teacher,
            torch.float32 if self.meta["precision"] == "fp32" else torch.bfloat16,
            self.load,
        )
        use_cpu_kernels(model)
        model.to(best_device())
        head = head_of(model).detach()
        head = head.first(min(len(head.weight_VH), token_count(load_tokenizer(self.teacher))))
        if self.scheme.name == "hidden":
            self._head = replace(head, weight_VH=head.weight_VH.clone())
        return model, head

    def _write(self, number: int, model: Any, head: Head) -> tuple[str, int]:
        """Make one shard; its path and size in bytes."""
        generator = torch.Generator().manual_seed(self.meta["seed"] * 1_000_003 + number)
        made = []
        with torch.inference_mode():
            for row in range(
                number * ROWS_PER_SHARD, min((number + 1) * ROWS_PER_SHARD, len(self.data.ids))
            ):
                hidden_LH = hidden_states(
                    model, **send_to_device(self.data.inputs([row]), model.device)
                )
                made.append(encode(hidden_LH, head, self.scheme, generator))
        lengths = {
            f"{name}.lengths": torch.tensor([len(row[name]) for row in made]) for name in made[0]
        }  # of the rows, one after the other
        data = save({name: torch.cat([row[name] for row in made]) for name in made[0]} | lengths)
        self._put(_name(number, data), data)
        return f"{self.folder}/{_name(number, data)}", len(data)


def _name(number: int, data: bytes) -> str:
    return f"{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
