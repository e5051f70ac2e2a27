"""compress/score/intervals.py against scipy, closed forms and resampling items one by one; what its
intervals cover.
"""

import math

import numpy as np
import pytest
from scipy import stats

from compress.score import intervals as paired

RNG = np.random.default_rng(7)


def pair(n=160, acc_teacher=0.9, agree=0.85):
    teacher = RNG.random(n) < acc_teacher
    return np.where(RNG.random(n) < agree, teacher, ~teacher), teacher


def items(task, correct):
    return [
        {"task": task, "doc_id": i, "correct": bool(c), "choice": 0, "logliks": [0.0, -1.0]}
        for i, c in enumerate(correct)
    ]


def test_kept_is_one_at_the_teacher_zero_at_chance_and_nothing_without_a_teacher_above_it():
    shares = np.array(
        [[0.2, 0, 0, 0.8], [0.2, 0, 0.55, 0.25], [0.25, 0, 0.25, 0.5], [0.75, 0, 0, 0.25]]
    )  # neither, student, teacher, both
    found = paired.compared(shares, 0.25)
    np.testing.assert_allclose(found["kept"], [1, 0, 0.5, np.nan])
    np.testing.assert_allclose(found["points_lost"], [0, 0.55, 0.25, 0])
    np.testing.assert_allclose(found["flips"], [0, 0.55, 0.25, 0])


@pytest.mark.parametrize("seed", range(5))
def test_mcnemar_is_the_sum_of_binomial_coefficients(seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.random(150) < 0.6, rng.random(150) < 0.7
    b, c = int((teacher & ~student).sum()), int((student & ~teacher).sum())
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert paired.mcnemar_p(student, teacher) == pytest.approx(min(1, 2 * tail), rel=1e-9)


def test_mcnemar_without_disagreement_is_one_and_with_thousands_does_not_overflow():
    same = np.array([True, False, True])
    assert paired.mcnemar_p(same, same) == 1
    assert paired.mcnemar_p(np.zeros(5000, bool), np.ones(5000, bool)) < 1e-300


def test_holm_by_hand():
    """0.01 x 4; 0.02 x 3; 0.03 x 2, as large as the one before; 0.04 x 1 is raised to it. And
    capped at 1.
    """
    assert paired.holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02}) == pytest.approx(
        {"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06}
    )
    assert paired.holm({"a": 0.005, "b": 0.011, "c": 0.02, "d": 0.04, "e": 0.13}) == pytest.approx(
        {"a": 0.025, "b": 0.044, "c": 0.06, "d": 0.08, "e": 0.13}
    )
    assert paired.holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}


def test_the_bootstrap_has_the_distribution_of_weighting_items_one_by_one():
    student, teacher = pair()
    fast = paired.compared(
        paired.bootstrap(paired.cells(student, teacher), seed=1, resamples=20_000), 0.25
    )["kept"]
    s, t = (
        np.r_[side, extra] for side, extra in ((student, [0, 1, 0, 1]), (teacher, [0, 0, 1, 1]))
    )  # four half items
    weights = np.random.default_rng(2).standard_gamma(
        [*[1.0] * len(student), *[0.5] * 4], (20_000, len(s))
    )
    weights /= weights.sum(1, keepdims=True)
    slow = (weights @ s - 0.25) / (weights @ t - 0.25)
    np.testing.assert_allclose(
        np.quantile(fast, [0.025, 0.5, 0.975]), np.quantile(slow, [0.025, 0.5, 0.975]), atol=0.008
    )


@pytest.mark.parametrize(("right", "n"), [(0, 40), (90, 160), (160, 160)])
def test_intervals_of_shares_are_quantiles_of_beta_distributions(right, n):
    answers = np.arange(n) < right
    low, high = paired.accuracy(items("a", answers)).intervals["acc/a"]
    expected = stats.beta(right + 0.5, n - right + 0.5).ppf([0.025, 0.975])
    np.testing.assert_allclose(
        [low, high],
        [0 if right == 0 else expected[0], 1 if right == n else expected[1]],
        atol=0.004,
    )
    flips = paired.paired_scores(
        items("a", answers), items("a", np.ones(n)), {"a": 0.25}
    ).intervals["flips/a"]
    top = stats.beta(n - right + 1, right + 1).ppf(
        0.975
    )  # two of the four cells, with half an item each
    assert flips[1] == pytest.approx(
        max(top, 1 - right / n), abs=0.004
    )  # an interval holds its own value, also at the end


def test_the_bootstrap_is_seeded_and_pairing_matters_but_no_flip_seen_is_no_certainty():
    student, teacher = pair()
    np.testing.assert_array_equal(
        *(paired.bootstrap(paired.cells(student, teacher), seed=3) for _ in range(2))
    )
    same = paired.paired_scores(items("a", teacher), items("a", teacher), {"a": 0.25})
    low, high = same.intervals["kept/a"]
    assert (
        same.scores["kept/a"] == 1 and 0.95 < low < 1 < high < 1.05
    )  # an unpaired one would be 0.14 wide
    assert same.intervals["flips/a"][0] == 0 < same.intervals["flips/a"][1] < 0.04


def test_paired_scores_names_what_the_teacher_does_not_know_and_averages_the_rest():
    (s1, t1), (s2, t2) = pair(), pair(acc_teacher=0.8)
    guess = np.arange(100) % 4 == 0
    teacher = items("facts", t1) + items("arithmetic", t2) + items("riddles", guess)
    student = (
        items("facts", s1) + items("arithmetic", s2)[::-1] + items("riddles", ~guess)
    )  # the order of items is free
    scores, intervals, excluded, _ = paired.paired_scores(
        student, teacher, {"facts": 0.25, "arithmetic": 0.25, "riddles": 0.25}
    )
    assert excluded == ["riddles"] and "kept/riddles" not in scores and scores["flips/riddles"] == 1
    assert scores["kept"] == pytest.approx((scores["kept/facts"] + scores["kept/arithmetic"]) / 2)
    assert scores["flips/facts"] == pytest.approx(np.mean(s1 != t1))
    lost = [t1.mean() - s1.mean(), t2.mean() - s2.mean(), -0.5]
    assert scores["points_lost"] == pytest.approx(np.mean(lost)) and scores[
        "points_lost/riddles"
    ] == pytest.approx(-0.5)
    assert set(intervals) == {
        *(
            f"{name}/{task}"
            for name in ("points_lost", "flips")
            for task in ("facts", "arithmetic", "riddles")
        ),
        *("kept", "points_lost", "flips", "kept/facts", "kept/arithmetic"),
    }
    for name, (low, high) in intervals.items():
        assert low < scores[name] < high or name == "flips/riddles"
    for task in ("facts", "arithmetic", "riddles"):
        assert scores[f"mcnemar_p_holm/{task}"] >= scores[f"mcnemar_p/{task}"]


def test_a_higher_level_is_wider():
    s, t = pair()
    narrow, wide = (
        paired.paired_scores(items("a", s), items("a", t), {"a": 0.25}, level).intervals["kept/a"]
        for level in (0.95, 0.99)
    )
    assert wide[0] < narrow[0] and narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("share", "chance"),
    [(4, 0.25), (101, 0.0)],
    ids=["guessing", "never right at what can't be guessed"],
)
def test_without_a_usable_task_there_is_no_kept(share, chance):
    guess = np.arange(1, 101) % share == 0
    scores, intervals, excluded, _ = paired.paired_scores(
        items("a", guess), items("a", guess), {"a": chance}
    )
    assert "kept" not in scores and "kept" not in intervals and excluded == ["a"]


def test_items_that_are_neither_right_nor_wrong_are_no_part_of_accuracy():
    text = [{"task": "wikitext", "doc_id": 0, "loglik": -3.0}]
    assert (
        paired.paired_scores(text, text, {}) == paired.Scores({}, {}, []) == paired.accuracy(text)
    )


@pytest.mark.parametrize(
    ("student", "partial", "message"),
    [
        (items("b", [1, 0]), False, r"student was scored on \['b'\], teacher on \['a'\]"),
        (items("a", [1]), False, "first: doc_id 1"),
        (items("a", [1, 0]) + items("a", [1]), False, "item 0 appears twice"),
        (items("a", [1, 0, 1]), True, "first: doc_id 2"),
    ],
)
def test_items_that_do_not_match_are_refused(student, partial, message):
    with pytest.raises(ValueError, match=message):
        paired.paired_scores(student, items("a", [1, 0]), {"a": 0.5, "b": 0.5}, partial=partial)


def designs(count, sizes, flips, tasks, seed):
    """Chances, items and true shares (neither, student, teacher, both) of `count` pairs of a
    teacher above chance and a student.
    """
    rng, found = np.random.default_rng(seed), []
    while len(found) < count * tasks:
        chance, flip = rng.choice([0.25, 0.5]), rng.uniform(*flips)
        acc_teacher, lost = rng.uniform(chance + 0.2, 0.95), flip * rng.uniform(0.4, 0.9)
        shares = np.array([1 - acc_teacher - (flip - lost), flip - lost, lost, acc_teacher - lost])
        if shares.min() >= 0:
            found.append((chance, int(rng.choice(sizes)), shares))
    return [found[i : i + tasks] for i in range(0, len(found), tasks)]


def true_kept(design):
    return float(
        np.mean([paired.compared(shares[None], chance)["kept"][0] for chance, _, shares in design])
    )


@pytest.mark.parametrize(
    ("sizes", "flips", "tasks", "allowed"),
    [
        ((100, 160, 400), (0.05, 0.35), 2, (0.935, 0.965)),
        ((100, 160), (0.01, 0.04), 1, (0.935, 0.985)),
    ],
)
def test_fixed_size_intervals_of_kept_cover_the_truth_in_2000_pairs(sizes, flips, tasks, allowed):
    """The second kind, students that differ in a few items only, is where resampling whole items
    covers 76%.
    """
    rng, covered, passed = np.random.default_rng(11), 0, 0
    for design in designs(2000, sizes, flips, tasks, seed=1):
        draws = [
            paired.compared(
                paired.bootstrap(rng.multinomial(n, shares), seed=i, resamples=4000), chance
            )["kept"]
            for i, (chance, n, shares) in enumerate(design)
        ]
        low, high = paired.interval(np.mean(draws, axis=0))
        covered += low <= true_kept(design) <= high
        passed += low >= true_kept(design)  # a limit exactly where the truth is
    assert allowed[0] <= covered / 2000 <= allowed[1], covered / 2000
    assert passed / 2000 <= 0.065, passed / 2000


def test_the_interval_of_a_mean_over_rows_is_students():
    rows = [0.3, 0.5, 0.45, 0.7, 0.52]
    expected = stats.t.interval(0.95, 4, np.mean(rows), stats.sem(rows))
    np.testing.assert_allclose(paired.ratio_interval(rows), expected, atol=0.01)
    assert paired.ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0)), (
        "rows in proportion leave nothing uncertain"
    )


def test_intervals_over_few_rows_cover_the_truth_where_percentiles_do_not():
    rng, covered, percentile = np.random.default_rng(5), 0, 0
    for rows in rng.lognormal(
        -(0.25**2) / 2, 0.25, (1000, 4)
    ):  # a mean of 1, rows that differ by a quarter
        low, high = paired.ratio_interval(rows.tolist())
        covered += low <= 1 <= high
        low, high = np.quantile(rng.multinomial(4, [0.25] * 4, 1000) @ rows / 4, [0.025, 0.975])
        percentile += low <= 1 <= high
    assert covered >= 920 and percentile < 850
