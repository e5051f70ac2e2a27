"""Linear layers cut in place, stored as torch stores them (outputs, inputs) or, as GPT-2's, the
other way round.

Letters: R outputs, C inputs, K kept of either.
"""

from typing import Any

import torch
from torch import Tensor, nn


def matrix_of(linear: Any) -> Tensor:
    """(R, C) of a linear layer, the same memory."""
    weight: Tensor = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.T


@torch.no_grad()
def narrow(linear: Any, rows_K: Tensor) -> None:
    """Keep these outputs of a linear layer alone, ascending, in place."""
    assert (rows_K.diff() > 0).all(), "torch-pruning keeps the order that there is"
    if isinstance(linear, nn.Linear):
        # Imported here: where nothing is cut, nothing of it is needed.
        import torch_pruning

        gone = sorted(set(range(linear.out_features)) - set(rows_K.tolist()))
        torch_pruning.prune_linear_out_channels(linear, gone)
        return

    # torch-pruning knows no matrix that is stored the other way round.
    _put(linear, matrix_of(linear)[rows_K])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows_K].contiguous(), requires_grad=False)


def refit(linear: Any, weight_RK: Tensor) -> None:
    """Give a linear layer as many inputs as these weights have, and these weights."""
    _put(linear, weight_RK)


def _put(linear: Any, weight_RC: Tensor) -> None:
    """Another matrix, and the sizes that the layer tells."""
    outputs, inputs = weight_RC.shape
    if isinstance(linear, nn.Linear):
        linear.weight = nn.Parameter(weight_RC.contiguous(), requires_grad=False)
        linear.out_features, linear.in_features = outputs, inputs
    else:
        linear.weight = nn.Parameter(weight_RC.T.contiguous(), requires_grad=False)
        linear.nf, linear.nx = outputs, inputs
