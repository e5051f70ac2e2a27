"""Quantiles of the beta and Student's t distribution, and a binomial's tail: what the intervals of
scores need.

scipy has them, and takes 143 MB where a deployment team installs what a bundle is accepted with, so
they are here, and everywhere: scores are the same with scipy and without. Tests compare them with
scipy's (tests/score/test_quantiles.py).

    I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) * 1 / (1 + d_1 / (1 + d_2 / (1 + ...)))

the regularized incomplete beta function as a continued fraction (DLMF 8.17.22), which converges
fast below x = (a + 1) / (a + b + 2); above it I_x(a, b) = 1 - I_{1-x}(b, a). The quantile is found
by halving. Of t with n degrees of freedom P(|T| > t) = I_x(n/2, 1/2) at x = n / (n + t^2).
"""

import math
from functools import lru_cache

TINY = 1e-300  # in place of a zero in a denominator
TERMS = 100_000
HALVINGS = 1_100  # until a float can be halved no more: the smallest are 2^-1074


def beta_below(x: float, a: float, b: float) -> float:
    """I_x(a, b): the probability that a Beta(a, b) is below `x`, for positive a and b."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beta_below(1.0 - x, b, a)

    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta)
    return front / a / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d_1 / (1 + d_2 / (1 + ...)), by Lentz's method."""
    value = 1.0
    upper, lower = 1.0, 0.0
    for m in range(1, TERMS):
        half = m // 2
        if m % 2:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))

        lower = 1.0 / (1.0 + term * lower or TINY)
        upper = 1.0 + term / upper or TINY
        change = upper * lower
        value *= change
        if abs(change - 1.0) < 1e-16:
            break
    return value


@lru_cache(maxsize=4096)
def beta_quantile(p: float, a: float, b: float) -> float:
    """The x below which a Beta(a, b) lies with probability `p`, to the last bits of a float."""
    # Near 1 floats are coarse: a quantile that lies there is looked for from the other end.
    if p > beta_below(0.5, a, b):
        return 1.0 - _from_below(1.0 - p, b, a)
    return _from_below(p, a, b)


def _from_below(p: float, a: float, b: float) -> float:
    """The quantile, where it is at most a half."""
    low, high = 0.0, 0.5
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if beta_below(middle, a, b) < p else (low, middle)
    return high


def jeffreys(right: float, n: float, p: float) -> float:
    """The `p` quantile of Beta(right + 1/2, n - right + 1/2)."""
    return beta_quantile(p, right + 0.5, n - right + 0.5)


def jeffreys_interval(count: int, n: int) -> tuple[float, float]:
    """Jeffreys' interval of a share, 95%, which always holds the share itself."""
    low = 0.0 if count == 0 else jeffreys(count, n, 0.025)
    return low, 1.0 if count == n else jeffreys(count, n, 0.975)


def t_quantile(p: float, freedom: float) -> float:
    """The t below which Student's t with `freedom` degrees lies with probability `p` >= 1/2."""
    assert 0.5 <= p < 1.0, p

    # Where t is small x is near 1: its distance from 1 is what is looked for.
    rest = beta_quantile(2 * p - 1, 0.5, freedom / 2)
    return math.sqrt(freedom * rest / (1.0 - rest))


def half_binomial_below(k: int, n: int) -> float:
    """The probability that of `n` throws of a coin at most `k` show heads, exactly rounded."""
    ways = total = 1
    for i in range(k):
        ways = ways * (n - i) // (i + 1)
        total += ways
    return total / 2**n
