"""GPTQ against Optimal Brain Quantization written naively in float64, one inverse a column."""

from __future__ import annotations

import pytest
import torch

from compress.quant.gptq import gptq
from compress.quant.grids import GRIDS

DAMPING = 0.01


def _problem(
    rows: int = 6, columns: int = 64, tokens: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (R, C) and the Gram matrix (C, C) of inputs whose channels hang together."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return 0.05 * torch.randn(rows, columns, generator=generator), x.T @ x


def _oracle(w: torch.Tensor, gram: torch.Tensor, grid) -> torch.Tensor:
    """The values OBQ gives in the order of columns: w_F -= (w_j - q_j) / [H_F^-1]_00 *
    [H_F^-1]_0:, F what is left (arXiv 2208.11580, eq. 2).
    """
    w, h, values = w.double().clone(), gram.double(), torch.zeros_like(w, dtype=torch.float64)
    h = h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    for j in range(w.shape[1]):
        if j % grid.block == 0:
            scales = grid.encode(w[:, j : j + grid.block].float())[1]
            stored = scales.view(len(w), grid.stored).double()
        floor = stored[:, 1] if grid.stored == 2 else 0.0
        q = torch.round((w[:, j] - floor) / stored[:, 0]).clamp(grid.low, grid.high)
        values[:, j] = q * stored[:, 0] + floor
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= torch.outer((w[:, j] - values[:, j]) / inverse[0, 0], inverse[0])
    return values


def _error(w: torch.Tensor, values: torch.Tensor, gram: torch.Tensor) -> float:
    gap = (w - values).double()
    return ((gap @ gram.double()) * gap).sum().item()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q8_0"])
def test_values_equal_the_oracle_and_lose_less_output_than_rounding(name):
    w, gram = _problem()
    grid = GRIDS[name]
    made = grid.decode(*gptq(w, gram, grid, DAMPING))
    torch.testing.assert_close(made.double(), _oracle(w, gram, grid), rtol=1e-6, atol=1e-6)
    assert _error(w, made, gram) < 0.7 * _error(w, grid.decode(*grid.encode(w)), gram)


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_gets_codes_it_can_hold_and_less_output_error(name):
    grid = GRIDS[name]
    w, gram = _problem(columns=2 * (grid.row or grid.block or 32), tokens=1000)
    codes, scales = gptq(w, gram, grid, DAMPING)
    plain, plain_scales = grid.encode(w)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (
        plain.dtype,
        plain.shape,
        plain_scales.dtype,
        plain_scales.shape,
    )
    legal = (
        (0, 15)
        if name in ("iq4_nl", "mxfp4", "nvfp4")
        else (grid.low + grid.offset, grid.high + grid.offset)
    )
    assert codes.min() >= legal[0] and codes.max() <= legal[1]
    assert _error(w, grid.decode(codes, scales), gram) < 0.8 * _error(
        w, grid.decode(plain, plain_scales), gram
    )


def test_searched_scales_lose_still_less():
    w, gram = _problem(rows=64)
    grid = GRIDS["q4_0"]
    losses = [
        _error(w, grid.decode(*gptq(w, gram, grid, DAMPING, search)), gram)
        for search in (False, True)
    ]
    assert losses[1] < 0.97 * losses[0]


def test_inputs_without_correlation_leave_plain_nearest_codes():
    w, grid = _problem()[0], GRIDS["q4_0"]
    codes, scales = gptq(w, torch.eye(64), grid, DAMPING)
    assert torch.equal(scales, grid.encode(w)[1]) and torch.equal(codes, grid.codes(w, scales))


def test_a_channel_that_is_always_zero_is_no_obstacle():
    w, gram = _problem()
    gram[3] = gram[:, 3] = 0
    made = GRIDS["q4_0"].decode(*gptq(w, gram, GRIDS["q4_0"], DAMPING))
    assert made.isfinite().all()


def test_what_has_no_factor_is_refused_by_name():
    w, gram = _problem()
    with pytest.raises(
        ValueError,
        match=(
            r"up_proj: the second moments .* no Cholesky factor with ptq.damping=0.01; use 0.01 or"
            r" more"
        ),
    ):
        gptq(w, -gram - 100 * torch.eye(64), GRIDS["q4_0"], DAMPING, name="up_proj")
    gram[0, 0] = torch.nan
    with pytest.raises(ValueError, match="up_proj"):
        gptq(w, gram, GRIDS["q4_0"], DAMPING, name="up_proj")
