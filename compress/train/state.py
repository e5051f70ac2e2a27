"""The state of a training on disk, `<work>/state-<step>/`: each process's part of the tensors in
safetensors, the rest in JSON, so that a resumed run ends in the same bytes, or on another number of
processes goes on from the same numbers.

The layout is that of torch.distributed.checkpoint's own safetensors files: a part is named as the
tensor, and the header says under DCP_SHARDING_INFO where in it it begins. So DCP reads it back,
into parameters that are cut otherwise or not at all. It does not write it: DCP's default format has
a pickled `.metadata`, which would be read from the disk, and its safetensors writer holds a second
copy of all bytes and talks between processes from within its thread, while training does so too.

A save takes a copy of the tensors to the host; a thread of each process writes its part, under
another name until it is whole. The thread of rank 0 sees all parts there, adds `state.json` and
gives the folder its name; then the older state goes. A kill at any moment leaves one whole. Where
the host has no room for the copy, the same is done without a thread.

The next one is due when SAVE_SECONDS have passed and the last one took at most SAVE_SHARE of the
time since it began.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.store import commit, fsync
from compress.train import parallel
from compress.train.moments import MOMENTS, empty_moments
from compress.train.optimizer import StochasticAdamW

# A tensor, or its rows that one process has, and where in it these begin; None: it is whole.
Part = tuple[Tensor, list[int] | None]
SAVE_SECONDS = 20.0  # between two states, at least
SAVE_SHARE = 0.05  # of the time, at most
ROOM = 2  # times the copy that must be free on the host
POLL_SECONDS = 0.02
FAILED = "failed"  # the file that a process leaves which can't write its part


class Saver:
    """What writes the states of one training, of `ranks` processes that have tensors to write."""

    def __init__(self, work: Path, ranks: int) -> None:
        self.work = work
        self.ranks = ranks
        self.seconds = 0.0  # that the last save took, from its begin to its name
        self.begun = time.monotonic()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.given_up = threading.Event()

    @property
    def due(self) -> bool:
        """Whether it is time for another state."""
        busy = self.thread is not None and self.thread.is_alive()
        pause = max(SAVE_SECONDS, self.seconds / SAVE_SHARE)
        return not busy and time.monotonic() - self.begun > pause

    def begin(self, state: dict[str, Any], parts: dict[str, Part]) -> None:
        """Write this state, with this rank's part of each tensor, while training goes on. All ranks
        call it. OSError when the one before it can't be written.
        """
        self.wait()
        self.begun = time.monotonic()
        beside = self.work / ".state.part"
        if parallel.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)

        # What this rank writes, once the folder is there; what all have is written by the first.
        parallel.wait()
        final = self.work / f"state-{state['step']:08d}"
        text = json.dumps(state | {"ranks": self.ranks})
        tensors: dict[str, Tensor] = {}
        places: dict[str, Any] = {}
        for name, (part, first) in parts.items():
            if part.numel() and (first is not None or parallel.rank() == 0):
                tensors[name] = part.contiguous()
                places[name] = {"saved_offsets": first or [0] * part.dim()}
        size = sum(part.nbytes for part in tensors.values())

        # A copy on the host leaves training free to go on.
        if psutil.virtual_memory().available < ROOM * size:
            self._write(beside, final, text, tensors, places)
            return
        copies = {name: part.to("cpu", copy=True) for name, part in tensors.items()}
        arguments = (beside, final, text, copies, places)
        self.thread = threading.Thread(target=self._write_quietly, args=arguments, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the state that is being written is there; OSError when it can't be."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self) -> None:
        """Raise what the thread has met."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def close(self) -> None:
        """End the thread, whatever it has done so far."""
        self.given_up.set()
        if self.thread is not None:
            self.thread.join()

    def _write_quietly(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self.error = error

    def _write(
        self,
        beside: Path,
        final: Path,
        text: str,
        tensors: dict[str, Tensor],
        places: dict[str, Any],
    ) -> None:
        """This rank's part; on rank 0 also the rest of it, when all parts are there."""
        if parallel.rank() < self.ranks:
            try:
                _write_part(beside, tensors, places)
            except BaseException:
                with suppress(OSError):
                    (beside / FAILED).touch()
                raise
        if parallel.rank() > 0:
            return

        # The others' parts have their names when they are whole.
        while not all((beside / _file(rank)).is_file() for rank in range(self.ranks)):
            if self.given_up.wait(POLL_SECONDS):
                return
            if (beside / FAILED).exists():
                raise OSError(f"a process can't write its part of the state below {self.work}")
        (beside / "state.json").write_text(text)
        commit(beside, final)
        for older in set(self.work.glob("state-*")) - {final}:
            shutil.rmtree(older)
        self.seconds = time.monotonic() - self.begun


def _file(rank: int) -> str:
    return f"tensors-{rank}.safetensors"


def _write_part(beside: Path, tensors: dict[str, Tensor], places: dict[str, Any]) -> None:
    """This rank's file in DCP's layout, durable before it has its name."""
    part = beside / f"part-{parallel.rank()}"
    about = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places), "format": "pt"}
    save_file(tensors, part, metadata=about)
    fsync(part)
    part.rename(beside / _file(parallel.rank()))


def parts_of(
    best: dict[str, Tensor], trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Part]:
    """This rank's part of the best weights, the weights and their moments, by name in the state."""
    parts: dict[str, Part] = {}
    for name, p in trained.items():
        first = parallel.offset(p)
        parts[f"param/{name}"] = parallel.local(p), first
        if name in best:
            parts[f"best/{name}"] = best[name], first
        if p in optimizer.state:
            moments = {m: parallel.local(optimizer.state[p][m]) for m in MOMENTS}
            parts |= {f"{m}/{name}": (moment, first) for m, moment in moments.items()}
    return parts


def restore_state(
    work: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Put the newest whole state back into parameters and optimizer, each rank reading what it has
    of them; returns it without its tensors, and the best weights; None where there is none.
    """
    import torch.distributed.checkpoint as dcp

    # Nobody reads before everybody has stopped writing.
    parallel.wait()
    newest = max(work.glob("state-*"), default=None)
    if newest is None:
        return None
    state: dict[str, Any] = json.loads((newest / "state.json").read_text())
    state.pop("ranks")

    # Room for everything that was saved, cut as it is cut here.
    reader = dcp.HuggingFaceStorageReader(str(newest))
    names = set(reader.read_metadata().state_dict_metadata)
    best: dict[str, Tensor] = {}
    tensors: dict[str, Any] = {}
    for name, p in trained.items():
        tensors[f"param/{name}"] = p.detach()
        if f"{MOMENTS[0]}/{name}" in names:
            moments = empty_moments(p, getattr(optimizer, "moments", "fp32"))
            tensors |= {f"{m}/{name}": moment for m, moment in moments.items()}
            optimizer.state[p] = moments | {"step": _step(state, p, optimizer)}
        if f"best/{name}" in names:
            best[name] = torch.zeros_like(parallel.local(p))
            tensors[f"best/{name}"] = parallel.like(best[name], p)

    # Every rank plans for itself; said aloud that would read as a warning. What has no memory takes
    # no values.
    tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return state, best


def _step(state: dict[str, Any], p: nn.Parameter, optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer's count of steps: torch's fused AdamW reads it on the device of the parameter,
    ours is a plain number.
    """
    step = float(state["step"])
    return step if isinstance(optimizer, StochasticAdamW) else torch.tensor(step, device=p.device)
