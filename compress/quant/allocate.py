"""Bits where they matter: a grid for every matrix, so that the file meets a byte budget at the
least expected loss.

With matrix i alone on grid g, its damage c_ig = KL(p || p_ig) is measured on calibration text.
Damages of different matrices add up as long as they are small, their errors being nearly
independent. Chosen is the minimum of sum_i c_ig under sum_i bytes_ig <= budget: a multiple-choice
knapsack, solved exactly as an integer program (HiGHS, through scipy). Every grid is measured,
because no error of the weights, weighted by the inputs or not, foretold it: a parent trained from a
quantized model loses what it learned when it goes back to that model's grid, whose error is the
smallest (`results/quant/bench.md`). The exception is a matrix that still lies on a grid, as in a
teacher read from a 4-bit file: there it loses nothing, and no grid of as many bits is tried.
Matrices of the same place in neighbouring blocks may be measured together, a pass for all: each
then counts its share, by weights, of what they lose at once. Left out: grids chosen anew after
training.
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
from compress.models.blocks import blocks_of, blocks_prefix
from compress.models.head import head_of
from compress.models.walk import Walk
from compress.quant.codes import quantizable
from compress.quant.grids import GRIDS
from compress.quant.grids.grid import unmoved
from compress.quant.settings import BLOCK, GridName
from compress.store import write_json
from compress.train.progress import progress

Options = dict[str, dict[str, tuple[float, int]]]  # matrix -> grid -> (cost in nats a token, bytes)


class _Calibration:
    """Calibration text in a model: it walks through the unquantized one, and the distribution p
    that comes out of it is kept.
    """

    def __init__(self, model: Any, ids_RL: Tensor) -> None:
        self.model = model
        self.walk = Walk(model, ids_RL)
        self.front = 0  # the block that the walk stands in front of
        self.prefix = blocks_prefix(model)
        device = self.walk.device
        self.labels_N = ids_RL.flatten().to(device)
        self.counted_N = torch.ones(ids_RL.numel(), device=device)

        # The head may be the matrix that is rounded: p needs a copy of it as it is.
        head = head_of(model).detach()
        copied = replace(head, weight_VH=head.weight_VH.clone()).on(device)
        self.target = Dense(self.final(self.walk.branch(), 0), copied)

    def final(self, walk: Walk, index: int) -> Tensor:
        """Final states (N, H) of a text in front of a block, on the device."""
        for later in range(index, len(walk.blocks)):
            walk.advance(later)
        return walk.final_states().to(walk.device)

    def changed(self, name: str) -> Tensor:
        """Final states (N, H) with a matrix changed that was reached before, and perhaps others
        behind it; blocks in front of it give what they gave before.
        """
        walk = self.walk.branch()
        index = self.block_of(name)
        if index is None:
            walk.enter()
            return self.final(walk, 0)
        assert index == self.front, f"the text stands in front of block {self.front}, not {index}"
        return self.final(walk, index)

    def reach(self, name: str) -> None:
        """Go on to the block that a matrix is in, while all matrices are as they were."""
        index = self.block_of(name)
        while index is not None and self.front < index:
            self.walk.advance(self.front)
            self.front += 1

    def block_of(self, name: str) -> int | None:
        """The index of the block that a matrix is in; None for embedding and head."""
        inside = name.startswith(self.prefix)
        return int(name.removeprefix(self.prefix).split(".")[0]) if inside else None

    def divergence(self, name: str) -> float:
        """KL(p || the model as it now is) in nats a token, a matrix being the first changed."""
        head = head_of(self.model).detach().on(self.walk.device)
        final_NH = self.changed(name)
        loss = head_loss(final_NH, head, self.labels_N, self.counted_N, self.target, Mix())
        return max(0.0, float(loss) / len(self.labels_N))


def lies_on(model: Any, grids: Collection[str]) -> list[str]:
    """Those of some grids on which every matrix of the model's middle block lies, as in a teacher
    read from a file of that type.
    """
    inside = f"{blocks_prefix(model)}{len(blocks_of(model)) // 2}."
    block = {name: m.rows for name, m in quantizable(model).items() if name.startswith(inside)}
    return [
        grid
        for grid in grids
        if all(
            _divided(rows, [grid]) and GRIDS[grid].holds(rows, name) for name, rows in block.items()
        )
    ]


def _divided(rows: Tensor, grids: Collection[str]) -> list[str]:
    """The grids whose blocks the rows of a matrix divide into."""
    return [grid for grid in grids if rows.shape[1] % BLOCK[GridName(grid)] == 0]


def _cheapest_lossless(name: str, rows: Tensor, grids: list[str]) -> list[str]:
    """Grids for a matrix, without those that take as many bits as one that it lies on."""
    bits = {grid: GRIDS[grid].bits_per_weight for grid in grids}
    held = [grid for grid in grids if GRIDS[grid].holds(rows, name)]
    best = min(held, key=lambda grid: bits[grid], default=None)
    return [grid for grid in grids if best in (None, grid) or bits[grid] < bits[best]]


def _legal_grids(matrices: dict[str, Any], grids: Collection[str]) -> dict[str, list[str]]:
    """The grids that are tried for each matrix: whose blocks its rows divide into, and that may be
    better than one that it lies on. ValueError, naming the matrix, when there is none.
    """
    legal_grids = {
        name: _cheapest_lossless(name, matrix.rows, _divided(matrix.rows, grids))
        for name, matrix in matrices.items()
    }

    for name, legal in legal_grids.items():
        if not legal:
            raise ValueError(
                f"{name} has rows of {matrices[name].rows.shape[1]}: none of"
                f" {', '.join(grids)} takes them; add q8_0, whose blocks are"
                f" {BLOCK[GridName.q8_0]}"
            )
    return legal_grids


def _together(names: Collection[str], prefix: str, blocks_together: int) -> list[list[str]]:
    """Matrices that are measured at once: those of the same place in so many neighbouring blocks,
    in order of the first of these; embedding and head each alone.
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for name in names:
        index, _, place = name.removeprefix(prefix).partition(".")
        inside = name.startswith(prefix)
        key = (int(index) // blocks_together, place) if inside else (-1, name)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _damage(
    matrices: dict[str, Tensor], grid: str, first: str, text: _Calibration
) -> dict[str, float]:
    """c_ig of matrices (R, C), at once on a grid, rounded on the device: each its share by weights,
    0 where all lie on the grid already. They are put back as they were; `first` is the first that
    may change.
    """
    unrounded = {name: weight.clone() for name, weight in matrices.items()}
    lossless = True
    for name, weight in matrices.items():
        on_device = unrounded[name].to(text.walk.device)
        rounded = GRIDS[grid].decode(*GRIDS[grid].encode(on_device, name))
        lossless &= unmoved(on_device, rounded)
        weight.copy_(rounded)

    lost = 0.0 if lossless else text.divergence(first)
    for name, weight in matrices.items():
        weight.copy_(unrounded[name])
    weights = sum(weight.numel() for weight in matrices.values())
    return {name: lost * (weight.numel() / weights) for name, weight in matrices.items()}


def _measured(
    groups: list[dict[str, Tensor]],
    legal_grids: dict[str, list[str]],
    text: _Calibration,
    kept: Path,
    label: str,
    log: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """c_ig of all matrices; the file `kept` has those of a killed run, and gets each new one."""
    damages: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}

    def lacking(group: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """By grid the matrices that take it, where one of them is not measured on it."""
        takers: dict[str, dict[str, Tensor]] = {}
        for name, weight in group.items():
            for grid in legal_grids[name]:
                takers.setdefault(grid, {})[name] = weight
        return {
            grid: taking
            for grid, taking in takers.items()
            if any(grid not in damages.get(name, {}) for name in taking)
        }

    done = sum(len(group) for group in groups if not lacking(group))
    with progress(label, sum(map(len, groups)), done, log) as update:
        for group in groups:
            if not (left := lacking(group)):
                continue

            # Matrices that are measured at once, on all of their grids, kept at once.
            start = time.monotonic()
            first = next(iter(group))
            text.reach(first)
            worst = 0.0
            for grid, taking in left.items():
                damage = _damage(taking, grid, first, text)
                worst = max(worst, sum(damage.values()))
                for name, lost in damage.items():
                    damages.setdefault(name, {})[grid] = lost
            write_json(kept, damages)

            done += len(group)
            tokens = len(left) * len(text.labels_N)
            update(done, worst, tokens / (time.monotonic() - start))
    return damages


@torch.no_grad()
def options(
    model: Any,
    ids_RL: Tensor,
    grids: Collection[str],
    kept: Path,
    label: str,
    log: Callable[[str], None],
    blocks_together: int = 1,
) -> Options:
    """c_ig, measured on `ids_RL`, and bytes of every matrix of an fp32 model on each grid whose
    blocks its rows divide into. With more `blocks_together` matrices of the same place in so many
    neighbouring blocks are measured at once, and share what they lose by their weights. Where a
    matrix can lie on one grid alone nothing is measured, and its c is 0.

    Damages in the file `kept`, of the same model and text, are not measured again. ValueError,
    naming the matrix, when no grid takes its rows.
    """
    matrices = quantizable(model)
    legal_grids = _legal_grids(matrices, grids)
    choosing = [name for name in matrices if len(legal_grids[name]) > 1]
    groups = [
        {name: matrices[name].rows for name in names}
        for names in _together(choosing, blocks_prefix(model), blocks_together)
    ]
    damages = _measured(groups, legal_grids, _Calibration(model, ids_RL), kept, label, log)

    choices: Options = {}
    for name, matrix in matrices.items():
        weights = matrix.weight.numel()
        choices[name] = {
            grid: (
                damages.get(name, {}).get(grid, 0.0),
                round(weights * GRIDS[grid].bits_per_weight / 8),
            )
            for grid in legal_grids[name]
        }
    return choices


def choose(options: Options, budget_bytes: int) -> dict[str, str]:
    """The grid of every matrix with the least total cost within `budget_bytes`. ValueError, with
    the least possible, when nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    # Whether there is an answer.
    least = sum(min(size for _, size in grids.values()) for grids in options.values())
    if least > budget_bytes:
        raise ValueError(
            f"the matrices take at least {least:,} bytes on the grids given, the budget leaves"
            f" {budget_bytes:,}; raise it or add smaller grids"
        )

    # A 0 or 1 for every pair of matrix and grid: one grid a matrix, all within the budget.
    pairs = [(name, grid) for name, grids in options.items() for grid in grids]
    cost, size = np.array([options[name][grid] for name, grid in pairs], dtype=float).T
    number = {name: i for i, name in enumerate(options)}
    rows = [number[name] for name, _ in pairs]
    once = csr_array((np.ones(len(pairs)), (rows, range(len(pairs)))))
    rules = [LinearConstraint(once, 1, 1), LinearConstraint(size[None], 0, budget_bytes)]

    # The largest cost is 1, the solver's tolerances being absolute.
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
