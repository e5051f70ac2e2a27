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
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from compress import budget
from compress.report.records import Record, Run
from compress.report.table import COLUMN
from compress.score.intervals import Scores, paired_scores, ratio_interval
from compress.score.open import TEACHER_RIGHT, difference_of_flags

Items = Sequence[Mapping[str, Any]]
# What a score does not depend on: how surely times are known and of what, and training text.
NO_MATTER = {
    "eval.repeats", "eval.processes", "eval.prompt_lengths", "eval.context_lengths",
    "eval.batch_sizes", "eval.time_stages", "eval.price_per_hour",
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
    # Files count by what they hold, not by their names, where all runs noted it.
    ignored = set(NO_MATTER)
    if all("digests" in run.info for run in runs):
        ignored |= {"eval.data_dir", "data.heldout"}
    prompt_digests = {run.info.get("digests", {}).get("the open prompts") for run in runs}
    if len(prompt_digests) == 1 and None not in prompt_digests:
        ignored |= {"eval.open_prompts", "eval.open_limit"}

    first = _settings(runs[0], ignored)
    for run in runs[1:]:
        settings = _settings(run, ignored)
        for name in sorted(first.keys() & settings.keys()):
            if first[name] != settings[name]:
                raise ValueError(
                    "these can't be compared, they were scored with other settings:"
                    f" {name} is {first[name]!r} in {runs[0].name} and {settings[name]!r} in"
                    f" {run.name}; run one again with the other's settings"
                )


def _settings(run: Run, ignored: set[str]) -> dict[str, Any]:
    """All that a run's scores depend on by name, but for the settings in `ignored`."""
    settings = {}
    for group in ("eval", "data"):
        for name, value in run.info.get("config", {}).get(group, {}).items():
            if f"{group}.{name}" not in ignored:
                settings[f"{group}.{name}"] = value
    for thing, digest in run.info.get("digests", {}).items():
        settings[f"the digest of {thing}"] = digest
    if run.teacher:
        settings["the teacher's digest"] = run.teacher["digest"]
    return settings


def differences(first: Run, other: Run) -> list[Difference]:
    """All numbers that both final records hold, in the order of the tables, then accuracies; no
    times of different machines.
    """
    a, b = first.final, other.final
    same_machine = first.info.get("machine") == other.info.get("machine")
    teacher_answers = first.rows(first.teacher, "open") if first.teacher else []
    open_by_metric = {
        difference.metric: difference
        for difference in open_differences(
            first.rows(a, "open"), other.rows(b, "open"), teacher_answers
        )
    }

    # Open answers are paired where both sides kept them; other numbers are subtracted.
    shown = []
    kept = sorted(key for key in a["scores"] if key.startswith("kept/"))
    for name in [*COLUMN, "open/ended", *_texts(a), *kept]:
        x, y = a["scores"].get(name), b["scores"].get(name)
        is_time = "_ms" in name or name in ("tok_per_sec", "bytes_per_sec")
        if name in open_by_metric:
            shown.append(open_by_metric[name])
        elif None not in (x, y) and (same_machine or not is_time):
            shown.append(Difference(name, y - x, _limits(name, a, b)))
    return shown + accuracy_differences(first.rows(a, "items"), other.rows(b, "items"))


def _texts(record: Record) -> list[str]:
    """The figures of each held-out text, where there are several."""
    texts = [key.partition("/")[2] for key in record["scores"] if key.startswith("kl_to_teacher/")]
    figures = ("kl_to_teacher", "top1_agree", "bits_per_byte") if len(texts) > 1 else ()
    return [f"{figure}/{text}" for figure, text in product(figures, texts)]


def open_differences(first: Items, other: Items, teacher: Items) -> list[Difference]:
    """The shares in OPEN over the prompts that both sides answered; open/kept over those of them
    that the teacher gets right, where they are enough."""
    first_by_id = {row["id"]: row for row in first}
    teacher_right = {row["id"] for row in teacher if row["right"]}
    pairs = [(first_by_id[row["id"]], row) for row in other if row["id"] in first_by_id]

    shares = []
    for metric, flag in OPEN.items():
        counted = pairs
        least = 1
        if metric == "open/kept":
            counted = [pair for pair in pairs if pair[1]["id"] in teacher_right]
            least = TEACHER_RIGHT
        if len(counted) >= least:
            before = np.array([bool(row[flag]) for row, _ in counted])
            after = np.array([bool(row[flag]) for _, row in counted])
            shares.append(Difference(metric, *difference_of_flags(after, before)))
    return shares


def _limits(name: str, a: Record, b: Record) -> tuple[float, float] | None:
    """The 95% interval of b - a in one score, None where an interval is missing."""
    # Of the same held-out text, row by row: [what is summed, what it is divided by].
    a_rows, b_rows = (record.get("rows", {}).get(name, []) for record in (a, b))
    if a_rows and b_rows and a_rows[1:] == b_rows[1:] and len(a_rows[0]) == len(b_rows[0]):
        sums = np.subtract(b_rows[0], a_rows[0]).tolist()
        return ratio_interval(sums, a_rows[1] if a_rows[1:] else None, -math.inf)

    # Else by the formula above, of what is known of each side alone.
    if not all(name in record.get("intervals", {}) for record in (a, b)):
        return None
    x, (x_low, x_high) = a["scores"][name], a["intervals"][name]
    y, (y_low, y_high) = b["scores"][name], b["intervals"][name]
    return y - x - math.hypot(y - y_low, x_high - x), y - x + math.hypot(y_high - y, x - x_low)


def accuracy_differences(first: Items, other: Items) -> list[Difference]:
    """`acc/<task>` of the items that both sides kept, and above several tasks their mean; empty
    where there are none.
    """
    keys = {_key(item) for item in first if "correct" in item} & {_key(item) for item in other}
    tasks = sorted({task for task, _ in keys})
    if not tasks:
        return []
    paired = paired_scores(
        [item for item in other if _key(item) in keys],
        [item for item in first if _key(item) in keys],
        dict.fromkeys(tasks, 0.0),
    )

    # Points that the other lost are the difference with its sign turned.
    differences_by_task = []
    for task in tasks:
        p = paired.scores[f"mcnemar_p_holm/{task}"]
        differences_by_task.append(_gained(paired, f"acc/{task}", f"points_lost/{task}", p))
    if len(tasks) == 1:
        return differences_by_task
    return [_gained(paired, "acc/mean", "points_lost", None), *differences_by_task]


def _key(item: Mapping[str, Any]) -> tuple[Any, Any]:
    """What tells an item of the tasks from all others."""
    return item["task"], item["doc_id"]


def _gained(paired: Scores, metric: str, lost: str, p: float | None) -> Difference:
    """The points in `lost`, a score of `paired`, as a difference in `metric`: less lost is more."""
    low, high = paired.intervals[lost]
    return Difference(metric, -paired.scores[lost], (-high, -low), p)


def flips(first: Items, other: Items) -> list[Flip]:
    """Items with choices whose correctness changed from the first to the other: what got worse,
    the surest mistakes first, then what got better.
    """
    first_by_key = {_key(item): item for item in first}
    changed = []
    for item in other:
        before = first_by_key.get(_key(item), item)
        if "choice" in item and before.get("correct") != item.get("correct"):
            changed.append(_flip(before, item))
    return sorted(changed, key=lambda flip: (flip.became == "better", -flip.nats))


def _flip(before: Mapping[str, Any], item: Mapping[str, Any]) -> Flip:
    """An item as it was answered `before` and now, of which one is right."""
    good, bad = sorted((before, item), key=lambda answer: not answer["correct"])
    context = item.get("context", "")
    choices = [choice.strip() for choice in item.get("choices", [])]
    if not isinstance(context, str):  # one for each choice
        choices = [f"{start} {choice}" for start, choice in zip(context, choices, strict=True)]
        context = ""
    right, wrong = (
        choices[answer["choice"]] if choices else f"choice {answer['choice']}"
        for answer in (good, bad)
    )

    # Both as the model that is wrong finds them.
    nats = bad["logliks"][bad["choice"]] - bad["logliks"][good["choice"]]
    became = "worse" if bad is item else "better"
    return Flip(item["task"], item["doc_id"], became, nats, context, right, wrong)


def speed_sentence(first: Run, other: Run, metric: str, ratio: tuple[float, float, float]) -> str:
    """What `compare_speed` found, in words; `ratio`: how many times as fast, and its interval."""
    value, low, high = ratio
    shown = "no difference shown, " if low <= 1 <= high else ""
    return (
        f"{SPEEDS[metric]}: {shown}{other.name} is {value:.3g} times as fast (95% interval"
        f" {low:.3g} to {high:.3g}) as {first.name}"
    )
