"""Folding against slow, obvious least squares in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.prune.folding import LeastSquares, fold_into, folded


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _moments(x_NF: torch.Tensor, y_NH: torch.Tensor) -> LeastSquares:
    """Counted in two goes, as a walk over rows does."""
    moments = LeastSquares()
    moments.add(x_NF[:10].view(2, 5, -1), y_NH[:10].view(2, 5, -1))
    moments.add(x_NF[10:], y_NH[10:])
    return moments


def test_the_solution_equals_lstsq_with_rows_that_pull_to_the_prior():
    x_NF, y_NH, prior_FH = _random(50, 6), _random(50, 4, seed=1), _random(6, 4, seed=2)
    ridge = 0.3 * x_NF.square().sum(0).mean()
    below_FF = ridge.sqrt() * torch.eye(6, dtype=torch.float64)
    expected_FH = torch.linalg.lstsq(
        torch.cat([x_NF, below_FF]), torch.cat([y_NH, below_FF @ prior_FH])
    ).solution
    moments = _moments(x_NF, y_NH)
    torch.testing.assert_close(moments.solved(prior_FH, 0.3), expected_FH)
    lost = (x_NF @ expected_FH - y_NH).square().sum() / y_NH.square().sum()
    assert moments.error(expected_FH) == pytest.approx(lost.item())


def test_strong_damping_leaves_the_prior():
    x_NF, prior_FH = _random(50, 6), _random(6, 4, seed=2)
    solved_FH = _moments(x_NF, _random(50, 4)).solved(prior_FH, 1e9)
    torch.testing.assert_close(solved_FH, prior_FH, rtol=1e-6, atol=1e-6)


def test_the_damping_is_the_one_that_leaves_least_on_tokens_that_are_held_out():
    """Ten tokens of fifty are fitted nearly exactly; a new one is not."""
    truth_HH = torch.eye(8, dtype=torch.float64) + 0.3 * _random(8, 8)
    x_NF, noise_NH = _random(60, 8, seed=1), 0.5 * _random(60, 8, seed=2)
    y_NH = x_NF @ truth_HH + noise_NH
    fit, held_out = _moments(x_NF[:12], y_NH[:12]), _moments(x_NF[12:], y_NH[12:])
    dampings = (1e-6, 1e-2, 1e-1, 1.0, 1e3)
    eye_HH = torch.eye(8, dtype=torch.float64)
    errors = {a: held_out.error(fit.solved(eye_HH, a)) for a in dampings}
    best = min(errors, key=errors.__getitem__)
    fold = folded(fit, held_out, dampings)
    assert best not in (1e-6, 1e3) and fold.damping == best
    assert fold.error == errors[best] < fold.error_without == held_out.error(eye_HH)


def test_no_map_is_kept_where_none_helps():
    x_NH = _random(40, 5)
    fold = folded(_moments(x_NH[:12], _random(12, 5, seed=3)), _moments(x_NH, x_NH))
    assert torch.equal(fold.map_HH, torch.eye(5, dtype=torch.float64))
    assert fold.damping == float("inf") and fold.error == fold.error_without < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_the_map_disappears_in_the_weights(bias):
    projection = nn.Linear(6, 4, bias=bias, dtype=torch.float64)
    x_NF, map_HH = _random(9, 6), _random(4, 4, seed=1)
    expected_NH = projection(x_NF).detach() @ map_HH
    fold_into(projection, map_HH)
    torch.testing.assert_close(projection(x_NF), expected_NH)


def test_a_linear_gap_is_folded_exactly():
    """What follows M is linear, Z = R + M A: the map is A, up to the damping."""
    m_NH, rest_NH, gap_HH = _random(80, 5), _random(80, 5, seed=1), _random(5, 5, seed=2)
    z_NH = rest_NH + m_NH @ gap_HH
    fold = folded(
        _moments(m_NH[:60], (z_NH - rest_NH)[:60]), _moments(m_NH[60:], (z_NH - rest_NH)[60:])
    )
    torch.testing.assert_close(fold.map_HH, gap_HH, rtol=1e-3, atol=1e-3)
    assert fold.damping == 1e-4 and fold.error < 1e-6
