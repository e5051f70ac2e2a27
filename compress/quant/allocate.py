"""Bits where they matter: a grid for every matrix, so that the file meets a byte budget at the least expected loss.

With matrix i alone on the probe grid, its damage k_i = KL(p || p_i) is measured on calibration text. Damage grows with the power of
the rounding error, so that grid g costs

    c_ig = k_i |W_i - Q_g(W_i)|^2 / |W_i - Q_probe(W_i)|^2              nats a token

and, errors of different matrices being nearly independent, costs add up. Chosen is the minimum of sum_i c_ig under sum_i bytes_ig <= budget: a
multiple-choice knapsack, solved exactly as an integer program (HiGHS, through scipy). Left out: grids chosen anew after training.
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

from compress.distill.losses import Dense, Mix, head_loss
from compress.quant.codes import quantizable
from compress.quant.grids import GRIDS
from compress.store import write_json
from compress.train.forward import head_of, hidden_states
from compress.train.loop import progress

PROBE = "q4_0"  # 4 bits: damage far above the noise of the measurement
Options = dict[str, dict[str, tuple[float, int]]]  # matrix -> grid -> (cost in nats a token, bytes)


@torch.no_grad()
def damages(model: Any, ids_RL: Tensor, kept: Path, label: str, log: Callable[[str], None]) -> dict[str, float]:
    """k_i of every matrix of an fp32 model, nats a token on the sequences `ids_RL`; those in the file `kept` are not measured again."""

    def states() -> Tensor:
        return torch.cat([hidden_states(model, row[None]) for row in ids_RL])

    head, labels, every = head_of(model).detach(), ids_RL.flatten(), torch.ones(ids_RL.numel())
    full = Dense(states(), replace(head, weight_VH=head.weight_VH.clone()))
    found: dict[str, float] = json.loads(kept.read_text()) if kept.is_file() else {}
    matrices = list(quantizable(model))
    with progress(label, len(matrices), len(found), log) as update:
        for name, home, _ in matrices:
            if name in found:
                continue
            weight: Any = home.weight
            whole = weight.clone()
            weight.copy_(GRIDS[PROBE].decode(*GRIDS[PROBE].encode(whole, name)))
            start = time.monotonic()
            kl = float(head_loss(states(), head_of(model).detach(), labels, every, full, Mix())) / len(labels)
            weight.copy_(whole)
            found[name] = max(kl, 0.0)
            write_json(kept, found)
            update(len(found), kl, len(labels) / (time.monotonic() - start))
    return found


@torch.no_grad()
def options(model: Any, damage: dict[str, float], grids: Collection[str]) -> Options:
    """c_ig and bytes of every matrix on each grid whose blocks its rows divide into. ValueError, naming the matrix, when none does."""
    made: Options = {}
    for name, home, _ in quantizable(model):
        weight: Any = home.weight
        able = [GRIDS[grid] for grid in grids if weight.shape[-1] % GRIDS[grid].block == 0]
        if not able:
            raise ValueError(
                f"{name} has rows of {weight.shape[-1]}: none of {', '.join(grids)} takes them; add q8_0, whose blocks are {GRIDS['q8_0'].block}"
            )
        gaps = (weight - grid.decode(*grid.encode(weight, name)) for grid in (GRIDS[PROBE], *able))
        probe, *errors = (float(gap.square().sum(dtype=torch.float64)) for gap in gaps)
        cost = damage[name] / max(probe, 1e-30)
        made[name] = {g.name: (cost * error, round(weight.numel() * g.bits_per_weight / 8)) for g, error in zip(able, errors, strict=True)}
    return made


def choose(options: Options, budget_bytes: int) -> dict[str, str]:
    """The grid of every matrix with the least total cost within `budget_bytes`. ValueError, with the least possible, when nothing fits."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    least = sum(min(size for _, size in grids.values()) for grids in options.values())
    if least > budget_bytes:
        raise ValueError(
            f"the matrices take at least {least:,} bytes on the grids given, the budget leaves {budget_bytes:,}; raise it or add smaller grids"
        )
    pairs = [(name, grid) for name, grids in options.items() for grid in grids]
    cost, size = np.array([options[name][grid] for name, grid in pairs], dtype=float).T
    row = {name: i for i, name in enumerate(options)}
    once = csr_array((np.ones(len(pairs)), ([row[name] for name, _ in pairs], range(len(pairs)))))
    rules = [LinearConstraint(once, 1, 1), LinearConstraint(size[None], 0, budget_bytes)]
    solved = milp(cost / max(cost.max(), 1e-30), integrality=np.ones(len(pairs)), bounds=Bounds(0, 1), constraints=rules)
    assert solved.x is not None, f"a feasible knapsack: {solved.message}"
    return {name: grid for (name, grid), chosen in zip(pairs, solved.x, strict=True) if chosen > 0.5}
