"""compress/score/paired.py against scipy and against resampling items one by one."""

import numpy as np
import pytest
from scipy import stats

from compress.score import paired

RNG = np.random.default_rng(7)


def pair(n=160, acc_teacher=0.9, agree=0.85):
    teacher = RNG.random(n) < acc_teacher
    return np.where(RNG.random(n) < agree, teacher, ~teacher), teacher


def items(task, correct):
    return [{"task": task, "doc_id": i, "correct": bool(c), "choice": 0, "logliks": [0.0, -1.0]} for i, c in enumerate(correct)]


def test_kept_is_one_at_the_teacher_and_zero_at_chance():
    assert paired.kept(0.8, 0.8, 0.25) == 1 and paired.kept(0.25, 0.8, 0.25) == 0
    assert paired.kept(0.5, 0.75, 0.25) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="teacher's accuracy 0.250 is not above chance 0.250"):
        paired.kept(0.3, 0.25, 0.25)


@pytest.mark.parametrize("seed", range(5))
def test_mcnemar_equals_scipy_binomial_test(seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.random(150) < 0.6, rng.random(150) < 0.7
    b, c = int((teacher & ~student).sum()), int((student & ~teacher).sum())
    assert paired.mcnemar_p(student, teacher) == pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue, rel=1e-12)


def test_mcnemar_without_disagreement_is_one_and_with_thousands_does_not_overflow():
    same = np.array([True, False, True])
    assert paired.mcnemar_p(same, same) == 1
    assert paired.mcnemar_p(np.zeros(5000, bool), np.ones(5000, bool)) < 1e-300


@pytest.mark.parametrize(("right", "n"), [(0, 10), (1, 7), (90, 160), (160, 160)])
def test_wilson_lower_is_the_closed_form(right, n):
    z, p = stats.norm.ppf(0.975), right / n  # Wilson 1927, the lower root
    expected = (p + z * z / (2 * n) - z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
    assert paired.wilson_lower(right, n) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_from_counts_has_the_distribution_of_resampling_items():
    student, teacher = pair()
    fast = paired.bootstrap_kept(student, teacher, 0.25, seed=1, resamples=20_000)
    index = np.random.default_rng(2).integers(0, len(teacher), (20_000, len(teacher)))
    slow = (student[index].mean(1) - 0.25) / (teacher[index].mean(1) - 0.25)
    np.testing.assert_allclose(np.quantile(fast, [0.025, 0.5, 0.975]), np.quantile(slow, [0.025, 0.5, 0.975]), atol=0.008)


def test_bootstrap_is_seeded_and_pairing_matters():
    student, teacher = pair()
    np.testing.assert_array_equal(*(paired.bootstrap_kept(student, teacher, 0.25, seed=3) for _ in range(2)))
    assert paired.interval(paired.bootstrap_kept(teacher, teacher, 0.25)) == (
        1.0,
        1.0,
    )  # an unpaired one would have width


def test_bootstrap_interval_covers_the_true_value():
    rng, hits = np.random.default_rng(11), 0
    cells = [0.05, 0.05, 0.15, 0.75]  # neither, only student, only teacher, both
    truth = (0.80 - 0.25) / (0.90 - 0.25)
    for i in range(400):
        cell = rng.choice(4, size=160, p=cells)
        low, high = paired.interval(paired.bootstrap_kept(cell % 2 == 1, cell >= 2, 0.25, seed=i))
        hits += low <= truth <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_paired_scores_names_what_the_teacher_does_not_know_and_averages_the_rest():
    (s1, t1), (s2, t2) = pair(), pair(acc_teacher=0.8)
    guess = np.arange(100) % 4 == 0
    teacher = items("facts", t1) + items("arithmetic", t2) + items("riddles", guess)
    student = items("facts", s1) + items("arithmetic", s2)[::-1] + items("riddles", ~guess)  # the order of items is free
    scores, intervals, excluded = paired.paired_scores(student, teacher, {"facts": 0.25, "arithmetic": 0.25, "riddles": 0.25})
    assert excluded == ["riddles"] and "kept/riddles" not in scores and scores["flips/riddles"] == 1
    assert scores["kept"] == pytest.approx((scores["kept/facts"] + scores["kept/arithmetic"]) / 2)
    assert scores["flips/facts"] == pytest.approx(np.mean(s1 != t1))
    assert set(intervals) == {"kept", "kept/facts", "kept/arithmetic"}
    for name, (low, high) in intervals.items():
        assert low < scores[name] < high


def test_without_a_usable_task_there_is_no_kept():
    guess = np.arange(100) % 4 == 0
    scores, intervals, excluded = paired.paired_scores(items("a", guess), items("a", guess), {"a": 0.25})
    assert "kept" not in scores and not intervals and excluded == ["a"]


@pytest.mark.parametrize(
    ("student", "message"),
    [(items("b", [1, 0]), r"student was scored on \['b'\], teacher on \['a'\]"), (items("a", [1]), "first: doc_id 1"),
     (items("a", [1, 0]) + items("a", [1]), "item 0 appears twice")],
)  # fmt: skip
def test_items_that_do_not_match_are_refused(student, message):
    with pytest.raises(ValueError, match=message):
        paired.paired_scores(student, items("a", [1, 0]), {"a": 0.5, "b": 0.5})
