"""Whether a stage paid, by what the budget names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from compress.score.payoff import Change, changes, paid, sentence


def answers(right, loops=0, count=60):
    return [
        {
            "id": str(i),
            "prompt": "?",
            "right": i < right,
            "loops": i >= count - loops,
            "ended": True,
            "form": "same",
        }
        for i in range(count)
    ]


def items(right, count=100):
    return [{"task": "facts", "doc_id": i, "correct": i < right} for i in range(count)]


def model(right=0, loops=0, known=0):
    return SimpleNamespace(
        answers=answers(right, loops), items=items(known) if known else [], chance={"facts": 0.25}
    )


def told(student, parent, metrics, mine=None, its=None, teacher=None):
    return changes(student, parent, mine or {}, its or {}, teacher or model(right=60), metrics)


def test_more_right_answers_of_those_the_teacher_knows_pay():
    (change,) = told(model(right=50), model(right=20), ["open/kept", "size_bytes"])
    assert change.word == "better" and change.gain == pytest.approx(0.5)
    assert paid([change]) and sentence([change]).startswith("paid: open/kept better (+50.0 points")


def test_fewer_right_answers_do_not_pay():
    found = told(model(right=20), model(right=50), ["open/kept"])
    assert found[0].word == "worse" and not paid(found)
    assert sentence(found).startswith("did not pay: open/kept worse (-50.0 points")


def test_more_loops_are_worse_whichever_way_the_budget_names_them():
    for name in ("open/loops", "open/loops_gained"):
        found = told(model(right=20, loops=20), model(right=20), [name])
        assert found[0].word == "worse" and found[0].gain == pytest.approx(-1 / 3)


def test_a_difference_within_its_interval_is_none_and_does_not_pay():
    found = told(model(right=31), model(right=30), ["open/kept"])
    assert found[0].word == "no difference" and not paid(found)


def test_closeness_is_paired_row_by_row():
    mine, its = {"kl_to_teacher": [[0.1, 0.2, 0.3, 0.4]]}, {"kl_to_teacher": [[0.2, 0.3, 0.4, 0.5]]}
    (change,) = told(model(), model(), ["kl_to_teacher"], mine, its)
    assert change.word == "better" and change.gain == pytest.approx(0.1)
    (change,) = told(model(), model(), ["kl_to_teacher"], its, mine)
    assert change.word == "worse"


def test_ratios_are_of_the_same_text():
    mine = {"bits_per_byte/heldout": [[10.0, 20.0], [10, 20]]}
    other = {"bits_per_byte/heldout": [[10.0, 20.0], [11, 20]]}
    assert told(model(), model(), ["bits_per_byte/heldout"], mine, other) == []


def test_accuracy_is_paired_item_by_item():
    (change,) = told(model(known=90), model(known=60), ["kept"])
    assert change.word == "better" and change.gain == pytest.approx(0.3)
    assert told(model(known=90), model(), ["kept"]) == []


@pytest.mark.parametrize("metric", ["kept", "acc", "flips", "points_lost"])
def test_whatever_limit_names_the_tasks_the_points_are_of_accuracy(metric):
    for name, told_as in ((metric, "acc"), (f"{metric}/facts", "acc/facts")):
        (change,) = told(model(known=90), model(known=60), [name])
        assert change.metric == told_as and change.gain == pytest.approx(0.3)
        assert sentence([change]).startswith(f"paid: {told_as} better (+30.0 points, 95% interval")


def test_limits_on_the_same_items_are_told_once():
    assert [
        c.metric
        for c in told(
            model(known=90), model(known=60), ["kept", "flips", "acc/facts", "points_lost/facts"]
        )
    ] == ["acc", "acc/facts"]


def test_where_tasks_stopped_early_the_items_that_both_answered_count():
    whole, stopped = model(known=90), model(known=60)
    stopped.items = stopped.items[:80]
    (change,) = told(whole, stopped, ["kept"])
    assert change.gain == pytest.approx(20 / 80)
    (change,) = told(stopped, whole, ["kept"])
    assert change.gain == pytest.approx(-20 / 80)


def test_a_budget_without_measures_of_quality_means_answers_and_closeness():
    mine, its = {"kl_to_teacher": [[0.1, 0.2]]}, {"kl_to_teacher": [[0.2, 0.3]]}
    assert [c.metric for c in told(model(right=9), model(right=9), ["size_bytes"], mine, its)] == [
        "open/kept",
        "kl_to_teacher",
    ]


def test_one_thing_worse_does_not_pay_whatever_else_got_better():
    good, bad = Change("kept", 0.1, 0.05, 0.2), Change("open/kept", -0.1, -0.2, -0.05)
    assert paid([good]) and not paid([good, bad]) and not paid([])
    assert sentence([]) == "did not pay: nothing to compare it by was measured"
