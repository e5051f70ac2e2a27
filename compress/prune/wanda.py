"""Unstructured and n:m sparsity after Wanda (arXiv 2306.11695, section 3): a weight is worth its
size times the norm of the input that it multiplies,

    S_ij = |W_ij| * ||X_j||_2

and of every output row the least worthy go, or of every m weights beside each other all but n.
Weights that stay are not changed. Blocks are thinned in order, each on what the thinned ones before
it send. It is a baseline: file formats and dense runtimes hold a zero like any other number.

Letters: N tokens, R rows (outputs), C columns (inputs).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.models.walk import Walk
from compress.prune.linears import matrix_of


def kept_weights(worth_RC: Tensor, zeros_fraction: float, n: int = 0, m: int = 0) -> Tensor:
    """Which weights stay (R, C) bool: all but the `zeros_fraction` least worthy of each row, or,
    with `m`, the `n` worthiest of every `m` columns. Ties go to the earlier column.
    """
    rows, columns = worth_RC.shape
    groups = worth_RC.view(rows, -1, m) if m else worth_RC.view(rows, 1, columns)
    size = groups.shape[-1]
    zeros = m - n if m else round(zeros_fraction * size)

    # The least worthy of each group, by their places.
    order = groups.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(-1, order[..., : size - zeros], True)
    return kept.view(rows, columns)


class _Squares:
    """Sum of squares of each input channel (C,)."""

    def __init__(self) -> None:
        self.sum_C = torch.zeros((), dtype=torch.float64)

    def add(self, x_BLC: Tensor) -> None:
        """Count inputs (..., C)."""
        x_NC = x_BLC.detach().flatten(0, -2).float()
        self.sum_C = self.sum_C + x_NC.square().sum(0).double()


@torch.no_grad()
def thin_blocks(walk: Walk, keep: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Set to zero, in every linear layer of every block, what `keep` does not keep of the worth of
    its weights; how many are zero, of how many.
    """
    zeros = weights = 0
    walk.task = "thinned"
    for index, block in enumerate(walk.blocks):
        layers: dict[str, Any] = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        squares = {name: _Squares() for name in layers}
        walk.inputs(index, {name: squares[name].add for name in layers})

        # A layer whose weight is taken past its own forward has heard nothing, and stays.
        for name, layer in layers.items():
            if squares[name].sum_C.dim() == 0:
                continue
            weight_RC = matrix_of(layer)
            norm_C = squares[name].sum_C.sqrt().to(weight_RC.device)
            kept_RC = keep(weight_RC.abs() * norm_C)
            weight_RC.mul_(kept_RC)
            zeros += int((~kept_RC).sum())
            weights += kept_RC.numel()
        walk.advance(index)
    return zeros, weights
