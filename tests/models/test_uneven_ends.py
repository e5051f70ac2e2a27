"""The search of IQ4_NL's scale tries the largest weight of a block at both ends of the sixteen
numbers, which are not mirror images.
"""

from __future__ import annotations

import pytest
import torch

from compress.quant.grids import GRIDS
from compress.quant.grids.nonlinear import NUMBERS


@pytest.mark.parametrize("left_out", [NUMBERS[0], NUMBERS[-1]])
@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_a_block_that_lies_on_the_numbers_is_found_whichever_end_it_reaches(left_out, scale):
    inside = [n for n in NUMBERS if n != left_out]
    w = scale * torch.tensor((inside * 3)[:32], dtype=torch.float32)[None]
    grid = GRIDS["iq4_nl"]
    scales = grid.search(w)
    assert torch.equal(grid.decode(grid.codes(w, scales), scales), w)


def test_searched_scales_are_as_good_as_a_fit_at_either_end():
    g = torch.Generator().manual_seed(5)
    w, h = torch.randn(400, 32, generator=g), torch.rand(400, 32, generator=g) ** 4
    grid, numbers = GRIDS["iq4_nl"], torch.tensor(NUMBERS).double()
    scales = grid.search(w, h)
    got = (h * (grid.decode(grid.codes(w, scales), scales) - w).square()).sum(1).double()
    x, peak = w.double(), w.double().gather(1, w.abs().argmax(1, keepdim=True))
    for end in (NUMBERS[0], NUMBERS[-1]):
        q = numbers[(x * (end / peak))[..., None].sub(numbers).abs().argmin(-1)]
        fitted = (h * x * q).sum(1, keepdim=True) / (h * q * q).sum(1, keepdim=True)
        assert (got <= 1.01 * (h * (x - fitted * q).square()).sum(1)).all()
