"""What all slots of one run share: the teacher, the store, the text, the scorer; and what is refused before work starts."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from compress import machine
from compress.assets import PACKAGE, configs_dir
from compress.checkpoint import best_device, config_object, read_config
from compress.config import Data, Eval, Recipe, Teacher, Trainer
from compress.errors import ConfigError
from compress.export import formats
from compress.score.scorer import Measured, Model, Scorer, Settings
from compress.stages.context import Context
from compress.stages.optimization import Optimization
from compress.store import Store, file_table, sha256_json, sources_digest
from compress.teacher import OpenTeacher, open_teacher
from compress.track import check as check_tracker
from compress.train import parallel
from compress.train.data import Packed, pack


def log(message: str) -> None:
    """Progress goes to stderr; results go to stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """Dataclasses, enums and paths as JSON."""
    return json.loads(json.dumps(value, default=lambda v: v.value if isinstance(v, Enum) else str(v)))


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
        check_processes(self.recipe)
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
        return pack(sources, self.teacher.path, self.recipe.data.seq_len, self.store.root / "data", log=log, **how)

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


def check_processes(recipe: Recipe) -> None:
    """ConfigError when there are several processes without a way to train together, or a batch that they can't share evenly."""
    if parallel.world() > 1 and recipe.trainer.parallel == "none":
        raise ConfigError(f"{parallel.world()} processes were started, but trainer.parallel=none; use trainer=ddp or trainer=fsdp2")
    for slot, stage in recipe.stages.items():
        if isinstance(stage, Optimization) and stage.batch_sequences % parallel.world():
            shared = f"stages.{slot}.batch_sequences={stage.batch_sequences} can't be shared by {parallel.world()} processes"
            raise ConfigError(f"{shared}; use a multiple of that")


def check_context(teacher: Path, seq_len: int) -> None:
    """ValueError when sequences are longer than what the teacher was made for."""
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
    """The HF config after every slot; ValueError naming the slot that can't work on its parent's shape, or the file without a place for it."""
    shapes = {"teacher": read_config(session.teacher.path)}
    for slot, parent in session.recipe.steps():
        try:
            shapes[slot] = session.recipe.stages[slot].check_shape(dict(shapes[parent]))
        except ValueError as error:
            raise ValueError(f"slot {slot!r} after {parent!r}: {error}") from error
    for name in session.recipe.export.files:
        formats.parse(name)[0].module.check_architecture(config_object(shapes[session.recipe.shipped_slot()]))
    return shapes
