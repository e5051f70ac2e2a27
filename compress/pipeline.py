"""The loop: stage -> measure -> judge -> record; then export, judge what ships, bundle, report.
Read this file first.

A recipe is a list of slots. Each slot's stage turns one checkpoint directory into another inside
the content-addressed store, where it appears whole or not at all; an identical stage is found there
instead of being run. Weights are committed before they are scored, so a crash while scoring loses
no training, and repeating a command continues where it stopped.
"""

import time
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from compress import budget, formats, planning
from compress.config import Recipe
from compress.errors import EXIT_BUDGET, EXIT_OK, exit_code, is_full
from compress.judging import Candidate, conclude
from compress.keys import EXPORTS, sources_digest, versions_of
from compress.models.checkpoint import Model, model_of
from compress.report.html import write_html
from compress.report.records import Run, load_run
from compress.report.table import print_table, stage_table, verdict_lines
from compress.rundir import RunDir, now, reserved
from compress.score.measured import Measured
from compress.score.size import size
from compress.scratch import Scratch
from compress.session import Session, check_calibration, check_shapes, log, plain
from compress.ship.bundle import write_bundle
from compress.ship.signature import private_key
from compress.ship.sums import sign_bundle
from compress.stages.training import Optimization
from compress.store import sha256_json
from compress.train import parallel
from compress.train.packed import Packed


def build(session: Session, slot: str, parent: Measured, key: str, inputs: dict[str, Any]) -> Path:
    """Run a slot's stage. What varies from run to run, its time and its curve, is noted before the
    weights are finished: no kill can lose it.
    """
    stage = session.recipe.stages[slot]
    start = time.monotonic()
    curve: list[dict[str, float]] = []

    def make(out: Path, work: Path) -> dict[str, float]:
        if isinstance(stage, Optimization):
            parallel.share((slot, parent.model.path, work))
        metrics = stage.run(
            parent.model.path, out, session.context(slot, parent.model.path, work, curve)
        )
        session.store.note(key, {"seconds": time.monotonic() - start, "curve": curve})
        return metrics

    return session.store.build(key, inputs, make)


def plan(recipe: Recipe) -> int:
    """Print what the recipe would cost; nothing but the teacher's import is done."""
    session = Session(recipe)
    shapes = check_shapes(session)
    rate = planning.rate_of(session, shapes["teacher"])
    costs = planning.estimate(session, shapes, rate)
    planning.print_plan(costs, session.store.root)
    planning.check_disk(session, costs)
    planning.check_memory(costs, planning.room_here())
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
        # Opened only now: rank 0 has imported the teacher and packed the text.
        session = session or Session(recipe)
        with Scratch() as nowhere, suppress(parallel.Followed):
            context = session.context(slot, parent, work, [])
            session.recipe.stages[slot].run(parent, nowhere, context)
    return EXIT_OK


def _lead(recipe: Recipe, run_dir: Path) -> int:
    """Execute the recipe and record it in `run_dir`, also how it ended. Returns the exit code."""
    # Nothing is written before all that can be refused was.
    if key := recipe.export.sign_key:
        private_key(Path(key).expanduser())
    session = Session(recipe)
    shapes = check_shapes(session)
    costs = planning.estimate(session, shapes, rate=1.0)
    planning.check_disk(session, costs, run_dir)
    planning.check_memory(costs, planning.room_here())
    folder: RunDir | None = None
    try:
        session.open_data()
        check_calibration(session, shapes)

        folder = RunDir(run_dir, session)
        log(f"run directory {folder.path}")
        code = _slots(session, folder)
        parallel.share(None)
    except BaseException as error:
        done: list[str] = []
        if folder:
            folder.finish(exit_code(error))
            done = folder.about["slots"]
        if is_full(error):
            raise planning.told_needs(error, session, costs, done) from error
        raise
    folder.finish(code)
    return code


def _slots(session: Session, folder: RunDir) -> int:
    """The teacher, every slot in order, then what ships. Returns the exit code."""
    recipe = session.recipe
    if session.teacher.path.parent == session.store.root / "entries":
        folder.name_key(session.teacher.path.name)
    teacher = Candidate("teacher", "teacher", session.teacher)
    session.done["teacher"] = conclude(session, folder, teacher, asked="all", timed=True)

    for slot, parent_slot in recipe.steps():
        candidate = _stage_candidate(session, folder, slot, parent_slot)
        ships = slot == recipe.shipped_slot() and not recipe.export.files
        done = conclude(
            session,
            folder,
            candidate,
            asked="all" if ships else "quarter",
            timed=ships,
            shipped=ships,
        )

        # Where the stage bought nothing and keep=better, its parent goes on in its place.
        kept = done.record.get("payoff", {}).get("kept", slot)
        session.done[slot] = done if kept == slot else session.done[parent_slot]
    return ship(session, folder)


def _stage_candidate(session: Session, folder: RunDir, slot: str, parent_slot: str) -> Candidate:
    """What a slot's stage makes of its parent, from the store if it is there."""
    parent = session.done[parent_slot]
    technique = session.recipe.technique(slot)
    inputs = session.inputs(slot, parent.model)
    key = sha256_json(inputs)
    folder.name_key(key)

    reused = session.store.has(key)
    log(f"{slot}: {technique} from {parent_slot}" + (" (reused from the store)" if reused else ""))
    path = session.store.entry(key) if reused else build(session, slot, parent, key, inputs)

    note: dict[str, Any] = {"seconds": 0.0, "curve": []} | session.store.note(key)
    return Candidate(
        slot,
        technique,
        model_of(path),
        parent,
        key,
        note["seconds"],
        note["curve"],
        reused,
        plain(asdict(session.recipe.stages[slot])),
    )


def ship(session: Session, folder: RunDir) -> int:
    """Export the shipped slot, judge the files, bundle them, print the table and write the page."""
    recipe = session.recipe
    source = session.done[recipe.shipped_slot()]

    # A GGUF's times are compared with those of the teacher's own GGUF, where it came as one.
    if session.teacher.gguf and any(
        formats.parse(name)[0].runtime == "llama.cpp" for name in recipe.export.files
    ):
        teacher_gguf = Candidate("teacher_gguf", "teacher", model_of(session.teacher.gguf))
        conclude(session, folder, teacher_gguf, tasks=False, timed=True)
    shipped = [
        _export(session, folder, source, name, first=number == 0)
        for number, name in enumerate(recipe.export.files)
    ]

    # The record of the run is whole before the bundle is made of it.
    verdicts = list(chain.from_iterable(record["verdicts"] for record in folder.records))
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
    if key := recipe.export.sign_key:
        sign_bundle(bundle, Path(key).expanduser())
    _report(finished, folder.path / "report.html", bundle)
    if code:
        log("the budget is violated: the bundle is written and marked; exit 4")
    return code


def _report(finished: Run, page: Path, bundle: Path) -> None:
    """The run's HTML page; its table, verdicts and places on stdout."""
    write_html([finished], page)
    print_table(stage_table(finished.records))
    print("\n".join(verdict_lines(finished.records)))
    print(f"\nbundle  {bundle}\nreport  {page}\nverify  compress verify {bundle}")


def export_inputs(name: str, model: Model, text: Packed | None = None) -> dict[str, Any]:
    """All that determines the bytes of a file, `name` in `export.files`, of a checkpoint, and where
    its type is calibrated of training text; its digest is the file's key.
    """
    format = formats.parse(name)[0]
    versions = versions_of(*EXPORTS, *format.packages, *format.optional)
    calibrated = {"data": text.digest} if text else {}
    return calibrated | {
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
    format, type, kind = formats.parse(name)
    text = session.text(source.model.path) if kind.calibrated else None
    inputs = export_inputs(name, source.model, text)
    file = format.place(type)
    key = sha256_json(inputs)
    slot, technique = formats.slot_of(name)
    start = time.monotonic()
    folder.name_key(key)

    def told(line: str) -> None:
        log(f"{slot}: {line}")

    def write(out: Path, work: Path) -> dict[str, float]:
        calibration = [text.ids[:, :-1].long(), told] if text else []
        figures = format.module.write(source.model.path, out / file, type, *calibration) or {}
        if figures:
            told(", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        return size(out / file) | figures

    path = session.store.build(key, inputs, write) / file
    seconds = time.monotonic() - start

    return conclude(
        session,
        folder,
        Candidate(slot, technique, model_of(path), source, key, seconds),
        tasks=first,
        asked="all" if first else "none",
        timed=True,
        shipped=first,
        proven=name,
    )
