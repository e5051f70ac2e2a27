"""Verdicts by interval, and their sentences."""

from __future__ import annotations

import pytest

from compress.budget import FAIL, INCONCLUSIVE, PASS, Budget, Limit, failed, judge
from compress.errors import ConfigError
from compress.score.settings import Eval


def verdict(value, limit, interval=None):
    intervals = {"kept": interval} if interval else {}
    return judge(
        {"kept": value} if value is not None else {}, intervals, {"kept": limit}, enforced=True
    )[0]


@pytest.mark.parametrize(
    ("value", "interval", "limit", "word"),
    [
        (0.9, None, Limit(min=0.8), PASS),
        (0.7, None, Limit(min=0.8), FAIL),
        (0.8, None, Limit(min=0.8), PASS),
        (0.8, None, Limit(max=0.8), PASS),
        (0.9, (0.85, 0.95), Limit(min=0.8), PASS),
        (0.9, (0.75, 0.95), Limit(min=0.8), INCONCLUSIVE),
        (0.7, (0.6, 0.79), Limit(min=0.8), FAIL),
        (0.7, (0.6, 0.81), Limit(max=0.8), INCONCLUSIVE),
        (0.9, (0.81, 0.95), Limit(max=0.8), FAIL),
        (None, None, Limit(max=0.8), INCONCLUSIVE),
    ],
)
def test_a_limit_is_judged_by_the_whole_interval(value, interval, limit, word):
    assert verdict(value, limit, interval)["verdict"] == word


def test_sentences_say_value_interval_and_limit():
    relation = (
        "can't be told from the limit of at least 80.0%; about 4.0 times as many measurements would"
        " decide"
    )
    assert (
        verdict(0.9, Limit(min=0.8), (0.7, 0.95))["sentence"]
        == f"kept 90.0% (95% interval 70.0% to 95.0%) {relation}"
    )
    size = judge({"size_bytes": 6.1e7}, {}, {"size_bytes": Limit(max=6e7)}, enforced=True)[0]
    assert size["sentence"] == "size_bytes 61.0 MB violates the limit of at most 60.0 MB"


@pytest.mark.parametrize(
    ("metric", "value", "interval", "limit", "scores", "end"),
    [
        # 0.90 - 0.80 = 0.10 away, 0.15 to the end on that side: 1.5^2 = 2.25 times the 200 items
        (
            "kept",
            0.9,
            (0.75, 0.95),
            Limit(min=0.8),
            {"acc/a": 0, "acc/b": 0, "n/a": 150, "n/b": 50, "n/x": 9},
            "; about 250 more items would decide",
        ),
        (
            "acc/b",
            0.9,
            (0.75, 0.95),
            Limit(min=0.8),
            {"n/a": 150, "n/b": 48},
            "; about 60 more items would decide",
        ),
        # on the other side of the limit the other end counts: 0.02 away, 0.03 to the end
        (
            "points_lost",
            0.04,
            (0.01, 0.09),
            Limit(max=0.02),
            {"acc/a": 0, "n/a": 400},
            "; about 500 more items would decide",
        ),
        (
            "kl_to_teacher",
            0.5,
            (0.3, 0.7),
            Limit(max=0.6),
            {"heldout_rows": 4},
            "; about 12 more held-out rows would decide",
        ),
        (
            "latency_ms_p50",
            9.0,
            (7.0, 11.0),
            Limit(max=10.0),
            {},
            "; about 4.0 times as many measurements would decide",
        ),
        (
            "flips",
            0.1,
            (0.05, 0.16),
            Limit(max=0.1),
            {"acc/a": 0, "n/a": 10},
            "; no number would decide while the value is the limit itself",
        ),
    ],
)
def test_inconclusive_says_how_much_more_would_decide(metric, value, interval, limit, scores, end):
    found = judge(scores | {metric: value}, {metric: interval}, {metric: limit}, enforced=True)[0]
    assert found["verdict"] == INCONCLUSIVE and found["sentence"].endswith(end), found["sentence"]


def test_the_number_that_would_decide_does_decide():
    """0.10 away from the limit with 200 items and a half width of 0.15; 250 more were asked for."""
    for n, word in ((200, INCONCLUSIVE), (200 + 250, PASS)):
        half = 0.15 * (200 / n) ** 0.5
        scores = {"kept": 0.9, "acc/a": 0.5, "n/a": n}
        assert (
            judge(
                scores,
                {"kept": (0.9 - half, 0.9 + half)},
                {"kept": Limit(min=0.8 - 1e-9)},
                enforced=True,
            )[0]["verdict"]
            == word
        )


def test_loses_at_most_two_points_is_a_sentence():
    found = judge(
        {"points_lost": 0.004},
        {"points_lost": (-0.01, 0.018)},
        {"points_lost": Limit(max=0.02)},
        enforced=True,
    )[0]
    assert (
        found["sentence"]
        == "points_lost 0.4 points (95% interval -1.0 points to 1.8 points) is within the limit of"
        " at most 2.0 points"
    )


def test_only_enforced_failures_fail_and_strict_counts_inconclusive():
    bad, unsure = verdict(0.1, Limit(min=0.8)), verdict(None, Limit(min=0.8))
    assert failed([bad], strict=False)
    assert not failed([bad | {"enforced": False}], strict=False)
    assert not failed([unsure], strict=False)
    assert failed([unsure], strict=True)


@pytest.mark.parametrize(
    ("limits", "settings", "message"),
    [
        (
            {"point_lost": Limit(max=0.1)},
            {},
            "'point_lost' is no metric; did you mean 'points_lost'",
        ),
        (
            {"points_lost/facts": Limit(max=2)},
            {"tasks": ["facts"]},
            "'points_lost/facts' is 2, a share of all items; two points are 0.02",
        ),
        (
            {"kept/grammr": Limit(min=0.5)},
            {"tasks": ["facts", "grammar"]},
            "on a task that eval.tasks does not name; did you mean 'grammar'",
        ),
        (
            {"kl_to_teacher/topic": Limit(max=1)},
            {},
            "on a text that data.heldout does not name; did you mean 'topics'",
        ),
        (
            {"open/kept": Limit(min=0.8)},
            {"open_prompts": []},
            "is on open answers, and eval.open_prompts is empty",
        ),
        (
            {"peak_rss_bytes/2048": Limit(max=1e9)},
            {"context_lengths": [1024]},
            r"a length that is not measured; set eval.context_lengths=\[1024, 2048\]",
        ),
        (
            {"ttft_ms_p50/64": Limit(max=90)},
            {},
            r"a length that is not measured; set eval.prompt_lengths=\[64\]",
        ),
        (
            {"peak_rss_bytes/long": Limit(max=1e9)},
            {},
            "'peak_rss_bytes/long' is no metric; .*peak_rss_bytes/TOKENS",
        ),
        (
            {"size_bytes": Limit(max=1)},
            {"stop_early": True},
            "no limit of the budget is on kept, acc, flips, points_lost",
        ),
    ],
)
@pytest.mark.parametrize("slot", [True, False])
def test_limits_that_can_mean_nothing_are_refused_before_work(limits, settings, message, slot):
    scoring = Eval(**settings)
    with pytest.raises(ConfigError, match=message):
        Budget({} if slot else limits, {"heal": limits} if slot else {}).check(scoring, ["topics"])


def test_a_limit_of_a_length_is_judged_in_its_unit():
    metric = "peak_rss_bytes/2048"
    budget = Budget({metric: Limit(max=400e6)})
    budget.check(Eval(context_lengths=[2048]), [])
    (found,) = judge({metric: 410e6}, {}, budget.limits, enforced=True)
    assert found["sentence"] == f"{metric} 410.0 MB violates the limit of at most 400.0 MB"


def test_a_limit_needs_exactly_one_bound():
    with pytest.raises(ConfigError, match="exactly one of max and min"):
        Limit()
    with pytest.raises(ConfigError, match="exactly one of max and min"):
        Limit(min=1, max=2)
