"""Where a grid's fp16 numbers end: a weight just within is taken, one just beyond is refused."""

from __future__ import annotations

import pytest
import torch

from compress.quant.grids import GRIDS


@pytest.mark.parametrize("name", GRIDS)
def test_the_largest_weight_is_taken_and_a_larger_one_refused(name):
    grid = GRIDS[name]
    weight = torch.zeros(1, 256)
    for sign in (1, -1):
        weight[0, 7] = sign * grid.largest * 0.999
        grid.check(weight)
        weight[0, 7] = sign * grid.largest * 1.001
        with pytest.raises(ValueError, match=f"weight holds a value beyond .*: {grid.name} stores its scale as fp16"):
            grid.check(weight)
