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
    compared = [_measured(name) for name in metrics if _is_quality(name)] or list(DEFAULT)

    # Several limits on accuracy are about one measure.
    result = []
    for name in dict.fromkeys(compared):
        if name.startswith("open/"):
            change = _answers_change(name, student.answers, parent.answers, teacher.answers)
        elif is_accuracy(name):
            change = _items_change(name, student, parent)
        else:
            change = _text_change(name, student_rows.get(name), parent_rows.get(name))
        if change is not None:
            result.append(change)
    return result


def _measured(metric: str) -> str:
    """What is compared where a budget limits `metric`: of the tasks accuracy,
    `acc` or `acc/TASK`.
    """
    name, slash, task = metric.partition("/")
    return f"acc{slash}{task}" if is_accuracy(name) else metric


def _is_quality(metric: str) -> bool:
    """Whether a stage can be better at it: on the tasks, open answers or held-out text."""
    if metric.startswith("kl_to_parent"):
        return False
    return metric.startswith("open/") or is_accuracy(metric) or is_heldout(metric)


def _for_the_better(metric: str, difference: float, interval: tuple[float, float]) -> Change:
    """Stage minus parent as a gain, which of a measure where less is better is turned around."""
    less_is_better = metric.partition("/")[0] in LESS_IS_BETTER or metric in LESS_IS_BETTER
    sign = -1.0 if less_is_better else 1.0
    low, high = sorted(sign * end for end in interval)
    return Change(metric, sign * difference, low, high)


def _items_change(metric: str, student: Any, parent: Any) -> Change | None:
    """Of `acc` or `acc/TASK`, on the items that both answered."""
    if not student.items or not parent.items:
        return None

    # Where tasks stop early, one of the two may have answered items that the other has not.
    student_items = _common(student.items, parent.items)
    parent_items = _common(parent.items, student.items)
    paired = paired_scores(student_items, parent_items, student.chance)

    task = metric.partition("/")[2]
    name = f"points_lost/{task}" if task else "points_lost"
    if name not in paired.scores:
        return None
    low, high = paired.intervals[name]
    return Change(metric, -paired.scores[name], -high, -low)


def _text_change(metric: str, student: Any, parent: Any) -> Change | None:
    """Of a figure of held-out text, from both models' arguments of `ratio_interval`, if they are
    of the same rows.
    """
    if student is None or parent is None or student[1:] != parent[1:]:
        return None
    difference_S = (np.asarray(student[0]) - np.asarray(parent[0])).tolist()
    weights_S = student[1] if len(student) > 1 else None

    interval = ratio_interval(difference_S, weights_S, least=-np.inf)
    difference = sum(difference_S) / (sum(weights_S) if weights_S else len(difference_S))
    return _for_the_better(metric, difference, interval)


def _common(items: Any, other: Any) -> list[Any]:
    """Those of `items` that are answered in `other` too."""
    answered = {(item["task"], item["doc_id"]) for item in other}
    return [item for item in items if (item["task"], item["doc_id"]) in answered]


def _answers_change(metric: str, student: Any, parent: Any, teacher: Any) -> Change | None:
    """By the share of the common prompts that the student has and the parent has not; of open/kept
    among those the teacher gets right.
    """
    flag = {
        "open/kept": "right",
        "open/right": "right",
        "open/loops": "loops",
        "open/loops_gained": "loops",
        "open/ended": "ended",
        "open/ended_lost": "ended",
    }.get(metric)
    if flag is None:
        return None

    by_id = {row["id"]: row for row in parent}
    counted = set(by_id)
    if metric == "open/kept":
        counted &= {row["id"] for row in teacher if row["right"]}
    rows = [row for row in student if row["id"] in counted]
    if not rows:
        return None

    student_flags = np.array([bool(row[flag]) for row in rows])
    parent_flags = np.array([bool(by_id[row["id"]][flag]) for row in rows])
    difference, interval = difference_of_flags(student_flags, parent_flags)
    return _for_the_better(metric, difference, interval)


def sentence(stage_changes: list[Change]) -> str:
    """What to tell: 'paid: ...' or 'did not pay: ...'."""
    verdict = "paid" if paid(stage_changes) else "did not pay"
    details = "; ".join(map(str, stage_changes)) or "nothing to compare it by was measured"
    return f"{verdict}: {details}"


def paid(stage_changes: list[Change]) -> bool:
    """Whether something became better and nothing worse."""
    words = [change.word for change in stage_changes]
    return "better" in words and "worse" not in words
