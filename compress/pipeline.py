"""The loop: stage -> measure -> judge -> record; then export, judge what ships, bundle, report.
Read this file first.

A recipe is a list of slots. Each slot's stage turns one checkpoint directory into another inside
the content-addressed store, where it appears whole or not at all; an identical stage is found there
instead of being run. Weights are committed before they are scored, so a crash while scoring loses
no training, and repeating a command continues where it stopped.
"""

import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compress import budget, formats, planning
from compress.config import Recipe
from compress.errors import EXIT_BUDGET, EXIT_OK, exit_code
from compress.keys import EXPORTS, sources_digest, versions_of
from compress.models.checkpoint import Model, model_of
from compress.report.html import write_html
from compress.report.records import load_run
from compress.report.table import print_table, stage_table, verdict_lines
from compress.rundir import RunDir, now, reserved
from compress.score import payoff
from compress.score.intervals import Scores
from compress.score.measured import Measured
from compress.score.size import size
from compress.score.talk import has_template
from compress.session import Session, check_shapes, log, plain, thinned
from compress.ship.bundle import write_bundle
from compress.stages.training import Keep, Optimization
from compress.store import sha256_json
from compress.train import parallel


def build(session: Session, slot: str, parent: Measured, key: str, inputs: dict[str, Any]) -> Path:
    """Run a slot's stage. What varies from run to run, its time and its curve, is noted before the
    weights are finished: no kill can lose it.
    """
    stage, start = session.recipe.stages[slot], time.monotonic()
    curve: list[dict[str, float]] = []

    def make(out: Path, work: Path) -> dict[str, float]:
        if isinstance(stage, Optimization):
            parallel.share((slot, parent.model.path, work))
        metrics = stage.run(parent.model.path, out, session.context(slot, work, curve))
        session.store.note(key, {"seconds": time.monotonic() - start, "curve": curve})
        return metrics

    return session.store.build(key, inputs, make)


def conclude(
    session: Session,
    folder: RunDir,
    slot: str,
    technique: str,
    model: Model,
    parent: Measured | None = None,
    *,
    key: str = "",
    tasks: bool = True,
    asked: str = "quarter",
    timed: bool = False,
    shipped: bool = False,
    proven: str = "",
    seconds: float = 0.0,
    curve: list[dict[str, Any]] | None = None,
    **made: Any,
) -> Measured:
    """Measure a model, put it beside teacher and parent, judge it, and record it with how it was
    `made`, in the store under `key` if it was.

    Limits written for the slot are enforced; the budget's own limits are enforced on what ships and
    show the distance elsewhere. `asked`: which open prompts, as `Scorer.measure` takes it.
    `proven`: the name of a file in `export.files` that must be its parent's weights. The trackers
    get the whole `curve`, the record a thinned one.
    """
    log(f"{slot}: scoring ({model.runtime})")
    start, limits = time.monotonic(), session.recipe.budget
    teacher, wanted = session.done.get("teacher"), [limits.slots.get(slot, {}), limits.limits]
    measured = session.scorer.measure(
        model, tasks=tasks, asked=asked, timed=timed, against=teacher, limits=wanted
    )
    near = session.scorer.beside(measured, teacher, parent) if teacher else Scores({}, {}, [])
    scores, intervals, excluded = (
        measured.scores | near.scores,
        measured.intervals | near.intervals,
        near.excluded,
    )
    verdicts = [
        v
        for some, own in zip(wanted, (True, shipped), strict=True)
        for v in budget.judge(scores, intervals, some, enforced=own)
    ]
    record: dict[str, Any] = {
        "slot": slot,
        "technique": technique,
        "runtime": model.runtime,
        "parent": parent.record["slot"] if parent else None,
        "digest": model.digest,
        "scores": scores,
        "intervals": intervals,
        "rows": measured.rows | dict(near.rows),
        "excluded_tasks": excluded,
        "verdicts": verdicts,
        "latency": measured.latency,
        "seconds": {"stage": seconds, "score": time.monotonic() - start},
        "key": key,
        "reused": False,
        "metrics": session.store.stage_json(key)["metrics"] if key else {},
        "stage_config": {},
    } | made
    if curve is not None:
        record["curve"] = thinned(curve)
    if measured.answers and not has_template(model):
        record["open_form"] = "plain"  # asked without a chat template
        log(f"{slot}: no chat template; the open prompts are put as plain text")
    if note := payoff_note(session, slot, measured, near, parent):
        record["payoff"] = note
    if parent and proven:
        record["metrics"] |= session.scorer.parity(measured, parent, proven)
    return replace(measured, record=folder.add(record, measured, curve or []))


def payoff_note(
    session: Session, slot: str, measured: Measured, near: Scores, parent: Measured | None
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
    limits = session.recipe.budget
    metrics = [*limits.slots.get(slot, {}), *limits.limits]
    before = parent.record.get("rows", {}) if parent is not teacher else {}
    found = payoff.changes(measured, parent, near.rows, before, teacher, metrics)
    told, better = payoff.sentence(found), payoff.paid(found)
    kept = slot if better or stage.keep is Keep.always else parent.record["slot"]
    log(f"{slot} {told}" + ("" if kept == slot else f"; keep=better: {kept} goes on in its place"))
    return {"paid": better, "sentence": told, "kept": kept}


def plan(recipe: Recipe) -> int:
    """Print what the recipe would cost; nothing but the teacher's import is done."""
    session = Session(recipe)
    costs = planning.estimate(session, check_shapes(session), planning.matmul_flops_per_sec())
    planning.print_plan(costs, session.store.root)
    planning.check_disk(session, costs)
    return EXIT_OK


def run(recipe: Recipe, run_dir: Path, command: list[str]) -> int:
    """Execute a recipe. Returns the exit code: 0, or 4 when an enforced limit is violated.

    With several processes, those that `compress COMMAND` starts, or torchrun did, train beside this
    one.
    """
    with parallel.followers(recipe.trainer.count(), command):
        if parallel.rank() > 0:
            return _follow(recipe)
        with reserved(run_dir) as folder:
            return _lead(recipe, folder)


def _follow(recipe: Recipe) -> int:
    """Train whatever rank 0 trains, until it says that nothing more comes."""
    session: Session | None = None
    while (task := parallel.share()) is not None:
        slot, parent, work = task
        session = session or Session(
            recipe
        )  # opened only now: rank 0 has imported the teacher and packed the text
        with tempfile.TemporaryDirectory() as nowhere, suppress(parallel.Followed):
            session.recipe.stages[slot].run(parent, Path(nowhere), session.context(slot, work, []))
    return EXIT_OK


def _lead(recipe: Recipe, run_dir: Path) -> int:
    session = Session(recipe)
    planning.check_disk(session, planning.estimate(session, check_shapes(session), rate=1.0))
    session.open_data()
    folder = RunDir(run_dir, session)
    log(f"run directory {folder.path}")
    try:
        code = _slots(session, folder)
        parallel.share(None)
    except BaseException as error:
        folder.finish(exit_code(error))
        raise
    folder.finish(code)
    return code


def _slots(session: Session, folder: RunDir) -> int:
    recipe = session.recipe
    if session.teacher.path.parent == session.store.root / "entries":
        folder.name_key(session.teacher.path.name)
    session.done["teacher"] = conclude(
        session, folder, "teacher", "teacher", session.teacher, asked="all", timed=True
    )
    for slot, parent_slot in recipe.steps():
        parent, technique = session.done[parent_slot], recipe.technique(slot)
        inputs = session.inputs(slot, parent.model.digest)
        key = sha256_json(inputs)
        folder.name_key(key)
        reused = session.store.has(key)
        log(
            f"{slot}: {technique} from {parent_slot}"
            + (" (reused from the store)" if reused else "")
        )
        path = session.store.entry(key) if reused else build(session, slot, parent, key, inputs)
        note: dict[str, Any] = {"seconds": 0.0, "curve": []} | session.store.note(key)
        ships = slot == recipe.shipped_slot() and not recipe.export.files
        done = conclude(
            session,
            folder,
            slot,
            technique,
            model_of(path),
            parent,
            key=key,
            asked="all" if ships else "quarter",
            timed=ships,
            shipped=ships,
            reused=reused,
            stage_config=plain(asdict(recipe.stages[slot])),
            **note,
        )
        kept = done.record.get("payoff", {}).get("kept", slot)
        session.done[slot] = done if kept == slot else parent
    return ship(session, folder)


def ship(session: Session, folder: RunDir) -> int:
    """Export the shipped slot, judge the files, bundle them, print the table and write the page."""
    recipe = session.recipe
    source = session.done[recipe.shipped_slot()]
    if session.teacher.gguf and any(
        formats.parse(name)[0].runtime == "llama.cpp" for name in recipe.export.files
    ):
        conclude(
            session,
            folder,
            "teacher_gguf",
            "teacher",
            model_of(session.teacher.gguf),
            tasks=False,
            timed=True,
        )
    shipped = [
        _export(session, folder, source, name, first=number == 0)
        for number, name in enumerate(recipe.export.files)
    ]
    verdicts = [verdict for record in folder.records for verdict in record["verdicts"]]
    code = EXIT_BUDGET if budget.failed(verdicts, strict=recipe.budget.strict) else EXIT_OK
    folder.about |= {"exit": code, "finished": now()}
    folder.write()
    finished = load_run(folder.path)
    bundle = write_bundle(
        folder.place_for_bundle(),
        finished,
        source.model.path,
        shipped,
        session.teacher,
        passed=code == EXIT_OK,
        prompts=session.scorer.prompts,
    )
    write_html([finished], folder.path / "report.html")
    print_table(stage_table(finished.records))
    print("\n".join(verdict_lines(finished.records)))
    print(
        f"\nbundle  {bundle}\nreport  {folder.path / 'report.html'}\nverify  compress verify"
        f" {bundle}"
    )
    if code:
        log("the budget is violated: the bundle is written and marked; exit 4")
    return code


def export_inputs(name: str, model: Model) -> dict[str, Any]:
    """All that determines the bytes of a file, `name` in `export.files`, of a checkpoint; its
    digest is the file's key.
    """
    format = formats.parse(name)[0]
    versions = versions_of(*EXPORTS, *format.packages)
    return {
        "export": name,
        "checkpoint": model.digest,
        "versions": versions,
        "sources": sources_digest(format.source),
        "schema": 4,
    }


def _export(
    session: Session, folder: RunDir, source: Measured, name: str, *, first: bool
) -> Measured:
    """One shipped file: written through the store, timed in its runtime and proven to be its
    checkpoint.

    The first one is scored in full and judged by the budget. Others hold the same numbers, which
    parity proves: they are not asked again.
    """
    format, type, _ = formats.parse(name)
    inputs = export_inputs(name, source.model)
    file, key, start = format.file.format(type=type), sha256_json(inputs), time.monotonic()
    folder.name_key(key)

    def write(out: Path, work: Path) -> dict[str, float]:
        format.module.write(source.model.path, out / file, type)
        return size(out / file)

    path = session.store.build(key, inputs, write) / file
    seconds = time.monotonic() - start
    slot, technique = formats.slot_of(name)
    return conclude(
        session,
        folder,
        slot,
        technique,
        model_of(path),
        source,
        key=key,
        tasks=first,
        asked="all" if first else "none",
        timed=True,
        shipped=first,
        proven=name,
        seconds=seconds,
    )
