"""The state of a training on disk, `<work>/state-<step>/`: each rank's tensors in safetensors, the
rest in JSON, so that a resumed run ends in the same bytes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.store import commit
from compress.train import parallel
from compress.train.moments import MOMENTS, empty_moments
from compress.train.optimizer import StochasticAdamW


def save_state(
    work: Path,
    state: dict[str, Any],
    best: dict[str, Tensor],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: int,
) -> None:
    """Make the state durable as `<work>/state-<step>/`, the older one going last: a kill at
    any moment leaves one whole. All ranks call it; the first `ranks` of them write tensors.
    """
    beside = work / ".state.part"
    final = work / f"state-{state['step']:08d}"
    if parallel.rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)

    # Every rank its own shards, once the folder is there.
    parallel.wait()
    if parallel.rank() < ranks:
        tensors = _tensors(best, trained, optimizer)
        save_file(tensors, beside / f"tensors-{parallel.rank()}.safetensors")

    # The folder gets its name when all of it is there.
    parallel.wait()
    if parallel.rank() == 0:
        (beside / "state.json").write_text(json.dumps(state | {"ranks": ranks}))
        commit(beside, final)
        for older in set(work.glob("state-*")) - {final}:
            shutil.rmtree(older)


def _tensors(
    best: dict[str, Tensor], trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """This rank's part of the best weights, the weights and their moments, by name in the file."""
    tensors = {f"best/{name}": p for name, p in best.items()}
    for name, p in trained.items():
        tensors[f"param/{name}"] = parallel.local(p).contiguous()
        if p in optimizer.state:
            moments = {m: parallel.local(optimizer.state[p][m]) for m in MOMENTS}
            tensors |= {f"{m}/{name}": moment.contiguous() for m, moment in moments.items()}
    return tensors


def restore_state(
    work: Path,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: int,
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Put the newest whole state back into parameters and optimizer; returns it without its
    tensors, and the best weights; None where there is none.

    ValueError when it was sharded over another number of processes.
    """
    # Nobody reads before everybody has stopped writing.
    parallel.wait()
    newest = max(work.glob("state-*"), default=None)
    if newest is None:
        return None

    state = json.loads((newest / "state.json").read_text())
    saved_ranks = state.pop("ranks")
    if saved_ranks != ranks:
        raise ValueError(
            f"{newest} was saved by {saved_ranks} sharded processes, this run has"
            f" {parallel.world()}; use as many, or delete it to start anew"
        )

    # Where every rank's state is the same there is one file for all.
    tensors = load_file(newest / f"tensors-{min(parallel.rank(), ranks - 1)}.safetensors")
    best: dict[str, Tensor] = {}
    for name, p in trained.items():
        parallel.local(p).copy_(tensors[f"param/{name}"])
        if f"{MOMENTS[0]}/{name}" in tensors:
            optimizer.state[p] = _optimizer_state(name, p, tensors, state, optimizer)
        if f"best/{name}" in tensors:
            best[name] = tensors[f"best/{name}"].to(p.device)
    return state, best


def _optimizer_state(
    name: str,
    p: nn.Parameter,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """What the optimizer keeps of a parameter, its moments sharded like it. Torch's fused AdamW
    reads the step on the device; ours is a plain number.
    """
    on_device = not isinstance(optimizer, StochasticAdamW)
    moments = empty_moments(p, getattr(optimizer, "moments", "fp32"))
    for m in MOMENTS:
        parallel.local(moments[m]).copy_(tensors[f"{m}/{name}"])
    step = float(state["step"])
    return {**moments, "step": torch.tensor(step, device=p.device) if on_device else step}
