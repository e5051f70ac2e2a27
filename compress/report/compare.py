r"""Candidates beside the first: whether they may be compared, by how much each number differs, and
which items got worse.

Accuracy is paired item by item (`score/intervals.py`): the bootstrap's 95% interval, and exact
McNemar's p, for tasks corrected after Holm. KL, top-1 agreement and bits per byte are paired row by
row of the held-out text. Other numbers with an interval on both sides, and these where records keep
no rows: d = b - a within (MOVER; Zou & Donner 2008, Statistics in Medicine 27, section 2)

    d - sqrt((b - b_low)^2 + (a_high - a)^2),   d + sqrt((b_high - b)^2 + (a - a_low)^2),

right for independent estimates and too wide for ones that move together. A difference whose
interval contains 0 is not shown.

Open answers are paired prompt by prompt (`score/open.py`), `open/kept` over those that the teacher
gets right.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compress import budget
from compress.report.records import Record, Run
from compress.report.table import COLUMN
from compress.score.intervals import paired_scores, ratio_interval
from compress.score.open import TEACHER_RIGHT, difference_of_flags

Items = Sequence[Mapping[str, Any]]
# What a score does not depend on: how surely times are known and of what, and training text.
NO_MATTER = {
    "eval.repeats", "eval.processes", "eval.prompt_lengths", "eval.batch_sizes", "eval.time_stages",
    "data.train", "data.chat", "data.weights", "data.packing",
}  # fmt: skip
# Metric -> the flag that it is a share of.
OPEN = {"open/kept": "right", "open/right": "right", "open/loops": "loops", "open/ended": "ended"}
SPEEDS = {"latency_ms_p50": "a further token", "ttft_ms_p50": "the first token"}


class Difference(NamedTuple):
    """Other minus first in one score, its 95% interval if there is one, and McNemar's p where
    answers are paired.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None = None
    p: float | None = None

    def signed(self, value: float) -> str:
        """A difference as people say it; of shares in points."""
        size = (
            f"{abs(value):.3g} ms"
            if "_ms" in self.metric
            else budget.human(self.metric, abs(value)).replace("%", " points")
        )
        return ("-" if value < 0 else "+") + size

    def __str__(self) -> str:
        if self.interval is None:
            return self.signed(self.value) if self.value else "the same"
        low, high = self.interval
        p = "" if self.p is None else f", p {self.p:.2g}"
        shown = ": no difference shown" if low <= 0 <= high else ""
        return (
            f"{self.signed(self.value)} (95% interval {self.signed(low)} to"
            f" {self.signed(high)}{p}){shown}"
        )


class Flip(NamedTuple):
    """An item whose correctness changed. `nats`: how much likelier the model that is wrong finds
    its choice than the right one.
    """

    task: str
    doc_id: int
    became: str
    nats: float
    text: str
    right: str
    wrong: str


def check_same_settings(runs: Sequence[Run]) -> None:
    """ValueError naming the setting in which one was scored differently from the first; what only
    one of them knows is left out.
    """

    held = all(
        "digests" in run.info for run in runs
    )  # then files count by what they hold, not by their names
    idle = NO_MATTER | ({"eval.data_dir", "data.heldout"} if held else set())
    prompts = {run.info.get("digests", {}).get("the open prompts") for run in runs}
    if len(prompts) == 1 and None not in prompts:  # the same ones, however they were named
        idle |= {"eval.open_prompts", "eval.open_limit"}

    def settings(run: Run) -> dict[str, Any]:
        own = {
            f"{group}.{name}": value
            for group in ("eval", "data")
            for name, value in run.info.get("config", {}).get(group, {}).items()
        }
        digests = {
            f"the digest of {what}": value for what, value in run.info.get("digests", {}).items()
        }
        digests |= {"the teacher's digest": run.teacher["digest"]} if run.teacher else {}
        return {name: own[name] for name in own if name not in idle} | digests

    first = settings(runs[0])
    for run in runs[1:]:
        own = settings(run)
        for name in sorted(first.keys() & own.keys()):
            if first[name] != own[name]:
                where = (
                    f"{name} is {first[name]!r} in {runs[0].name} and {own[name]!r} in {run.name}"
                )
                raise ValueError(
                    f"these can't be compared, they were scored with other settings: {where}; run"
                    " one again with the other's settings"
                )


def differences(first: Run, other: Run) -> list[Difference]:
    """All numbers that both final records hold, in the order of the tables, then accuracies; no
    times of different machines.
    """
    a, b, found = first.final, other.final, []
    timed = first.info.get("machine") == other.info.get("machine")
    known = first.rows(first.teacher, "open") if first.teacher else []
    answered = open_differences(first.rows(a, "open"), other.rows(b, "open"), known)
    asked = {one.metric: one for one in answered}
    kept = sorted(key for key in a["scores"] if key.startswith("kept/"))
    for name in [*COLUMN, "open/ended", *_texts(a), *kept]:
        x, y = a["scores"].get(name), b["scores"].get(name)
        if name in asked:
            found.append(asked[name])
        elif None not in (x, y) and (timed or not ("_ms" in name or name == "tok_per_sec")):
            found.append(Difference(name, y - x, _limits(name, a, b)))
    return found + accuracy_differences(first.rows(a, "items"), other.rows(b, "items"))


def _texts(record: Record) -> list[str]:
    """The figures of each held-out text, where there are several."""
    texts = [key.partition("/")[2] for key in record["scores"] if key.startswith("kl_to_teacher/")]
    names = ("kl_to_teacher", "top1_agree", "bits_per_byte") if len(texts) > 1 else ()
    return [f"{name}/{text}" for name in names for text in texts]


def open_differences(first: Items, other: Items, teacher: Items) -> list[Difference]:
    """The shares in OPEN over the prompts that both sides answered; open/kept over those of them
    that the teacher gets right, where they are enough."""
    before = {row["id"]: row for row in first}
    right = {row["id"] for row in teacher if row["right"]}
    pairs, found = [(row, before[row["id"]]) for row in other if row["id"] in before], []
    for metric, flag in OPEN.items():
        some, least = pairs, 1
        if metric == "open/kept":
            some, least = [pair for pair in pairs if pair[0]["id"] in right], TEACHER_RIGHT
        if len(some) >= least:
            mine, its = (np.array([bool(pair[side][flag]) for pair in some]) for side in (0, 1))
            found.append(Difference(metric, *difference_of_flags(mine, its)))
    return found


def _limits(name: str, a: Record, b: Record) -> tuple[float, float] | None:
    """The 95% interval of b - a in one score, None where an interval is missing."""
    mine, other = (record.get("rows", {}).get(name, []) for record in (a, b))
    if mine and other and mine[1:] == other[1:] and len(mine[0]) == len(other[0]):  # the same text
        return ratio_interval(
            np.subtract(other[0], mine[0]).tolist(), mine[1] if mine[1:] else None, -math.inf
        )
    if not all(name in record.get("intervals", {}) for record in (a, b)):
        return None
    (x, x_low, x_high), (y, y_low, y_high) = (
        (record["scores"][name], *record["intervals"][name]) for record in (a, b)
    )
    return y - x - math.hypot(y - y_low, x_high - x), y - x + math.hypot(y_high - y, x - x_low)


def accuracy_differences(first: Items, other: Items) -> list[Difference]:
    """`acc/<task>` of the items that both sides kept, and above several tasks their mean; empty
    where there are none.
    """
    keys = {(item["task"], item["doc_id"]) for item in first if "correct" in item} & {
        (item["task"], item["doc_id"]) for item in other
    }
    a, b = (
        [item for item in items if (item["task"], item["doc_id"]) in keys]
        for items in (first, other)
    )
    tasks = sorted({task for task, _ in keys})
    if not tasks:
        return []
    found = paired_scores(b, a, dict.fromkeys(tasks, 0.0))

    def lost(end: str) -> tuple[float, tuple[float, float]]:
        low, high = found.intervals[f"points_lost{end}"]
        return -found.scores[f"points_lost{end}"], (-high, -low)

    each = [
        Difference(f"acc/{task}", *lost(f"/{task}"), found.scores[f"mcnemar_p_holm/{task}"])
        for task in tasks
    ]
    return [Difference("acc/mean", *lost("")), *each] if len(each) > 1 else each


def flips(first: Items, other: Items) -> list[Flip]:
    """Items with choices whose correctness changed from the first to the other: what got worse,
    the surest mistakes first, then what got better.
    """
    before, found = {(item["task"], item["doc_id"]): item for item in first}, []
    for item in other:
        known = before.get((item["task"], item["doc_id"]), item)
        if "choice" in item and known.get("correct") != item.get("correct"):
            good, bad = sorted((known, item), key=lambda one: not one["correct"])
            context, said = (
                item.get("context", ""),
                [choice.strip() for choice in item.get("choices", [])],
            )
            if not isinstance(context, str):  # one for each choice
                context, said = (
                    "",
                    [f"{start} {choice}" for start, choice in zip(context, said, strict=True)],
                )
            right, wrong = (
                said[one["choice"]] if said else f"choice {one['choice']}" for one in (good, bad)
            )
            nats, became = (
                bad["logliks"][bad["choice"]] - bad["logliks"][good["choice"]],
                ("worse" if bad is item else "better"),
            )
            found.append(Flip(item["task"], item["doc_id"], became, nats, context, right, wrong))
    return sorted(found, key=lambda flip: (flip.became == "better", -flip.nats))


def speed_sentence(first: Run, other: Run, metric: str, found: tuple[float, float, float]) -> str:
    """What `compare_speed` found, in words."""
    shown = "no difference shown, " if found[1] <= 1 <= found[2] else ""
    return (
        f"{SPEEDS[metric]}: {shown}{other.name} is {found[0]:.3g} times as fast (95% interval"
        f" {found[1]:.3g} to {found[2]:.3g}) as {first.name}"
    )
