"""From which certainty on the student is believed: calibrated on a bundle's open answers.

The bundle says what teacher and student answered to its open prompts, and whether that was right.
What it does not say is how sure the student was: each prompt is put to the student as it is served,
and the log-probabilities of its first tokens are kept. From these it follows what a cascade would
have answered with any rule: the teacher's recorded answer where the student is not believed, its
own elsewhere.

    kept     of what the teacher gets right, the share that the cascade gets right
    calls    share of the prompts that go to the teacher

The rule is chosen on every second prompt, in the order of their ids: of all weights and thresholds
with at least KEPT of the teacher's right answers the one with the fewest calls; where that takes
more than CALLS, the one that keeps most with at most CALLS. What it gives on the other half is what
is promised, with Jeffreys' intervals; where an interval does not lie wholly on the good side of its
limit, the promise was not shown, and that is said.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from compress.doors import (
    NUMBER,
    TABLE,
    TEXT,
    Kind,
    check_object,
    json_lines,
    optional,
    read_json,
    whole,
)
from compress.errors import ConfigError
from compress.score.quantiles import jeffreys_interval
from compress.serve.asked import Asked, Refusal
from compress.serve.settings import Rule
from compress.serve.student import Student

KEPT, CALLS = 0.95, 0.30
WEIGHTS = (0.0, 0.5, 1.0)  # of the lowest log-probability: the mean alone, both, the lowest alone
ROWS = 20  # right answers of the teacher in a half, below which a share of them says nothing
FILE = "cascade.json"
PROMPTS, ANSWERS = "open_prompts.jsonl", "open_answers.jsonl"
SCHEMA = 1
KINDS = {
    "schema": Kind(str(SCHEMA), lambda value: value == SCHEMA),
    "threshold": NUMBER,
    "tokens": whole(1, 1000),
    "weight": Kind("a number in [0, 1]", lambda value: NUMBER.holds(value) and 0 <= value <= 1),
    "model": TEXT,
    "heldout": optional(TABLE),
    "chosen_on": optional(TABLE),
    "verdict": optional(TEXT),
    "sentence": optional(TEXT),
}


class Row(NamedTuple):
    """A prompt: whose recorded answer is right, and the student's first log-probabilities."""

    teacher_right: bool
    student_right: bool
    logprobs: list[float]


class Share(NamedTuple):
    """A share of `of` prompts, with its 95% interval."""

    value: float
    low: float
    high: float
    of: int


class Outcome(NamedTuple):
    """What a rule gives on some prompts."""

    kept: Share
    calls: Share

    @property
    def verdict(self) -> str:
        """met, missed, or undecided where an interval holds its limit."""
        if self.kept.low >= KEPT and self.calls.high <= CALLS:
            return "met"
        if self.kept.high < KEPT or self.calls.low > CALLS:
            return "missed"
        return "undecided"


def share(count: int, of: int) -> Share:
    """A share with Jeffreys' interval."""
    return Share(count / of if of else float("nan"), *jeffreys_interval(count, of), of)


def outcome(rows: Sequence[Row], rule: Rule) -> Outcome:
    """What a cascade by `rule` would have answered."""
    asked = [not rule.believes(row.logprobs) for row in rows]
    to_keep = [(row, call) for row, call in zip(rows, asked, strict=True) if row.teacher_right]
    kept = sum(call or row.student_right for row, call in to_keep)
    return Outcome(share(kept, len(to_keep)), share(sum(asked), len(rows)))


def choose(rows: Sequence[Row], tokens: int) -> Rule:
    """The rule that keeps enough with the fewest calls, or the most with few enough."""
    best: tuple[tuple[float, float], Rule] | None = None
    for weight in WEIGHTS:
        base = Rule(0.0, tokens, weight)
        certainties = sorted({base.certainty(row.logprobs) for row in rows})

        # Each threshold between two rows, and one below and one above all.
        between = [(a + b) / 2 for a, b in zip(certainties, certainties[1:], strict=False)]
        for threshold in (certainties[0] - 1.0, *between, certainties[-1] + 1.0):
            rule = Rule(threshold, tokens, weight)
            kept, calls = _counts(rows, rule)
            rank = (1.0, -calls) if kept >= KEPT and calls <= CALLS else (0.0, kept)
            if calls <= CALLS and (best is None or rank > best[0]):
                best = (rank, rule)
    assert best is not None, "a threshold below all asks nobody"
    return best[1]


def _counts(rows: Sequence[Row], rule: Rule) -> tuple[float, float]:
    """Shares kept and called, without intervals."""
    asked = [not rule.believes(row.logprobs) for row in rows]
    pairs = zip(rows, asked, strict=True)
    kept = [call or row.student_right for row, call in pairs if row.teacher_right]
    return sum(kept) / len(kept), sum(asked) / len(rows)


def calls_needed(rows: Sequence[Row], rule: Rule) -> float:
    """The smallest share of calls by which KEPT would be reached on these rows, with the rule's
    weight and any threshold.
    """
    certainties = {rule.certainty(row.logprobs) for row in rows}
    thresholds = [*certainties, max(certainties) + 1.0]
    reached = []
    for threshold in thresholds:
        kept, calls = _counts(rows, Rule(threshold, rule.tokens, rule.weight))
        if kept >= KEPT:
            reached.append(calls)
    return min(reached)


def calibrated(rows: Sequence[Row], tokens: int, model: str) -> dict[str, Any]:
    """The rule chosen on one half, what it gives on both, and a sentence: what FILE holds.
    ValueError: too few right answers of the teacher.
    """
    halves = rows[::2], rows[1::2]
    for half in halves:
        if (right := sum(row.teacher_right for row in half)) < ROWS:
            raise ValueError(
                f"the teacher is right on {right} of {len(half)} prompts of a half, at least"
                f" {ROWS} are needed to say what is kept of it; make the bundle with more open"
                " prompts"
            )

    rule = choose(halves[0], tokens)
    chosen_on, heldout = outcome(halves[0], rule), outcome(halves[1], rule)
    return {
        "schema": SCHEMA,
        **asdict(rule),
        "model": model,
        "chosen_on": _plain(chosen_on),
        "heldout": _plain(heldout),
        "verdict": heldout.verdict,
        "sentence": _sentence(heldout, calls_needed(halves[1], rule)),
    }


def _plain(result: Outcome) -> dict[str, Any]:
    return {"kept": result.kept._asdict(), "calls": result.calls._asdict()}


def _sentence(heldout: Outcome, needed: float) -> str:
    kept, calls = heldout
    figures = (
        f"on {calls.of} held-out prompts {kept.value:.1%} ({kept.low:.1%} to {kept.high:.1%}) of"
        f" the teacher's {kept.of} right answers are kept with {calls.value:.1%} ({calls.low:.1%}"
        f" to {calls.high:.1%}) of its calls"
    )
    promise = f"at least {KEPT:.0%} with at most {CALLS:.0%}"
    return {
        "met": f"the promise of {promise} holds: {figures}",
        "missed": (
            f"the promise of {promise} can't be met: {figures}; {KEPT:.0%} would take"
            f" {needed:.0%} of the calls there"
        ),
        "undecided": f"the promise of {promise} is not shown: {figures}",
    }[heldout.verdict]


def questions(bundle: Path) -> list[tuple[str, bool, bool]]:
    """(prompt, whether the teacher's answer is right, whether the student's is) in the order of
    their ids. ValueError: the bundle has none, or they are malformed.
    """
    if not (bundle / PROMPTS).is_file() or not (bundle / ANSWERS).is_file():
        raise ValueError(
            f"{bundle} has no {PROMPTS} with {ANSWERS}, on which alone a threshold can be"
            " calibrated; make the bundle with eval.open_prompts, or give --threshold NUMBER"
        )
    try:
        texts = {row["id"]: row["prompt"] for _, row in json_lines(bundle / PROMPTS)}
        rows = {row["id"]: row for _, row in json_lines(bundle / ANSWERS)}
        return [
            (texts[name], bool(row["teacher"]["right"]), bool(row["student"]["right"]))
            for name, row in sorted(rows.items())
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"malformed {bundle}: {error} in {PROMPTS} or {ANSWERS}") from error


async def calibrate(student: Student, bundle: Path, model: str, tokens: int = 16) -> dict[str, Any]:
    """Puts a bundle's open prompts to its student as it is served; returns what FILE holds.

    `model`: digest of the served file. ValueError as `questions` and `calibrated`, and where the
    student has no chat template or does not answer.
    """
    ready = student.ready()
    if not ready.templated:
        raise ValueError(
            f"{student.backend.target.name} has no chat template, and so is not calibrated; give"
            " --threshold NUMBER"
        )
    free = asyncio.Semaphore(ready.parallel)

    async def row(prompt: str, teacher_right: bool, student_right: bool) -> Row:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": tokens,
        }
        async with free:
            probe = await student.probe(Asked("/v1/chat/completions", body), tokens)
        return Row(teacher_right, student_right, probe.logprobs)

    try:
        rows = await asyncio.gather(*(row(*question) for question in questions(bundle)))
    except Refusal as refusal:
        raise ValueError(f"a prompt of {bundle / PROMPTS} gets no answer: {refusal}") from refusal
    return calibrated(rows, tokens, model)


def read_rule(text: str, model: str) -> Rule:
    """`--threshold`: a number, or a file that `--calibrate` wrote for the model with this digest.

    ConfigError: neither. ValueError: the file is malformed.
    """
    try:
        return Rule(float(text))
    except ValueError:
        path = Path(text)
    if not path.is_file():
        raise ConfigError(
            f"--threshold {text!r} is neither a number of nats a token, as -0.8, nor a file that"
            " `compress serve BUNDLE --calibrate FILE` wrote"
        )
    return rule_in(path, model)


def rule_in(path: Path, model: str) -> Rule:
    """The rule that a file holds. ValueError: malformed, or made for another model."""
    fields = check_object(read_json(path), KINDS, path)
    if fields["model"] != model:
        raise ValueError(
            f"{path} was calibrated with another model than the one that is served; calibrate it"
            " again with: compress serve BUNDLE --calibrate FILE"
        )
    return Rule(float(fields["threshold"]), fields["tokens"], float(fields["weight"]))


def written(calibration: dict[str, Any]) -> str:
    """As text for FILE."""
    return json.dumps(calibration, indent=2, allow_nan=False) + "\n"
