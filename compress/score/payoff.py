"""Whether a stage paid: is its student better than its parent on what the budget names?

Pruning and rounding buy bytes and may cost; a stage that leaves size and shape as they are
(distillation, LoRA) must buy quality. On each measure that the budget limits, stage and parent are
compared on the same items, prompts or rows of text, by the paired interval of 95%:

    better, worse    the interval of the difference excludes 0
    no difference    it does not

Limits on the tasks (kept, flips, points_lost, acc) are all about how many items are right: what a
stage changed of that is told in points of `acc`, over all tasks or of one, whichever of them the
budget names.

A stage pays when it made something better and nothing worse. A budget that names no such measure is
read as naming open/kept and kl_to_teacher.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from compress.budget import human, is_accuracy, is_heldout
from compress.score.intervals import paired_scores, ratio_interval
from compress.score.open import difference_of_flags

DEFAULT = ("open/kept", "kl_to_teacher")
LESS_IS_BETTER = ("kl_to_teacher", "bits_per_byte", "open/loops", "open/loops_gained")


class Change(NamedTuple):
    """By how much a stage changed a measure for the better, with its 95% interval."""

    metric: str
    gain: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """better, worse or no difference."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference"

    def __str__(self) -> str:
        spread = (
            f"95% interval {_signed(self.metric, self.low)} to {_signed(self.metric, self.high)}"
        )
        return f"{self.metric} {self.word} ({_signed(self.metric, self.gain)}, {spread})"


def _signed(metric: str, value: float) -> str:
    return ("-" if value < 0 else "+") + human(metric, abs(value)).replace("%", " points")


def changes(
    student: Any,
    parent: Any,
    student_rows: Mapping[str, Any],
    parent_rows: Mapping[str, Any],
    teacher: Any,
    metrics: Iterable[str],
) -> list[Change]:
    """What a stage changed of `metrics`, as far as they are measures of quality that both have.

    `student`, `parent`, `teacher`: `Measured`; the rows: of `Scores.rows` beside the teacher.
    """
    named = [_measured(name) for name in metrics if _is_quality(name)] or list(DEFAULT)
    found = [
        _change(name, student, parent, student_rows, parent_rows, teacher)
        for name in dict.fromkeys(named)
    ]
    return [change for change in found if change is not None]


def _measured(metric: str) -> str:
    """What is compared where a budget limits `metric`: of the tasks accuracy,
    `acc` or `acc/TASK`.
    """
    name, slash, task = metric.partition("/")
    return f"acc{slash}{task}" if is_accuracy(name) else metric


def _is_quality(metric: str) -> bool:
    return (
        metric.startswith("open/")
        or is_accuracy(metric)
        or (is_heldout(metric) and not metric.startswith("kl_to_parent"))
    )


def _change(
    metric: str,
    student: Any,
    parent: Any,
    student_rows: Mapping[str, Any],
    parent_rows: Mapping[str, Any],
    teacher: Any,
) -> Change | None:
    sign = -1.0 if metric.partition("/")[0] in LESS_IS_BETTER or metric in LESS_IS_BETTER else 1.0
    if metric.startswith("open/"):
        gain, spread = _answers_gained(metric, student.answers, parent.answers, teacher.answers)
        if gain is None:
            return None
    elif is_accuracy(metric):
        if not student.items or not parent.items:
            return None
        # Where tasks stop early, one of the two may have answered items that the other has not.
        mine, its = _common(student.items, parent.items), _common(parent.items, student.items)
        paired = paired_scores(mine, its, student.chance)
        task = metric.partition("/")[2]
        name = f"points_lost/{task}" if task else "points_lost"
        if name not in paired.scores:
            return None
        low, high = paired.intervals[name]
        return Change(metric, -paired.scores[name], -high, -low)
    else:
        own, before = (rows.get(metric) for rows in (student_rows, parent_rows))
        if own is None or before is None or own[1:] != before[1:]:
            return None
        lost = (np.asarray(own[0]) - np.asarray(before[0])).tolist()
        weights = own[1] if len(own) > 1 else None
        spread = ratio_interval(lost, weights, least=-np.inf)
        gain = sum(lost) / (sum(weights) if weights else len(lost))
    low, high = sorted(sign * end for end in spread)
    return Change(metric, sign * gain, low, high)


def _common(items: Any, other: Any) -> list[Any]:
    """Those of `items` that are answered in `other` too."""
    answered = {(item["task"], item["doc_id"]) for item in other}
    return [item for item in items if (item["task"], item["doc_id"]) in answered]


def _answers_gained(metric: str, student: Any, parent: Any, teacher: Any) -> tuple[Any, Any]:
    """Share of the common prompts that the student has and the parent has not; of open/kept among
    those the teacher gets right.
    """
    flag = {
        "open/kept": "right",
        "open/right": "right",
        "open/loops": "loops",
        "open/loops_gained": "loops",
        "open/ended": "ended",
        "open/ended_lost": "ended",
    }.get(metric)
    its = {row["id"]: row for row in parent}
    right = {row["id"] for row in teacher if row["right"]} if metric == "open/kept" else its.keys()
    both = [
        (bool(row[flag]), bool(its[row["id"]][flag]))
        for row in student
        if flag and row["id"] in its and row["id"] in right
    ]
    if not both:
        return None, None
    return difference_of_flags(*(np.array(column) for column in zip(*both, strict=True)))


def sentence(found: list[Change]) -> str:
    """What to tell: 'paid: ...' or 'did not pay: ...'."""
    return (
        f"{'paid' if paid(found) else 'did not pay'}:"
        f" {'; '.join(map(str, found)) or 'nothing to compare it by was measured'}"
    )


def paid(found: list[Change]) -> bool:
    """Whether something became better and nothing worse."""
    words = [change.word for change in found]
    return "better" in words and "worse" not in words
