"""Folding against slow, obvious least squares in float64."""

from __future__ import annotations

import pytest
import torch

from compress.prune.folding import LeastSquares, fitted


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _sums(x_NF: torch.Tensor, y_NH: torch.Tensor) -> LeastSquares:
    """Counted in two goes, as rows come."""
    sums = LeastSquares()
    for part in (slice(None, 5), slice(5, None)):
        sums.add(x_NF[part], y_NH[part])
    return sums


def _oracle(x_NF, y_NH, old_HF, damping) -> torch.Tensor:
    """Least squares with a row below X for every weight that is pulled to its old value."""
    pull = damping * x_NF.square().sum(0).mean()
    below_FF = pull.sqrt() * torch.eye(x_NF.shape[1], dtype=torch.float64)
    rows = torch.cat([x_NF, below_FF])
    return torch.linalg.lstsq(rows, torch.cat([y_NH, below_FF @ old_HF.T])).solution.T


def test_the_solution_equals_lstsq_with_rows_that_pull_to_the_old_weights():
    x_NF, y_NH, old_HF = _random(50, 6), _random(50, 4, seed=1), _random(4, 6, seed=2)
    sums, expected_HF = _sums(x_NF, y_NH), _oracle(x_NF, y_NH, old_HF, 0.3)
    torch.testing.assert_close(sums.solved(old_HF, 0.3), expected_HF)
    lost = (x_NF @ expected_HF.T - y_NH).square().sum() / y_NH.square().sum()
    assert sums.error(expected_HF) == pytest.approx(lost.item())
    strong_HF = sums.solved(old_HF, 1e9)
    torch.testing.assert_close(strong_HF, old_HF, rtol=1e-6, atol=1e-6)


def test_the_damping_leaves_least_on_held_out_tokens_and_the_fit_is_then_of_all():
    """A few noisy tokens are fitted nearly exactly, and others badly."""
    truth_HF = _random(4, 8)
    x_NF, noise_NH = _random(60, 8, seed=1), _random(60, 4, seed=2)
    y_NH = x_NF @ truth_HF.T + noise_NH
    old_HF = truth_HF + 0.5 * _random(4, 8, seed=3)
    fit, held_out = _sums(x_NF[:14], y_NH[:14]), _sums(x_NF[14:], y_NH[14:])
    dampings = (1e-6, 1e-2, 1e-1, 1.0, 1e3)

    errors = {}
    for damping in dampings:
        gap_NH = x_NF[14:] @ _oracle(x_NF[:14], y_NH[:14], old_HF, damping).T - y_NH[14:]
        errors[damping] = (gap_NH.square().sum() / y_NH[14:].square().sum()).item()
    best = min(errors, key=errors.__getitem__)
    new = fitted(fit, held_out, old_HF, dampings)
    assert best not in (1e-6, 1e3) and new.damping == best
    assert new.error == pytest.approx(errors[best]) and new.error < new.error_before
    torch.testing.assert_close(new.weight_HF, _oracle(x_NF, y_NH, old_HF, best))


def test_the_old_weights_stay_where_no_damping_helps():
    x_NF, old_HF = _random(40, 5), _random(3, 5, seed=1)
    held_out = _sums(x_NF, x_NF @ old_HF.T)
    new = fitted(_sums(x_NF[:12], _random(12, 3, seed=3)), held_out, old_HF)
    assert torch.equal(new.weight_HF, old_HF)
    assert new.damping is None and new.error == new.error_before < 1e-12
