"""The loop: stage -> measure -> judge -> record; then export, judge what ships, bundle, report. Read this file first.

A recipe is a list of slots. Each slot's stage turns one checkpoint directory into another inside the content-addressed store,
where it appears whole or not at all; an identical stage is found there instead of being run. Weights are committed before they are
scored, so a crash while scoring loses no training, and repeating a command continues where it stopped.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from compress import budget, machine, planning
from compress.assets import PACKAGE, configs_dir
from compress.checkpoint import best_device, digest
from compress.config import Budget, Data, Eval, Recipe, Teacher, Trainer
from compress.errors import EXIT_BUDGET, EXIT_OK, ConfigError, exit_code
from compress.score.scorer import Measured, Model, Scorer, Settings
from compress.stages.context import Context
from compress.stages.optimization import Optimization
from compress.store import Store, file_table, sha256_json, sources_digest, write_json
from compress.teacher import OpenTeacher, open_teacher
from compress.track import Guarded, open_tracker
from compress.track import check as check_tracker
from compress.train import parallel
from compress.train.data import Packed, pack


def log(message: str) -> None:
    """Progress goes to stderr; results go to stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """Dataclasses, enums and paths as JSON."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def make_scorer(e: Eval, store: Store, heldout: Packed, teacher: OpenTeacher, threads: int) -> Scorer:
    """A scorer whose keys name the evaluation's settings, task files, held-out text and machine."""
    data_dir = Path(e.data_dir).expanduser() if e.data_dir else None
    folders = [configs_dir() / "tasks" / name for name in e.tasks] + [data_dir / name for name in e.tasks if data_dir]
    tasks = {str(folder.name): file_table(folder) for folder in folders if folder.is_dir()}
    settings = Settings(
        tuple(e.tasks), data_dir, e.limit, e.batch_size, e.heldout_sequences, e.prompt_tokens, e.new_tokens, e.repeats, threads,
        sha256_json(tasks), sha256_json(machine.describe(threads))[:16],
    )  # fmt: skip
    return Scorer(store, settings, heldout, teacher.path, log)


def open_scorer(teacher: Teacher, data: Data, eval: Eval, trainer: Trainer, store: str) -> tuple[Scorer, OpenTeacher]:
    """A scorer outside a run: what `compress score` and `compress accept` use."""
    import torch

    threads = trainer.threads or machine.available_threads()
    torch.set_num_threads(threads)
    home = Store(Path(store))
    opened = open_teacher(teacher.source, teacher.revision, home, log)
    return make_scorer(eval, home, pack(data.heldout, opened.path, data.seq_len, home.root / "data"), opened, threads), opened


@dataclass(frozen=True)
class Done:
    """A finished slot: its checkpoint, store key, scores and record."""

    model: Model
    key: str
    measured: Measured
    record: dict[str, Any]


@dataclass
class Session:
    """What all slots of one run share. Opening it refuses whatever can be refused before work starts."""

    recipe: Recipe
    threads: int = 0
    done: dict[str, Done] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        from compress.score.tasks import check_tasks

        for name in self.recipe.track.sinks:
            check_tracker(name)
        check_tasks(self.recipe.eval.tasks)
        check_batches(self.recipe)
        self.threads = self.recipe.trainer.threads or max(1, machine.available_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(self.threads)
        self.store = Store(Path(self.recipe.store))
        self.teacher: OpenTeacher = open_teacher(self.recipe.teacher.source, self.recipe.teacher.revision, self.store, log)
        check_context(self.teacher.path, self.recipe.data.seq_len)

    @property
    def precision(self) -> str:
        asked = self.recipe.trainer.precision
        return machine.fast_dtype() if asked == "auto" else asked

    def open_data(self) -> None:
        """Read all text before work starts: a missing or empty source is refused here."""
        _ = self.text, self.scorer  # cached properties: asking is reading
        if any(uses_chat(stage) for stage in self.recipe.stages.values()):
            _ = self.chat

    def _pack(self, sources: list[str], **how: Any) -> Packed:
        return pack(sources, self.teacher.path, self.recipe.data.seq_len, self.store.root / "data", **how)

    @cached_property
    def text(self) -> Packed:
        d = self.recipe.data
        return self._pack(d.train, weights=d.weights, packing=d.packing.value)

    @cached_property
    def chat(self) -> Packed:
        if not self.recipe.data.chat:
            raise ValueError("the recipe's lora stage wants chat data, but data.chat is empty; name a source or set data=text on the stage")
        return self._pack(self.recipe.data.chat, packing=self.recipe.data.packing.value)

    @cached_property
    def scorer(self) -> Scorer:
        return make_scorer(self.recipe.eval, self.store, self._pack(self.recipe.data.heldout), self.teacher, self.threads)

    def inputs(self, slot: str, parent_digest: str) -> dict[str, Any]:
        """All that determines a stage's weights; its digest is the stage's key."""
        stage, versions = self.recipe.stages[slot], machine.versions()
        return {
            "technique": self.recipe.technique(slot), "config": _what_decides(stage), "parent": parent_digest, "teacher": self.teacher.digest,
            "data": self.text.digest, "chat": self.chat.digest if uses_chat(stage) else None, "seq_len": self.recipe.data.seq_len,
            "seed": self.recipe.seed, "precision": self.precision, "threads": self.threads, "world": parallel.world(),
            "trainer": [self.recipe.trainer.parallel, self.recipe.trainer.activation_checkpointing],
            "device": str(best_device()), "sources": sources_digest(PACKAGE),
            "versions": {name: versions[name] for name in ("torch", "transformers")},
        }  # fmt: skip

    def context(self, slot: str, work: Path, curve: list[dict[str, float]]) -> Context:
        """What the stage in `slot` may ask for."""
        return Context(
            teacher=self.teacher.path, seed=self.recipe.seed, seq_len=self.recipe.data.seq_len, work=work,
            signals=self.store.root / "signals", calibration=lambda n: self.text.ids[:n, :-1].long(), text=lambda: self.text,
            chat=lambda: self.chat, precision=self.precision, label=slot, log=log, curve=curve.extend,
            parallel=self.recipe.trainer.parallel if parallel.world() > 1 else "none",
            activation_checkpointing=self.recipe.trainer.activation_checkpointing,
        )  # fmt: skip


def check_batches(recipe: Recipe) -> None:
    """ConfigError when a stage's batch can't be shared out evenly."""
    for slot, stage in recipe.stages.items():
        if isinstance(stage, Optimization) and stage.batch_sequences % parallel.world():
            raise ConfigError(
                f"stages.{slot}.batch_sequences={stage.batch_sequences} can't be shared by {parallel.world()} processes; use a multiple of that"
            )


def check_context(teacher: Path, seq_len: int) -> None:
    """ValueError when sequences are longer than what the teacher was made for."""
    from compress.checkpoint import read_config

    context = read_config(teacher).get("max_position_embeddings")
    if context is not None and seq_len > context:
        raise ValueError(f"data.seq_len={seq_len} is longer than the teacher's context of {context} tokens; set data.seq_len to at most {context}")


def _what_decides(stage: Any) -> dict[str, Any]:
    """A stage's configuration as far as its weights depend on it: of a signal in a folder of its own, who made it, not where it is."""
    from compress.distill.signal import made_with

    config: dict[str, Any] = plain(asdict(stage))
    if where := config.get("signal", {}).pop("path", None):
        config["signal"]["made_with"] = made_with(where)
    return config


def uses_chat(stage: Any) -> bool:
    """Whether a stage trains on the recipe's chat data."""
    return getattr(getattr(stage, "data", None), "value", "") == "chat"


def check_shapes(session: Session) -> dict[str, dict[str, Any]]:
    """The HF config after every slot; ValueError naming the slot that can't work on its parent's shape."""
    from compress.checkpoint import read_config

    shapes = {"teacher": read_config(session.teacher.path)}
    for slot, parent in session.recipe.steps():
        try:
            shapes[slot] = session.recipe.stages[slot].check_shape(dict(shapes[parent]))
        except ValueError as error:
            raise ValueError(f"slot {slot!r} after {parent!r}: {error}") from error
    return shapes


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


class RunDir:
    """The readable run directory: run.json, one folder a slot, records, and the trackers fed from them."""

    def __init__(self, path: Path, recipe: Recipe, session: Session) -> None:
        self.path, self.index = path.absolute(), 0
        self.path.mkdir(parents=True, exist_ok=True)
        name = f"{self.path.parent.name}/{self.path.name}"
        self.about: dict[str, Any] = {
            "schema": 1, "recipe": self.path.parent.name, "name": name, "started": _now(), "finished": None, "exit": None,
            "git_sha": machine.git_sha(), "versions": machine.versions(), "machine": machine.describe(session.threads),
            "config": plain(asdict(recipe)), "slots": [], "keys": [],
        }  # fmt: skip
        self.trackers: list[Guarded] = [
            open_tracker(sink, self.path, **({"project": recipe.track.project} if sink == "wandb" else {})) for sink in recipe.track.sinks
        ]
        self.write()
        for tracker in self.trackers:
            tracker.start(self.about)

    def write(self) -> None:
        """Replace run.json."""
        write_json(self.path / "run.json", self.about)

    def name_key(self, key: str) -> None:
        """Let run.json name a store key before its work starts, so that gc leaves unfinished work alone."""
        self.about["keys"].append(key)
        self.write()

    def add(self, record: dict[str, Any], measured: Measured, curve: list[dict[str, Any]]) -> dict[str, Any]:
        """Write one slot's folder and hand the record to the trackers."""
        record = {"schema": 1, "run": self.about["name"], "recipe": self.about["recipe"], "index": self.index, "created": _now()} | record
        folder = self.path / f"{self.index:02d}-{record['slot']}"
        folder.mkdir()
        write_json(folder / "record.json", record)
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in measured.items))
        (folder / "weights").symlink_to(os.path.relpath(measured.model.path, folder))
        self.index += 1
        self.about["slots"].append(record["slot"])
        self.write()
        for tracker in self.trackers:
            tracker.record(record, curve)
        return record

    def finish(self, code: int) -> None:
        """Record the exit code."""
        self.about |= {"finished": _now(), "exit": code}
        self.write()
        for tracker in self.trackers:
            tracker.finish(code)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
            session, slot, recipe.technique(slot), model, parent=parent, shipped=slot == recipe.shipped_slot() and not recipe.export.gguf
        )
        record |= {
            "key": key,
            "reused": reused,
            "stage_config": plain(asdict(recipe.stages[slot])),
            "metrics": session.store.stage_json(key)["metrics"],
        }
        record["seconds"]["stage"] = seconds
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
    if session.teacher.gguf and recipe.export.gguf:
        baseline = Model(session.teacher.gguf, file_digest(session.teacher.gguf), "llama.cpp")
        measured, record = score(session, "teacher_gguf", "teacher", baseline, parent=None, tasks=False)
        folder.add(record, measured, [])
    shipped = [_export(session, folder, source, kind, first=number == 0) for number, kind in enumerate(recipe.export.gguf)]
    finished = load_run(folder.path)
    verdicts = [v for record in finished.records for v in record["verdicts"]]
    code = EXIT_BUDGET if budget.failed(verdicts, strict=recipe.budget.strict) else EXIT_OK
    folder.about |= {"exit": code, "finished": _now()}
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


def file_digest(path: Path) -> str:
    """What identifies a single-file model: sha256 of its bytes."""
    from compress.checkpoint import sha256_file

    return sha256_file(path)


def _export(session: Session, folder: RunDir, source: Done, kind: str, *, first: bool) -> Done:
    """One shipped GGUF: written through the store, scored in llama.cpp, judged by the budget if it is the first."""
    from compress.export.gguf import export_gguf

    inputs = {"export": kind, "weights": source.model.digest, "versions": machine.versions(), "schema": 1}
    name, key = f"model-{kind}.gguf", sha256_json(inputs)

    def make(out: Path, work: Path) -> dict[str, float]:
        return export_gguf(source.model.path, out / name, kind)

    start = time.monotonic()
    folder.name_key(key)
    path = session.store.build(key, inputs, make) / name
    seconds = time.monotonic() - start
    model = Model(path, file_digest(path), "llama.cpp")
    measured, record = score(session, f"gguf_{kind.lower()}", "export_gguf", model, parent=source, shipped=first)
    record |= {"key": key, "metrics": session.store.stage_json(key)["metrics"]}
    record["seconds"]["stage"] = seconds
    return Done(model, key, measured, folder.add(record, measured, []))
