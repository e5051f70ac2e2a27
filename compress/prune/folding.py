"""Dropped blocks folded into the projection before them. Pure torch, in float64.

ReplaceMe (arXiv 2505.02819, section 3): blocks i+1..j are dropped, and what block i's MLP adds to
the stream is mapped so that it does their work. With M (N, H) what the MLP adds, R (N, H) the
stream besides and Z (N, H) the stream behind block j, T brings M T near to Z - R. Since M = X W^T +
b, the map disappears in the weights:

    T = (M^T M + a I)^-1 (M^T (Z - R) + a I)      W <- T^T W      b <- T^T b

The damping a = damping * mean(diag M^T M) pulls T towards the identity, which is no fold; it is
chosen on tokens that are held out. Left out: the paper's cosine objective, which needs gradients.

Letters: N tokens, H hidden, F inputs of the projection.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compress.prune.compensation import damp

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the last one all but undoes the fold


class LeastSquares:
    """Sums over tokens of what least squares needs: x x^T (F, F), x y^T (F, H) and y . y."""

    def __init__(self) -> None:
        self.gram_FF = torch.zeros((), dtype=torch.float64)
        self.cross_FH = torch.zeros((), dtype=torch.float64)
        self.total = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count inputs (..., F) and targets (..., H)."""
        x_NF = x.detach().flatten(0, -2).double()
        y_NH = y.detach().flatten(0, -2).double()
        self.gram_FF = self.gram_FF + x_NF.T @ x_NF
        self.cross_FH = self.cross_FH + x_NF.T @ y_NH
        self.total += y_NH.square().sum().item()

    def error(self, map_FH: Tensor) -> float:
        """||X T - Y||^2 / ||Y||^2 of a map T."""
        squares = ((self.gram_FF @ map_FH) * map_FH).sum()
        lost = squares - 2 * (self.cross_FH * map_FH).sum() + self.total
        return max(0.0, lost.item()) / max(self.total, 1e-300)

    def solved(self, prior_FH: Tensor, damping: float) -> Tensor:
        """T (F, H) with the least ||X T - Y||^2 + damping * mean(diag X^T X) * ||T - prior||^2."""
        damped_FF = damp(self.gram_FF, damping)
        ridge_FF = damped_FF - self.gram_FF
        return torch.linalg.solve(damped_FF, self.cross_FH + ridge_FF @ prior_FH)


class Fold(NamedTuple):
    """A map (H, H), its damping, and the error that it leaves on held-out tokens beside that of no
    map, each as a share of what the target is in squares.
    """

    map_HH: Tensor
    damping: float
    error: float
    error_without: float


def folded(fit: LeastSquares, held_out: LeastSquares, dampings: Sequence[float] = DAMPINGS) -> Fold:
    """The map fitted to `fit` with the damping that leaves least on `held_out`; the identity where
    none leaves less than that.
    """
    identity_HH = torch.eye(len(fit.gram_FF), dtype=torch.float64, device=fit.gram_FF.device)
    without = held_out.error(identity_HH)
    best = Fold(identity_HH, float("inf"), without, without)
    for damping in dampings:
        map_HH = fit.solved(identity_HH, damping)
        error = held_out.error(map_HH)
        if error < best.error:
            best = Fold(map_HH, damping, error, without)
    return best


@torch.no_grad()
def fold_into(projection: torch.nn.Linear, map_HH: Tensor) -> None:
    """Give a projection the outputs that it had, times the map, in place."""
    turned_HF = map_HH.T @ projection.weight.double()
    projection.weight.copy_(turned_HF)
    if projection.bias is not None:
        projection.bias.copy_(map_HH.T @ projection.bias.double())
