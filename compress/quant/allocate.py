"""Bits where they matter: a grid for every matrix, so that the file meets a byte budget at the
least expected loss.

With matrix i alone on grid g, its damage c_ig = KL(p || p_ig) is measured on calibration text.
Damages of different matrices add up as long as they are small, their errors being nearly
independent. Chosen is the minimum of sum_i c_ig under sum_i bytes_ig <= budget: a multiple-choice
knapsack, solved exactly as an integer program (HiGHS, through scipy). Every grid is measured,
because no error of the weights, weighted by the inputs or not, foretold it: a parent trained from a
quantized model loses what it learned when it goes back to that model's grid, whose error is the
smallest (`results/quant/bench.md`). Left out: grids chosen anew after training.
"""

import json
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.distill.fused_head import head_loss
from compress.distill.losses import Dense, Mix
from compress.models.head import block_inputs, head_of, hidden_states
from compress.quant.codes import quantizable
from compress.quant.grids import GRIDS
from compress.store import write_json
from compress.train.progress import progress

Options = dict[str, dict[str, tuple[float, int]]]  # matrix -> grid -> (cost in nats a token, bytes)


@torch.no_grad()
def options(
    model: Any,
    ids_RL: Tensor,
    grids: Collection[str],
    kept: Path,
    label: str,
    log: Callable[[str], None],
) -> Options:
    """c_ig, measured on `ids_RL`, and bytes of every matrix of an fp32 model on each grid whose
    blocks its rows divide into.

    Damages in the file `kept` are not measured again. ValueError, naming the matrix, when no grid
    takes its rows.
    """
    matrices = quantizable(model)
    able = {
        name: [grid for grid in grids if home.weight.shape[-1] % GRIDS[grid].block == 0]
        for name, home in matrices.items()
    }
    for name in (name for name, some in able.items() if not some):
        rows = f"{name} has rows of {matrices[name].weight.shape[-1]}"
        raise ValueError(
            f"{rows}: none of {', '.join(grids)} takes them; add q8_0, whose blocks are"
            f" {GRIDS['q8_0'].block}"
        )
    states, keywords = block_inputs(model, ids_RL)

    def final(name: str) -> Tensor:
        """Final states (N, H); blocks in front of the matrix give what they gave before."""
        if not name.startswith("model.layers."):
            return hidden_states(model, ids_RL)
        index = int(name.split(".")[2])
        x_RLH = states[index]
        for block, given in zip(model.model.layers[index:], keywords[index:], strict=True):
            x_RLH = block(x_RLH, **given)
        return model.model.norm(x_RLH).flatten(0, 1)

    head, labels, every = head_of(model).detach(), ids_RL.flatten(), torch.ones(ids_RL.numel())
    full = Dense(hidden_states(model, ids_RL), replace(head, weight_VH=head.weight_VH.clone()))
    found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    with progress(label, len(matrices), len(found), log) as update:
        for name, home in matrices.items():
            if set(able[name]) <= found.get(name, {}).keys():
                continue
            weight = home.weight
            whole, start, damage = weight.clone(), time.monotonic(), {}
            for grid in able[name]:
                weight.copy_(GRIDS[grid].decode(*GRIDS[grid].encode(whole, name)))
                damage[grid] = max(
                    0.0,
                    float(
                        head_loss(final(name), head_of(model).detach(), labels, every, full, Mix())
                    )
                    / len(labels),
                )
            weight.copy_(whole)
            found[name] = damage
            write_json(kept, found)
            update(
                len(found),
                max(damage.values()),
                len(damage) * len(labels) / (time.monotonic() - start),
            )
    numel = {name: home.weight.numel() for name, home in matrices.items()}
    return {
        name: {g: (found[name][g], round(numel[name] * GRIDS[g].bits_per_weight / 8)) for g in some}
        for name, some in able.items()
    }


def choose(options: Options, budget_bytes: int) -> dict[str, str]:
    """The grid of every matrix with the least total cost within `budget_bytes`. ValueError, with
    the least possible, when nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    least = sum(min(size for _, size in grids.values()) for grids in options.values())
    if least > budget_bytes:
        raise ValueError(
            f"the matrices take at least {least:,} bytes on the grids given, the budget leaves"
            f" {budget_bytes:,}; raise it or add smaller grids"
        )
    pairs = [(name, grid) for name, grids in options.items() for grid in grids]
    cost, size = np.array([options[name][grid] for name, grid in pairs], dtype=float).T
    row = {name: i for i, name in enumerate(options)}
    once = csr_array((np.ones(len(pairs)), ([row[name] for name, _ in pairs], range(len(pairs)))))
    rules = [LinearConstraint(once, 1, 1), LinearConstraint(size[None], 0, budget_bytes)]
    solved = milp(
        cost / max(cost.max(), 1e-30),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=rules,
    )
    assert solved.x is not None, f"a feasible knapsack: {solved.message}"
    return {
        name: grid for (name, grid), chosen in zip(pairs, solved.x, strict=True) if chosen > 0.5
    }
