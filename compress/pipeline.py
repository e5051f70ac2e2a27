"""The loop: stage -> measure -> judge -> record; then export, judge what ships, bundle, report. Read this file first.

A recipe is a list of slots. Each slot's stage turns one checkpoint directory into another inside the content-addressed store,
where it appears whole or not at all; an identical stage is found there instead of being run. Weights are committed before they are
scored, so a crash while scoring loses no training, and repeating a command continues where it stopped.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress import budget, machine, planning
from compress.checkpoint import digest, tokenizer_digest
from compress.config import Budget, Recipe
from compress.errors import EXIT_BUDGET, EXIT_OK, exit_code
from compress.export import formats
from compress.rundir import RunDir, now, thinned
from compress.score.scorer import Measured, Model
from compress.session import Done, Session, check_shapes, log, plain
from compress.stages.optimization import Optimization
from compress.store import sha256_json
from compress.train import parallel


def build(session: Session, slot: str, parent: Done) -> tuple[Path, str, bool, float]:
    """Run a slot's stage unless the store has its result. Returns (directory, key, reused, seconds)."""
    inputs = session.inputs(slot, parent.model.digest)
    key = sha256_json(inputs)
    reused, start, curve = session.store.has(key), time.monotonic(), []  # type: ignore[var-annotated]
    stage = session.recipe.stages[slot]

    def make(out: Path, work: Path) -> dict[str, float]:
        if isinstance(stage, Optimization):
            parallel.share((slot, parent.model.path, work))
        return stage.run(parent.model.path, out, session.context(slot, work, curve))

    path = session.store.build(key, inputs, make)
    if not reused:
        session.store.note(key, {"seconds": time.monotonic() - start, "curve": curve})
    return path, key, reused, session.store.note(key).get("seconds", 0.0)


def score(
    session: Session, slot: str, technique: str, model: Model, *, parent: Done | None, tasks: bool = True, shipped: bool = False
) -> tuple[Measured, dict[str, Any]]:
    """Measure a model, put it beside teacher and parent, judge it. Returns the measurement and the record's part about it.

    Limits written for the slot are enforced; the budget's own limits are enforced on what ships and show the distance elsewhere.
    """
    log(f"{slot}: scoring ({model.runtime})")
    start = time.monotonic()
    measured = session.scorer.measure(model, tasks=tasks)
    scores, intervals, excluded = dict(measured.scores), {}, []  # type: ignore[var-annotated]
    teacher = session.done.get("teacher")
    if teacher is not None:
        relative, intervals, excluded = session.scorer.beside(measured, teacher.measured, parent.measured if parent else None)
        scores |= relative
    record = {
        "slot": slot, "technique": technique, "runtime": model.runtime, "parent": parent.record["slot"] if parent else None,
        "digest": model.digest, "scores": scores, "intervals": intervals, "excluded_tasks": excluded,
        "verdicts": judge(session.recipe.budget, slot, scores, intervals, shipped=shipped),
        "seconds": {"stage": 0.0, "score": time.monotonic() - start},
        "metrics": {}, "key": "", "reused": False, "stage_config": {},
    }  # fmt: skip
    return measured, record


def plan(recipe: Recipe) -> int:
    """Print what the recipe would cost; nothing but the teacher's import is done."""
    session = Session(recipe)
    costs = planning.estimate(session, check_shapes(session), planning.matmul_flops_per_sec())
    planning.print_plan(session, costs, session.store.root)
    planning.check_disk(session, costs)
    return EXIT_OK


def judge(limits: Budget, slot: str, scores: dict[str, float], intervals: dict[str, Any], *, shipped: bool) -> list[dict[str, Any]]:
    """Verdicts of a slot: its own limits, then the budget's."""
    own = budget.judge(scores, intervals, limits.slots.get(slot, {}), enforced=True)
    return own + budget.judge(scores, intervals, limits.limits, enforced=shipped)


def run(recipe: Recipe, run_dir: Path, command: list[str]) -> int:
    """Execute a recipe. Returns the exit code: 0, or 4 when an enforced limit is violated.

    With several processes, those that `compress COMMAND` starts, or torchrun did, train beside this one.
    """
    with parallel.followers(recipe.trainer.count(), command):
        return _follow(recipe) if parallel.rank() > 0 else _lead(recipe, run_dir)


def _follow(recipe: Recipe) -> int:
    """Train whatever rank 0 trains, until it says that nothing more comes."""
    session: Session | None = None
    while (task := parallel.share()) is not None:
        slot, parent, work = task
        session = session or Session(recipe)  # opened only now: rank 0 has imported the teacher and packed the text
        with tempfile.TemporaryDirectory() as nowhere, suppress(parallel.Followed):
            session.recipe.stages[slot].run(parent, Path(nowhere), session.context(slot, work, []))
    return EXIT_OK


def _lead(recipe: Recipe, run_dir: Path) -> int:
    session = Session(recipe)
    planning.check_disk(session, planning.estimate(session, check_shapes(session), rate=1.0))
    session.open_data()
    folder = RunDir(run_dir, recipe, session)
    log(f"run directory {folder.path}")
    code = 1
    try:
        code = _slots(session, folder)
        parallel.share(None)
        return code
    except BaseException as error:
        code = exit_code(error)
        raise
    finally:
        folder.finish(code)


def _slots(session: Session, folder: RunDir) -> int:
    recipe = session.recipe
    if session.teacher.path.parent == session.store.root / "entries":
        folder.name_key(session.teacher.path.name)
    teacher = Model(session.teacher.path, session.teacher.digest)
    measured, record = score(session, "teacher", "teacher", teacher, parent=None)
    session.done["teacher"] = Done(teacher, "", measured, folder.add(record, measured, []))
    for slot, parent_slot in recipe.steps():
        parent = session.done[parent_slot]
        key = sha256_json(session.inputs(slot, parent.model.digest))
        folder.name_key(key)
        log(f"{slot}: {recipe.technique(slot)} from {parent_slot}" + (" (reused from the store)" if session.store.has(key) else ""))
        path, key, reused, seconds = build(session, slot, parent)
        model = Model(path, digest(path))
        measured, record = score(
            session, slot, recipe.technique(slot), model, parent=parent, shipped=slot == recipe.shipped_slot() and not recipe.export.files
        )
        record |= {
            "key": key,
            "reused": reused,
            "stage_config": plain(asdict(recipe.stages[slot])),
            "metrics": session.store.stage_json(key)["metrics"],
        }
        record["seconds"]["stage"] = seconds
        record["curve"] = thinned(session.store.note(key).get("curve", []))
        session.done[slot] = Done(model, key, measured, folder.add(record, measured, session.store.note(key).get("curve", [])))
    return ship(session, folder)


def ship(session: Session, folder: RunDir) -> int:
    """Export the shipped slot, judge the files, bundle them, print the table and write the page."""
    from compress.export.bundle import write_bundle
    from compress.report.html import write_html
    from compress.report.records import load_run
    from compress.report.table import print_table, stage_table, verdict_lines

    recipe = session.recipe
    source = session.done[recipe.shipped_slot()]
    if session.teacher.gguf and any(formats.parse(name)[0].runtime == "llama.cpp" for name in recipe.export.files):
        baseline = Model(session.teacher.gguf, digest(session.teacher.gguf), "llama.cpp")
        measured, record = score(session, "teacher_gguf", "teacher", baseline, parent=None, tasks=False)
        folder.add(record, measured, [])
    shipped = [_export(session, folder, source, name, first=number == 0) for number, name in enumerate(recipe.export.files)]
    finished = load_run(folder.path)
    verdicts = [v for record in finished.records for v in record["verdicts"]]
    code = EXIT_BUDGET if budget.failed(verdicts, strict=recipe.budget.strict) else EXIT_OK
    folder.about |= {"exit": code, "finished": now()}
    folder.write()
    finished = load_run(folder.path)
    bundle = write_bundle(folder.path / "bundle", finished, source.model.path, shipped, session.teacher, passed=code == EXIT_OK)
    write_html([finished], folder.path / "report.html")
    print_table(stage_table(finished.records))
    print("\n".join(verdict_lines(finished.records)))
    print(f"\nbundle  {bundle}\nreport  {folder.path / 'report.html'}\nverify  compress verify {bundle}")
    if code:
        log("the budget is violated: the bundle is written and marked; exit 4")
    return code


def _export(session: Session, folder: RunDir, source: Done, name: str, *, first: bool) -> Done:
    """One shipped file: written through the store, scored in its runtime, proven to be its checkpoint, judged by the budget if it is the first.

    All are scored in full, also when their tensors are those of the checkpoint: only files of the same bytes share scores.
    """
    format, type, _ = formats.parse(name)
    file = format.file.format(type=type)
    tokenizer, weights = tokenizer_digest(source.model.path), source.model.digest
    inputs = {"export": name, "weights": weights, "tokenizer": tokenizer, "versions": machine.versions(), "schema": 3}
    key = sha256_json(inputs)

    def make(out: Path, work: Path) -> dict[str, float]:
        return format.module.write(source.model.path, out / file, type)

    start = time.monotonic()
    folder.name_key(key)
    path = session.store.build(key, inputs, make) / file
    seconds = time.monotonic() - start
    model = Model(path, digest(path), format.runtime)
    measured, record = score(session, *formats.slot_of(name), model, parent=source, shipped=first)
    proof = session.scorer.parity(measured, source.measured, name)
    record |= {"key": key, "metrics": session.store.stage_json(key)["metrics"] | proof}
    record["seconds"]["stage"] = seconds
    return Done(model, key, measured, folder.add(record, measured, []))
