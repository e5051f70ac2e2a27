"""Exact resume: parameters, optimizer moments and the best weights in safetensors, the rest in JSON; no pickle, never half-written.

`<work>/state-<step>/` is built beside, fsync'ed and renamed; the older one is removed only afterwards, so a kill at any moment
leaves one whole state. Batches and random numbers are pure functions of the step, so the step is all there is besides tensors.
With sharded parameters each rank writes its own shards; a resumed run needs as many ranks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.store import commit
from compress.train import parallel

MOMENTS = ("exp_avg", "exp_avg_sq")


def _named(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def named_locals(module: torch.nn.Module) -> dict[str, Tensor]:
    """This rank's part of every trained parameter, by name; views, not copies."""
    return {name: parallel.local(p.detach()) for name, p in _named(module).items()}


def save_state(work: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], best: dict[str, Tensor],
               replicated: bool) -> None:  # fmt: skip
    """Make (parameters, AdamW moments, best weights, state["step"], ...) durable under `work`; all ranks call it."""
    beside, final = work / ".state.part", work / f"state-{state['step']:08d}"
    if parallel.rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    parallel.wait()
    if not replicated or parallel.rank() == 0:
        tensors = {f"param/{name}": p.contiguous() for name, p in named_locals(module).items()}
        for name, p in _named(module).items():
            if p in optimizer.state:
                tensors |= {f"{moment}/{name}": parallel.local(optimizer.state[p][moment]).contiguous() for moment in MOMENTS}
        save_file(tensors | {f"best/{name}": p for name, p in best.items()}, beside / f"tensors-{parallel.rank()}.safetensors")
    parallel.wait()
    if parallel.rank() > 0:
        return
    ranks = 1 if replicated else parallel.world()
    (beside / "state.json").write_text(json.dumps(state | {"ranks": ranks}))
    commit(beside, final)
    for older in set(work.glob("state-*")) - {final}:
        shutil.rmtree(older)


def load_state(work: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer,
               replicated: bool) -> tuple[dict[str, Any], dict[str, Tensor]] | None:  # fmt: skip
    """Restore the newest whole state into module and optimizer: (state, best weights); None when there is none.

    ValueError when it was sharded over another number of processes.
    """
    parallel.wait()  # nobody reads before everybody has stopped writing
    newest = max(work.glob("state-*"), default=None)
    if newest is None:
        return None
    state = json.loads((newest / "state.json").read_text())
    ranks = state.pop("ranks")
    if ranks != (1 if replicated else parallel.world()):
        raise ValueError(f"{newest} was saved by {ranks} sharded processes, this run has {parallel.world()}; use as many, or delete it to start anew")
    tensors = load_file(newest / f"tensors-{0 if replicated else parallel.rank()}.safetensors")
    for name, part in named_locals(module).items():
        part.copy_(tensors[f"param/{name}"])
    for name, p in _named(module).items():
        if f"{MOMENTS[0]}/{name}" in tensors:
            optimizer.state[p] = {m: torch.zeros_like(p, dtype=torch.float32) for m in MOMENTS}  # placed, and sharded, like the parameter
            for m in MOMENTS:
                parallel.local(optimizer.state[p][m]).copy_(tensors[f"{m}/{name}"])
            optimizer.state[p]["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
    best = {name.removeprefix("best/"): t.to(next(module.parameters()).device) for name, t in tensors.items() if name.startswith("best/")}
    return state, best
