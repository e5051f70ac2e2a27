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
        with pytest.raises(
            ValueError,
            match=f"weight holds a value beyond .*: its scales on {grid.name} do not reach it",
        ):
            grid.check(weight)


@pytest.mark.parametrize("name", [name for name in GRIDS if name.startswith("int4_asym")])
def test_fifteen_steps_of_an_asymmetric_group_span_its_range_and_zero(name):
    grid = GRIDS[name]
    for low, high in ((-1.0, 2.0), (0.5, 3.0), (-4.0, -1.0)):
        weight = torch.linspace(low, high, grid.block)[None]
        codes, scales = grid.encode(weight)
        step, zero = scales[0].double().tolist()
        assert 15 * step == pytest.approx(max(high, 0.0) - min(low, 0.0), rel=1e-3)
        assert zero == round(-8 - min(low, 0.0) / step)
        assert (
            float((grid.decode(codes, scales) - weight).abs().max()) <= step
        )  # half a step, and half of one that zero is rounded by
