"""Dropped blocks folded into the projection in front of them, in closed form and float64.

Blocks i+1..j are dropped. With X (N, F) the inputs of block i's down projection W, b its bias, R
(N, H) the stream besides what that projection adds, and Z (N, H) the parent's stream behind block
j, W is fitted to do the work of all of them:

    W* = argmin ||X W^T - ((Z - R) / c - b)||^2 + a ||W - W_old||^2
       = (((Z - R) / c - b)^T X + a W_old) (X^T X + a I)^-1

with c the factor of what a block adds, 1 in most families.

ReplaceMe (arXiv 2505.02819, section 3) fits the same target by a map T of what the MLP adds and
multiplies it in, W <- T^T W. All W that it can reach are among those here, which have F / H times
the parameters. X and R come from what the blocks already folded send, so that a fold also makes up
for those before it. The pull a = damping * mean(diag X^T X) is chosen on held-out rows. KL of the
embedded teacher without 10 of 30 blocks, by influence, on 4 held-out conversations and 4 topics:

    not folded                                                1.86, 1.45
    by T, 48 sequences, X and R of the parent                 0.97, 0.93
    by T, X and R of the folded blocks, Z of those and the dropped  0.92, 0.89
    by W, likewise                                            0.76, 0.74
    by W, Z of the parent: as here                            0.77, 0.71
    by W, likewise, and every other block fitted too          0.76, 0.70

Left out: the last of them, which takes six times as long; the paper's cosine objective, which needs
gradients.

Letters: B sequences, L tokens of one, N tokens, H hidden, F inputs of the projection.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.models.blocks import Row
from compress.models.walk import Walk
from compress.prune.compensation import damp, solved
from compress.prune.linears import matrix_of
from compress.prune.shape import HELD_OUT

DAMPINGS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)  # the last one all but leaves W as it is


class LeastSquares:
    """Sums over tokens of what least squares needs: x x^T (F, F), x y^T (F, H) and y . y."""

    def __init__(self) -> None:
        self.gram_FF = torch.zeros((), dtype=torch.float64)
        self.cross_FH = torch.zeros((), dtype=torch.float64)
        self.total = 0.0

    def add(self, x_NF: Tensor, y_NH: Tensor) -> None:
        """Count inputs and targets."""
        x_NF, y_NH = x_NF.double(), y_NH.double()
        self.gram_FF = self.gram_FF + x_NF.T @ x_NF
        self.cross_FH = self.cross_FH + x_NF.T @ y_NH
        self.total += y_NH.square().sum().item()

    def with_others(self, others: "LeastSquares") -> "LeastSquares":
        """The sums over the tokens of both."""
        both = LeastSquares()
        both.gram_FF = self.gram_FF + others.gram_FF
        both.cross_FH = self.cross_FH + others.cross_FH
        both.total = self.total + others.total
        return both

    def error(self, weight_HF: Tensor) -> float:
        """||X W^T - Y||^2 / ||Y||^2."""
        weight_FH = weight_HF.double().T
        squares = ((self.gram_FF @ weight_FH) * weight_FH).sum()
        lost = squares - 2 * (self.cross_FH * weight_FH).sum() + self.total
        return max(0.0, lost.item()) / max(self.total, 1e-300)

    def solved(self, old_HF: Tensor, damping: float) -> Tensor:
        """W (H, F) with the least ||X W^T - Y||^2 + damping * mean(diag X^T X) * ||W - old||^2."""
        damped_FF = damp(self.gram_FF, damping)
        pull_FF = damped_FF - self.gram_FF
        return solved(damped_FF, self.cross_FH + pull_FF @ old_HF.double().T).T


class Fitted(NamedTuple):
    """Weights (H, F) in float64, the damping that made them (None: the old ones), and the error on
    held-out rows beside that of the old weights, as shares of the target's squares.
    """

    weight_HF: Tensor
    damping: float | None
    error: float
    error_before: float


def fitted(
    fit: LeastSquares,
    held_out: LeastSquares,
    old_HF: Tensor,
    dampings: Sequence[float] = DAMPINGS,
) -> Fitted:
    """The weights of all tokens with the damping whose fit to `fit` leaves least on `held_out`; the
    old ones where none leaves less than they do.
    """
    before = held_out.error(old_HF)
    errors = {damping: held_out.error(fit.solved(old_HF, damping)) for damping in dampings}
    damping = min(errors, key=errors.__getitem__)
    if errors[damping] >= before:
        return Fitted(old_HF.double(), None, before, before)
    weight_HF = fit.with_others(held_out).solved(old_HF, damping)
    return Fitted(weight_HF, damping, errors[damping], before)


class Fold(NamedTuple):
    """A block, the dropped ones behind it that it now stands for, and how well it does."""

    block: int
    dropped: list[int]
    damping: float | None
    error: float
    error_before: float


@torch.no_grad()
def fold_dropped(walk: Walk, row: Row, dropped: set[int]) -> list[Fold]:
    """Fold every run of dropped blocks into the one in front of it, in place, as the text comes
    there. Blocks at the front have none in front of them, and are not folded.
    """
    kept = [index for index in range(len(walk.blocks)) if index not in dropped]
    walk.pace.steps = walk.pace.done + len(kept)
    walk.task = "folded"
    parent = walk.branch()
    passed = 0
    folds = []
    for index, behind in zip(kept, [*kept[1:], len(walk.blocks)], strict=True):
        # The parent passes all blocks, each as it was.
        for block in range(passed, behind):
            parent.advance(block)
        passed = behind

        run = list(range(index + 1, behind))
        if run:
            folds.append(fold_run(walk, parent, row, index, run))
        else:
            walk.advance(index)
    return folds


def fold_run(walk: Walk, parent: Walk, row: Row, index: int, run: list[int]) -> Fold:
    """Fit one block's down projection to the parent's stream behind the run; the text then stands
    where the fitted one sends it.
    """
    down: Any = walk.blocks[index].get_submodule(row.down)
    scale = float(getattr(walk.model.config, row.residual_key)) if row.residual_key else 1.0

    # Inputs of the projection and what it adds, and the stream behind it.
    entering: list[Tensor] = []
    added: list[Tensor] = []
    walk.inputs(index, {row.down: lambda x_BLF: entering.append(x_BLF.float())})
    walk.outputs(index, {row.down: lambda m_BLH: added.append(scale * m_BLH.float())})
    old_HF = matrix_of(down).clone()
    walk.advance(index)

    # Row by row, some of them held out.
    fit, held_out = LeastSquares(), LeastSquares()
    passed = 0
    rest: list[Tensor] = []
    for x_BLF, m_BLH, h_BLH, z_BLH in zip(entering, added, walk.states, parent.states, strict=True):
        rest.append(h_BLH - m_BLH.to(h_BLH.device))
        target_BLH = (z_BLH - rest[-1]) / scale
        if down.bias is not None:
            target_BLH = target_BLH - down.bias
        for x_LF, target_LH in zip(x_BLF, target_BLH, strict=True):
            passed += 1
            moments = fit if passed % HELD_OUT else held_out
            moments.add(x_LF, target_LH.to(x_LF.device))

    # The projection, and the stream behind it.
    new = fitted(fit, held_out, old_HF.to(fit.gram_FF.device))
    weight_HF = new.weight_HF.to(old_HF.dtype)
    matrix_of(down).copy_(weight_HF)
    for at, (x_BLF, rest_BLH) in enumerate(zip(entering, rest, strict=True)):
        given_BLH = scale * (x_BLF @ weight_HF.to(x_BLF.device).T)
        walk.states[at] = rest_BLH + given_BLH.to(rest_BLH.device)
        if down.bias is not None:
            walk.states[at] += scale * down.bias
    return Fold(index, run, new.damping, new.error, new.error_before)
