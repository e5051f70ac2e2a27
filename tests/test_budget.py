"""Verdicts by interval, and their sentences."""

from __future__ import annotations

import pytest

from compress.budget import FAIL, INCONCLUSIVE, PASS, failed, judge
from compress.config import Limit
from compress.errors import ConfigError


def verdict(value, limit, interval=None):
    intervals = {"kept": interval} if interval else {}
    return judge({"kept": value} if value is not None else {}, intervals, {"kept": limit}, enforced=True)[0]


@pytest.mark.parametrize(
    ("value", "interval", "limit", "word"),
    [
        (0.9, None, Limit(min=0.8), PASS), (0.7, None, Limit(min=0.8), FAIL), (0.8, None, Limit(min=0.8), PASS), (0.8, None, Limit(max=0.8), PASS),
        (0.9, (0.85, 0.95), Limit(min=0.8), PASS), (0.9, (0.75, 0.95), Limit(min=0.8), INCONCLUSIVE), (0.7, (0.6, 0.79), Limit(min=0.8), FAIL),
        (0.7, (0.6, 0.81), Limit(max=0.8), INCONCLUSIVE), (0.9, (0.81, 0.95), Limit(max=0.8), FAIL), (None, None, Limit(max=0.8), INCONCLUSIVE),
    ],
)  # fmt: skip
def test_a_limit_is_judged_by_the_whole_interval(value, interval, limit, word):
    assert verdict(value, limit, interval)["verdict"] == word


def test_sentences_say_value_interval_and_limit():
    assert (
        verdict(0.9, Limit(min=0.8), (0.75, 0.95))["sentence"]
        == "kept 90.0% (95% interval 75.0% to 95.0%) can't be told from the limit of at least 80.0%"
    )
    size = judge({"size_bytes": 6.1e7}, {}, {"size_bytes": Limit(max=6e7)}, enforced=True)[0]
    assert size["sentence"] == "size_bytes 61.0 MB violates the limit of at most 60.0 MB"


def test_only_enforced_failures_fail_and_strict_counts_inconclusive():
    bad, unsure = verdict(0.1, Limit(min=0.8)), verdict(None, Limit(min=0.8))
    assert failed([bad], strict=False)
    assert not failed([bad | {"enforced": False}], strict=False)
    assert not failed([unsure], strict=False)
    assert failed([unsure], strict=True)


def test_a_limit_needs_exactly_one_bound():
    with pytest.raises(ConfigError, match="exactly one of max and min"):
        Limit()
    with pytest.raises(ConfigError, match="exactly one of max and min"):
        Limit(min=1, max=2)
