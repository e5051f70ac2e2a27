"""What is known of one model after it was scored, and when a student's tasks may end early."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.budget import is_accuracy
from compress.models.model import Model


@dataclass(frozen=True)
class Measured:
    """A model's own scores and their intervals, its task items, the chance level of each task,
    what a reader of the times should know, and in a run the record that was written about it.
    """

    model: Model
    key: str
    scores: dict[str, float]
    items: list[dict[str, Any]]
    chance: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    latency: dict[str, Any]
    # Of figures of text: arguments of `ratio_interval`.
    rows: dict[str, list[list[float]]]
    # To the open prompts: rows of score/open.py.
    answers: list[dict[str, Any]] = field(default_factory=list)
    # Of intervals over items: higher where an early stop made looks of its own
    # (score/sequential.py).
    level: float = 0.95
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EarlyStop:
    """A student's tasks go on only until every accuracy limit in `limits` on the comparison with
    `teacher` is decided.
    """

    teacher: Measured
    limits: Sequence[Mapping[str, Any]]

    def key_parts(self) -> list[Any]:
        """The teacher's key and [name, max, min] of each limit on an accuracy: what decides when
        the tasks end.
        """
        accuracy_limits = []
        for limits_by_name in self.limits:
            for name, limit in limits_by_name.items():
                if is_accuracy(name):
                    accuracy_limits.append([name, limit.max, limit.min])
        return [self.teacher.key, accuracy_limits]
