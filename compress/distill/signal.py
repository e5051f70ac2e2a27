"""The teacher's signal, made once and kept: a second epoch, a second student, QAT or a search never runs the teacher again.

A folder of shards, local or anything fsspec can open (s3://, gs://, hf://). `meta.json` names schema, teacher, tokenizer, data, scheme,
seed and precision, and what made it; a folder whose meta differs from what is asked is refused. Each shard `NNNNN-<sha256[:16]>.safetensors`
holds ROWS_PER_SHARD sequences (`schemes.py`), is a pure function of (meta, its number), appears whole and is checked against its name
whenever it is read. Shards are only ever added: making goes on where it stopped, and several workers make every world-th shard each.

Legend: R rows (sequences), L positions, N = R L tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import torch
from accelerate.utils import send_to_device
from safetensors.torch import load, save
from torch import Tensor

from compress.checkpoint import best_device, digest, load_model, load_tokenizer, tokenizer_digest
from compress.distill.schemes import Scheme, Shard, decode, encode
from compress.errors import ResourceError
from compress.store import sha256_json, write_whole
from compress.train.cpu import use_cpu_kernels
from compress.train.data import Packed
from compress.train.forward import Head, head_of, hidden_states

ROWS_PER_SHARD = 16
SHARDS_IN_MEMORY = 64


@dataclass(frozen=True)
class Worker:
    """One of `world` processes making the same signal; process `rank` makes shards rank, rank + world, ..."""

    rank: int = 0
    world: int = 1


def made_with(folder: str | None = None) -> dict[str, Any]:
    """What a signal's last bits depend on besides its meta: recorded, part of a stage's key, no reason to refuse a folder.

    Of the signal in `folder` if there is one, else of one made here and now.
    """
    if folder is not None:
        fs, path = fsspec.core.url_to_fs(folder)
        if fs.exists(f"{path}/meta.json"):
            return dict(json.loads(fs.cat_file(f"{path}/meta.json"))["made_with"])
    return {"threads": torch.get_num_threads(), "device": best_device().type, "torch": torch.__version__}


class Signals:
    """Signals of one teacher on one packed text. Reading makes what is missing first."""

    def __init__(self, root: Path | str, teacher: Path, data: Packed, scheme: Scheme, *, seed: int, precision: str, log: Callable[[str], None],
                 own_folder: bool = False, worker: Worker | None = None, load: str = "plain") -> None:  # fmt: skip
        """Below `root`, in a folder named by the meta; with `own_folder` in `root` itself, which must hold nothing else.

        ValueError when `root` holds another teacher's, tokenizer's, data's or scheme's signal.
        """
        self.teacher, self.data, self.scheme, self.log = teacher, data, scheme, log
        self.worker, self.load = worker or Worker(), load
        self.meta: dict[str, Any] = {
            "schema": 2, **scheme.meta(), "teacher": digest(teacher), "teacher_load": load, "tokenizer": tokenizer_digest(teacher),
            "data": data.digest, "seed": seed, "rows_per_shard": ROWS_PER_SHARD, "precision": "fp32" if precision == "fp32" else "bf16",
        }  # fmt: skip
        base = str(root) if own_folder else f"{root}/{sha256_json(self.meta | made_with())[:32]}"
        self.fs, self.folder = fsspec.core.url_to_fs(base)
        self._head: Head | None = None  # of the scheme "hidden", once the teacher was open
        self._shards: dict[int, list[Shard]] = {}
        self._paths: dict[int, str] = {}
        self._fetched: dict[int, Future[bytes]] = {}
        self._reader = ThreadPoolExecutor(1)
        self.fs.makedirs(self.folder, exist_ok=True)
        if not self.fs.exists(f"{self.folder}/meta.json"):
            self._put("meta.json", json.dumps(self.meta | {"made_with": made_with()}, indent=2).encode())
        found = json.loads(self.fs.cat_file(f"{self.folder}/meta.json"))
        for key, asked in self.meta.items():
            if found.get(key) != asked:
                raise ValueError(
                    f"the teacher signal in {self.folder} was made with another {key}: it has {found.get(key)!r}, this run needs {asked!r};"
                    " give signal.path an empty folder, or change what differs"
                )

    def _put(self, name: str, data: bytes) -> None:
        """A file that appears whole: object stores do that by themselves."""
        if "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,)):
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
        """The teacher's tensors of these rows, N = len(rows) * L tokens, as `schemes.decode` gives them.

        ValueError when a shard is damaged.
        """
        return decode([self._shard(row // ROWS_PER_SHARD)[row % ROWS_PER_SHARD] for row in rows], self.scheme)

    def prefetch(self, rows: list[int]) -> None:
        """Start fetching the shards of these rows; only bytes move, so that the thread leaves the cores to training."""
        for number in {row // ROWS_PER_SHARD for row in rows} - self._shards.keys() - self._fetched.keys():
            if path := self._find(number):
                self._fetched[number] = self._reader.submit(self.fs.cat_file, path)

    def make(self, rows: int) -> None:
        """Make this worker's part of the shards that the first `rows` sequences need; shards that exist are kept.

        ResourceError when the disk has less free space than the shards will take.
        """
        numbers, present = range(-(-rows // ROWS_PER_SHARD)), self._present()
        missing = [n for n in numbers if n not in present and n % self.worker.world == self.worker.rank]
        start, teacher = time.monotonic(), self._open_teacher() if missing else ()
        for done, number in enumerate(missing, 1):
            size = self._write(number, *teacher)[1]
            more = size * (len(missing) - 1)
            if done == 1 and Path(self.folder).is_dir() and more > (free := shutil.disk_usage(self.folder).free):
                raise ResourceError(
                    f"the teacher signal needs {more / 1e9:.1f} GB more in {self.folder}, {free / 1e9:.1f} GB are free; set signal.path"
                )
            left = (time.monotonic() - start) / done * (len(missing) - done)
            self.log(f"teacher signal {done}/{len(missing)} shards, {size / self._tokens(number):.0f} bytes a token, {left:.0f} s left")

    def bytes_per_token(self) -> float:
        """Bytes of all shards over their tokens."""
        present = self._present()
        return sum(self.fs.size(path) for path in present.values()) / max(1, sum(self._tokens(number) for number in present))

    def _tokens(self, number: int) -> int:
        rows = min(ROWS_PER_SHARD, len(self.data.ids) - number * ROWS_PER_SHARD)
        return rows * (self.data.ids.shape[1] - 1)

    def _present(self) -> dict[int, str]:
        paths = self.fs.glob(f"{self.folder}/*.safetensors")
        return {int(path.rsplit("/", 1)[1].split("-")[0]): path for path in sorted(paths)}

    def _find(self, number: int) -> str | None:
        if number not in self._paths:
            self._paths = self._present()
        return self._paths.get(number)

    def _shard(self, number: int) -> list[Shard]:
        if number not in self._shards:
            path = self._find(number) or self._write(number, *self._open_teacher())[0]
            data = self._fetched.pop(number).result() if number in self._fetched else self.fs.cat_file(path)
            if path.rsplit("/", 1)[1] != _name(number, data):
                raise ValueError(f"teacher signal {path} is damaged (its checksum differs from its name); delete it and run again")
            while len(self._shards) >= SHARDS_IN_MEMORY:
                del self._shards[next(iter(self._shards))]
            tensors = load(data)
            columns = {name: tensors[name].split(tensors[f"{name}.lengths"].tolist()) for name in tensors if f"{name}.lengths" in tensors}
            self._shards[number] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return self._shards[number]

    def _open_teacher(self) -> tuple[Any, Head]:
        """The teacher and its head, of which a copy stays where `teacher_head` gives it."""
        model: Any = load_model(self.teacher, torch.float32 if self.meta["precision"] == "fp32" else torch.bfloat16, self.load)
        use_cpu_kernels(model)
        if self.load == "plain":
            model.to(best_device())
        head = head_of(model).detach().first(min(model.config.vocab_size, len(load_tokenizer(self.teacher))))
        if self.scheme.name == "hidden":
            self._head = replace(head, weight_VH=head.weight_VH.clone())
        return model, head

    def _write(self, number: int, model: Any, head: Head) -> tuple[str, int]:
        """Make one shard; its path and size in bytes."""
        generator = torch.Generator().manual_seed(self.meta["seed"] * 1_000_003 + number)
        made = []
        with torch.inference_mode():
            for row in range(number * ROWS_PER_SHARD, min((number + 1) * ROWS_PER_SHARD, len(self.data.ids))):
                hidden_LH = hidden_states(model, **send_to_device(self.data.inputs([row]), model.device))
                made.append(encode(hidden_LH, head, self.scheme, generator))
        lengths = {f"{name}.lengths": torch.tensor([len(row[name]) for row in made]) for name in made[0]}  # of the rows, one after the other
        data = save({name: torch.cat([row[name] for row in made]) for name in made[0]} | lengths)
        self._put(_name(number, data), data)
        return f"{self.folder}/{_name(number, data)}", len(data)


def _name(number: int, data: bytes) -> str:
    return f"{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
