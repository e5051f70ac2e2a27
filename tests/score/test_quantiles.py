"""Our quantiles beside scipy's, and what must hold of any."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from compress.score.quantiles import (
    beta_below,
    beta_quantile,
    half_binomial_below,
    jeffreys,
    t_quantile,
)

COUNTS = [
    (0, 1),
    (0, 20),
    (1, 20),
    (10, 20),
    (19, 20),
    (20, 20),
    (122, 240),
    (3, 5000),
    (999, 1000),
]


@pytest.mark.parametrize(("right", "n"), COUNTS)
@pytest.mark.parametrize("p", [1e-6, 0.025, 0.5, 0.975, 1 - 1e-6])
def test_the_quantiles_of_shares_are_scipys(right, n, p):
    expected = stats.beta.ppf(p, right + 0.5, n - right + 0.5)
    assert jeffreys(right, n, p) == pytest.approx(expected, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 255, 10_000])
@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.995])
def test_the_quantiles_of_t_are_scipys(freedom, p):
    assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-10)


def test_below_and_quantile_undo_each_other():
    shapes = [0.5, 1.0, 3.5, 40.0, 700.5]
    for a, b in itertools.product(shapes, shapes):
        for p in (0.001, 0.3, 0.999):
            assert beta_below(beta_quantile(p, a, b), a, b) == pytest.approx(p, rel=1e-9)
        for x in np.linspace(0, 1, 9):
            assert beta_below(x, a, b) == pytest.approx(stats.beta.cdf(x, a, b), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (0, 1), (3, 9), (40, 100), (1000, 2100), (0, 2000)])
def test_the_tail_of_throws_is_scipys(k, n):
    assert half_binomial_below(k, n) == pytest.approx(stats.binom.cdf(k, n, 0.5), rel=1e-10)
