"""Exact resume: parameters and optimizer moments in safetensors, the rest in JSON; no pickle, never half-written.

`<work>/state-<step>/` is built beside, fsync'ed and renamed; the older one is removed only afterwards, so a kill at any moment
leaves one whole state. Batches and random numbers are pure functions of the step, so the step is all there is besides tensors.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compress.store import commit

MOMENTS = ("exp_avg", "exp_avg_sq")


def _named(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save_state(work: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Make (parameters, AdamW moments, state["step"], ...) durable under `work`."""
    beside, final = work / ".state.part", work / f"state-{state['step']:08d}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors = {f"param/{name}": p.detach().contiguous() for name, p in _named(module).items()}
    for name, p in _named(module).items():
        tensors |= {f"{moment}/{name}": optimizer.state[p][moment] for moment in MOMENTS if p in optimizer.state}
    save_file(tensors, beside / "tensors.safetensors")
    (beside / "state.json").write_text(json.dumps(state))
    older = list(work.glob("state-*"))
    if final not in older:
        commit(beside, final)
    for path in older:
        if path != final:
            shutil.rmtree(path)


def load_state(work: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest whole state into module and optimizer; None when there is none."""
    newest = max(work.glob("state-*"), default=None)
    if newest is None:
        return None
    state = json.loads((newest / "state.json").read_text())
    tensors = load_file(newest / "tensors.safetensors")
    with torch.no_grad():
        for name, p in _named(module).items():
            p.copy_(tensors[f"param/{name}"])
            if f"{MOMENTS[0]}/{name}" in tensors:
                optimizer.state[p] = {m: tensors[f"{m}/{name}"].to(p.device) for m in MOMENTS}
                optimizer.state[p]["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
    return state
