"""A model measured, judged by the budget and recorded: what every slot of a run ends with, and
every file that ships.
"""

import time
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from compress import budget
from compress.models.checkpoint import Model
from compress.rundir import RunDir
from compress.score import payoff
from compress.score.intervals import Scores
from compress.score.measured import Measured
from compress.score.talk import has_template
from compress.session import Session, log, thinned
from compress.stages.training import Keep, Optimization


@dataclass(frozen=True)
class Candidate:
    """A model that is about to be measured: its place in the run, and how it was made."""

    slot: str
    technique: str
    model: Model
    parent: Measured | None = None
    key: str = ""  # of the store, empty where the run did not make it
    seconds: float = 0.0  # that making it took
    curve: list[dict[str, Any]] | None = None  # of its training, a row a step; None: no stage
    reused: bool = False
    stage_config: dict[str, Any] = field(default_factory=dict)


class Judged(NamedTuple):
    """A model's own scores, what it is beside teacher and parent, and a verdict for every limit."""

    measured: Measured
    beside: Scores
    verdicts: list[dict[str, Any]]
    seconds: float  # to measure and judge


def conclude(
    session: Session,
    folder: RunDir,
    candidate: Candidate,
    *,
    tasks: bool = True,
    asked: str = "quarter",
    timed: bool = False,
    shipped: bool = False,
    proven: str = "",
) -> Measured:
    """Measure a candidate, judge it and record it. Returns it with its record.

    `tasks`, `asked`, `timed`: as `Scorer.measure` takes them. `shipped`: whether the budget's own
    limits are enforced. `proven`: the name of a file in `export.files` that must be its parent's
    weights.
    """
    judged = measure_and_judge(
        session, candidate, tasks=tasks, asked=asked, timed=timed, shipped=shipped
    )
    record = record_of(session, candidate, judged)
    if candidate.parent and proven:
        parity = session.scorer.parity(judged.measured, candidate.parent, proven)
        record["metrics"] |= parity

    # The trackers get the whole curve, the record has a thinned one.
    written = folder.add(record, judged.measured, candidate.curve or [])
    return replace(judged.measured, record=written)


def measure_and_judge(
    session: Session,
    candidate: Candidate,
    *,
    tasks: bool,
    asked: str,
    timed: bool,
    shipped: bool,
) -> Judged:
    """Score a candidate, put it beside teacher and parent, and compare it with every limit.

    Limits written for the slot are enforced; the budget's own limits are enforced on what ships and
    show the distance elsewhere.
    """
    log(f"{candidate.slot}: scoring ({candidate.model.runtime})")
    start = time.monotonic()
    limits = session.recipe.budget
    of_the_slot = limits.slots.get(candidate.slot, {})

    # An early stop may end the tasks once all of these limits are decided.
    teacher = session.done.get("teacher")
    measured = session.scorer.measure(
        candidate.model,
        tasks=tasks,
        asked=asked,
        timed=timed,
        against=teacher,
        limits=[of_the_slot, limits.limits],
    )
    beside = Scores({}, {}, [])
    if teacher:
        beside = session.scorer.beside(measured, teacher, candidate.parent)

    scores = measured.scores | beside.scores
    intervals = measured.intervals | beside.intervals
    verdicts = [
        *budget.judge(scores, intervals, of_the_slot, enforced=True),
        *budget.judge(scores, intervals, limits.limits, enforced=shipped),
    ]
    return Judged(measured, beside, verdicts, time.monotonic() - start)


def record_of(session: Session, candidate: Candidate, judged: Judged) -> dict[str, Any]:
    """What the run writes down about a candidate; report/records.py reads it back."""
    slot, parent, measured = candidate.slot, candidate.parent, judged.measured
    metrics = session.store.stage_json(candidate.key)["metrics"] if candidate.key else {}
    record: dict[str, Any] = {
        "slot": slot,
        "technique": candidate.technique,
        "runtime": candidate.model.runtime,
        "parent": parent.record["slot"] if parent else None,
        "digest": candidate.model.digest,
        "scores": measured.scores | judged.beside.scores,
        "intervals": measured.intervals | judged.beside.intervals,
        "rows": measured.rows | dict(judged.beside.rows),
        "excluded_tasks": judged.beside.excluded,
        "verdicts": judged.verdicts,
        "latency": measured.latency,
        "seconds": {"stage": candidate.seconds, "score": judged.seconds},
        "key": candidate.key,
        "reused": candidate.reused,
        "metrics": metrics,
        "stage_config": candidate.stage_config,
    }
    if candidate.curve is not None:
        record["curve"] = thinned(candidate.curve)

    # What a reader of the scores has to know, and the next slot's parent.
    if measured.answers and not has_template(candidate.model):
        record["open_form"] = "plain"  # asked without a chat template
        log(f"{slot}: no chat template; open prompts are put as plain text, Question: and Answer:")
    if note := payoff_note(session, slot, measured, judged.beside, parent):
        record["payoff"] = note
    return record


def payoff_note(
    session: Session, slot: str, measured: Measured, beside: Scores, parent: Measured | None
) -> dict[str, Any]:
    """Whether a stage that bought nothing but quality paid, said at once; {} for other stages.
    `kept`: whose weights go on.
    """
    stage, teacher = session.recipe.stages.get(slot), session.done.get("teacher")
    if (
        not isinstance(stage, Optimization)
        or stage.leaves_a_grid
        or parent is None
        or teacher is None
    ):
        return {}

    # What the budget limits is what the stage was to better; the teacher has no rows beside itself.
    limits = session.recipe.budget
    metrics = [*limits.slots.get(slot, {}), *limits.limits]
    parent_rows = parent.record.get("rows", {}) if parent is not teacher else {}
    changes = payoff.changes(measured, parent, beside.rows, parent_rows, teacher, metrics)
    sentence, better = payoff.sentence(changes), payoff.paid(changes)

    kept = slot if better or stage.keep is Keep.always else parent.record["slot"]
    log(
        f"{slot} {sentence}"
        + ("" if kept == slot else f"; keep=better: {kept} goes on in its place")
    )
    return {"paid": better, "sentence": sentence, "kept": kept}
