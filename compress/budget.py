"""Limits against metrics: every limit becomes a verdict, and every verdict is a sentence.

A value with a confidence interval passes only when the whole interval is inside the limit, fails
only when all of it is outside, and is INCONCLUSIVE in between. The intervals are two-sided ones of
95%: a model that lies exactly on its limit passes in about 2.5%, so "loses at most 2 points"
(`points_lost: {max: 0.02}`) is the non-inferiority test at a one-sided 2.5%, as regulators ask for,
stricter than "95% sure". Values without an interval (bytes, parameters) are compared as they are.

How much more would decide: an interval's half width h, on the side of the limit, shrinks with 1 /
sqrt(n), so a limit at the distance d from the value is decided after about n (h / d)^2 of what was
counted, if the value stays: items of the tasks, rows of held-out text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from compress.bounds import check_values
from compress.errors import ConfigError, nearest

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
ACCURACY = ("kept", "acc", "flips", "points_lost")  # over all tasks, or one: acc/TASK
OPEN = (
    "open/right",
    "open/kept",
    "open/loops",
    "open/loops_gained",
    "open/ended",
    "open/ended_lost",
    "open/plausible",
    "open/choice_gap",
    "open/form_differing",
)
# Open metric -> the score that counts what it is measured on, where that is not all prompts.
OPEN_COUNTS = {"open/kept": "n/open_kept", "open/plausible": "", "open/choice_gap": ""}
# Over all held-out texts, or one: kl_to_teacher/TEXT.
HELDOUT = ("kl_to_teacher", "kl_to_parent", "top1_agree", "bits_per_byte")
LIMIT_METRICS = (
    "size_bytes",
    "params",
    "bits_per_weight",
    "latency_ms_p50",
    "latency_ms_p95",
    "ttft_ms_p50",
    "tok_per_sec",
    "bytes_per_sec",
    "peak_rss_bytes",
    "joules_per_token",
    "cost_per_million_tokens",
    *ACCURACY,
    *OPEN,
    "kl_to_teacher",
    "kl_to_parent",
    "top1_agree",
    "bits_per_byte/heldout",
)

# Of these behind a slash a number of tokens, which the setting of `eval` must name.
OF_LENGTHS = {"ttft_ms_p50": "prompt_lengths", "peak_rss_bytes": "context_lengths"}


def is_of_a_length(metric: str) -> bool:
    """Whether a metric is measured with so many tokens: `peak_rss_bytes/2048`."""
    name, _, length = metric.partition("/")
    return name in OF_LENGTHS and length.isdecimal()


def is_accuracy(metric: str) -> bool:
    """Whether a metric is counted in items of the tasks."""
    return metric.partition("/")[0] in ACCURACY


def is_heldout(metric: str) -> bool:
    """Whether a metric is measured on held-out text."""
    return metric.partition("/")[0] in (*HELDOUT, "bytes_per_token", "bytes_per_sec")


def human(metric: str, value: float) -> str:
    """A value with its unit, as people say it."""
    if metric.partition("/")[0] in ("size_bytes", "peak_rss_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if metric == "params":
        return f"{value / 1e6:,.1f}M parameters"
    if "_ms" in metric:
        return f"{value:,.1f} ms"
    if metric in ("tok_per_sec", "bytes_per_sec"):
        return f"{value:,.0f} {'tokens' if metric == 'tok_per_sec' else 'bytes'}/s"

    # Differences of shares are points, shares themselves percent.
    gaps = ("open/loops_gained", "open/ended_lost", "open/choice_gap")
    if metric.startswith("points_lost") or metric in gaps:
        return f"{100 * value:.1f} points"
    is_open_share = metric in OPEN and metric != "open/plausible"
    is_open_share |= metric.startswith(("draft_accepted/", "draft_same/"))
    if is_accuracy(metric) or metric.startswith("top1_agree") or is_open_share:
        return f"{100 * value:.1f}%"
    return f"{value:.4g}"


def counted(metric: str, scores: Mapping[str, float]) -> tuple[int, int]:
    """How many items or rows a metric is measured on, 0 when not known, and how many items an
    early stop left out.
    """

    def count_of(*names: str) -> int:
        """The first of these scores that is there, 0 where none is a number."""
        value = next((scores[name] for name in names if name in scores), 0)
        return round(value) if math.isfinite(value) else 0

    _, slash, part = metric.partition("/")
    if metric in OPEN:
        return count_of(OPEN_COUNTS.get(metric, "n/open")), 0
    if is_heldout(metric):
        return count_of(f"heldout_rows/{part}", "heldout_rows"), 0
    if not is_accuracy(metric):
        return 0, 0

    # Of one task, or of all that were scored.
    tasks = [part] if slash else [name[4:] for name in scores if name.startswith("acc/")]
    items = sum(count_of(f"n/{task}") for task in tasks)
    items_left = sum(count_of(f"items_left/{task}") for task in tasks)
    return items, items_left


def _unit(metric: str) -> str:
    """What a metric's sample consists of."""
    if is_heldout(metric):
        return "held-out rows"
    return "prompts" if metric in OPEN else "items"


def what_decides(n: int, unit: str, value: float, span: tuple[float, float], bound: float) -> str:
    """How many more of `unit` would decide a limit that lies inside `span`,
    by the formula above.
    """
    if value == bound:
        return "no number would decide while the value is the limit itself"
    factor = ((span[1] - value if value < bound else value - span[0]) / (bound - value)) ** 2
    if not math.isfinite(factor):
        return "no number would decide while the interval has no end"
    if not n:
        return f"about {factor:.1f} times as many measurements would decide"
    return f"about {max(1, round(n * (factor - 1))):,} more {unit} would decide"


def judge(
    scores: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    limits: Mapping[str, Any],
    *,
    enforced: bool,
) -> list[dict[str, Any]]:
    """One verdict a limit (objects with max, min, why). A metric that was not measured is
    INCONCLUSIVE.
    """
    verdicts = []
    for name, limit in limits.items():
        op, bound = ("<=", limit.max) if limit.max is not None else (">=", limit.min)
        word, sentence = _verdict(name, op, bound, scores, intervals)

        verdicts.append(
            {
                "limit": name,
                "bound": bound,
                "op": op,
                "value": scores.get(name),
                "enforced": enforced,
                "why": limit.why,
                "verdict": word,
                "sentence": sentence,
            }
        )
    return verdicts


def _verdict(
    name: str,
    op: str,
    bound: float,
    scores: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
) -> tuple[str, str]:
    """PASS, FAIL or INCONCLUSIVE for the limit `name` `op` `bound`, and the sentence that says
    why.
    """
    value = scores.get(name)
    if value is None:
        limit = f"{op} {human(name, bound)}"
        return INCONCLUSIVE, f"{name} was not measured, so its limit {limit} can't be judged"

    # Which ends of the interval are inside the limit: the worse one, then the better one.
    low, high = intervals.get(name) or (value, value)
    inside = [high <= bound, low <= bound] if op == "<=" else [low >= bound, high >= bound]
    word = PASS if inside[0] else INCONCLUSIVE if inside[1] else FAIL

    items, items_left = counted(name, scores)
    spread = ""
    if name in intervals:
        stopped = ""
        if items_left:
            stopped = f", stopped after {items:,} of {items + items_left:,} items"
        spread = f" (95% interval {human(name, low)} to {human(name, high)}{stopped})"
    relation = {PASS: "is within", FAIL: "violates", INCONCLUSIVE: "can't be told from"}[word]
    side = "at most" if op == "<=" else "at least"
    sentence = (
        f"{name} {human(name, value)}{spread} {relation} the limit of {side} {human(name, bound)}"
    )
    if word == INCONCLUSIVE:
        sentence += f"; {what_decides(items, _unit(name), value, (low, high), bound)}"
    return word, sentence


def failed(verdicts: list[dict[str, Any]], *, strict: bool) -> bool:
    """Whether enforced verdicts make the run exit with 4."""
    bad = (FAIL, INCONCLUSIVE) if strict else (FAIL,)
    return any(v["enforced"] and v["verdict"] in bad for v in verdicts)


@dataclass
class Limit:
    """One bound on one metric, and why it was chosen."""

    max: float | None = None
    min: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if (self.max is None) == (self.min is None):
            raise ConfigError(
                f"a limit needs exactly one of max and min, got max={self.max}, min={self.min}"
            )
        check_values("limit", self)


class Scoring(Protocol):
    """What limits must agree with of how a model is scored: `Eval` (`score/settings.py`)."""

    tasks: list[str]
    open_prompts: list[str]
    stop_early: bool
    prompt_lengths: list[int]
    context_lengths: list[int]


def _check_length(name: str, scoring: Scoring) -> None:
    """ConfigError for a limit on a number of tokens that is not measured."""
    if not is_of_a_length(name):
        return
    metric, _, length = name.partition("/")
    setting = OF_LENGTHS[metric]
    lengths = getattr(scoring, setting)
    if int(length) not in lengths:
        raise ConfigError(
            f"budget limit {name!r} is on a length that is not measured; set"
            f" eval.{setting}={[*lengths, int(length)]}"
        )


@dataclass
class Budget:
    """Limits on the shipped files, and on single slots."""

    limits: dict[str, Limit] = field(default_factory=dict)
    slots: dict[str, dict[str, Limit]] = field(default_factory=dict)
    strict: bool = False  # an INCONCLUSIVE verdict counts as a failure

    def __post_init__(self) -> None:
        for name, limit in self.all():
            of_a_text = is_heldout(name) and "/" in name
            of_a_part = is_accuracy(name) or of_a_text or is_of_a_length(name)
            if name not in LIMIT_METRICS and not of_a_part:
                kinds = ((ACCURACY, "/TASK"), (HELDOUT, "/TEXT"), (OF_LENGTHS, "/TOKENS"))
                parts = [metric + part for metrics, part in kinds for metric in metrics]
                raise ConfigError(
                    f"budget limit {name!r} is no metric; {nearest(name, LIMIT_METRICS)},"
                    f" {', '.join(parts)}"
                )

            # Who writes 2 means two points.
            if name.startswith("points_lost") and (limit.max or limit.min or 0) > 1:
                raise ConfigError(
                    f"budget limit {name!r} is {limit.max or limit.min}, a share of all items; two"
                    " points are 0.02"
                )

    def all(self) -> list[tuple[str, Limit]]:
        """Every limit by its metric, those of slots too."""
        tables = (self.limits, *self.slots.values())
        return list(chain.from_iterable(limits.items() for limits in tables))

    def check(self, scoring: Scoring, heldout: Sequence[str]) -> None:
        """ConfigError for a limit on a task, a `heldout` text, open answers or a number of tokens
        that are not scored, and for an early stop without a limit that could bring it about.
        """
        for name, _ in self.all():
            _check_length(name, scoring)
            part = name.partition("/")[2]
            if is_heldout(name) and "/" in name and part not in ("heldout", *heldout):
                raise ConfigError(
                    f"budget limit {name!r} is on a text that data.heldout does not name;"
                    f" {nearest(part, heldout)}"
                )
            if name in OPEN and not scoring.open_prompts:
                raise ConfigError(
                    f"budget limit {name!r} is on open answers, and eval.open_prompts is empty; set"
                    " it to [embedded] or drop the limit"
                )

            # Accuracy may be limited on damaged text as well: acc/TASK@NAME.
            task = part.partition("@")[0]
            if is_accuracy(name) and task and task not in scoring.tasks:
                raise ConfigError(
                    f"budget limit {name!r} is on a task that eval.tasks does not name;"
                    f" {nearest(task, scoring.tasks)}"
                )

        if scoring.stop_early and not any(is_accuracy(name) for name, _ in self.all()):
            raise ConfigError(
                f"eval.stop_early=true, but no limit of the budget is on {', '.join(ACCURACY)}: add"
                " one, or score in full"
            )
