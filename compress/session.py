"""What all slots of one run share: teacher, store, text and scorer; and what is refused before
work starts.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compress import formats, machine
from compress.collect import sweep
from compress.config import Recipe, Teacher
from compress.distill.signals import made_with
from compress.errors import (
    ConfigError,
    refuse_credentials,
    shown,
    tree_without_credentials,
)
from compress.formats.devices import check_device
from compress.formats.gguf import overhead_bytes
from compress.keys import WEIGHTS, sources_digest, versions_of
from compress.models.checkpoint import Model, best_device, config_object, read_config
from compress.models.model_config import meta_model
from compress.models.tokenizer import tokenizer_digest
from compress.quant.codes import check_packable, check_unquantized
from compress.score.measured import Measured
from compress.score.prompts import Prompt
from compress.score.scorer import Scorer, open_prompts
from compress.score.settings import Eval
from compress.score.task_files import check_tasks
from compress.stages.context import Context
from compress.stages.prune_depth import PruneDepth
from compress.stages.prune_heads import PruneHeads
from compress.stages.prune_vocab import PruneVocab
from compress.stages.prune_width import PruneWidth
from compress.stages.ptq import OnGrid
from compress.stages.training import Optimization
from compress.store import Store
from compress.teacher import open_teacher
from compress.text.packing import pack
from compress.text.settings import Data, Reread
from compress.track import check as check_tracker
from compress.train import parallel
from compress.train.packed import Packed
from compress.train.settings import Trainer


def log(message: str) -> None:
    """Progress goes to stderr; results go to stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {shown(message)}", file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """Dataclasses, enums and paths as JSON, without what gives access in URLs."""
    return tree_without_credentials(
        json.loads(json.dumps(value, default=lambda v: v.value if isinstance(v, Enum) else str(v)))
    )


def open_scorer(
    teacher: Teacher,
    data: Data,
    eval: Eval,
    trainer: Trainer,
    store: str,
    requests: list[dict[str, Any]] | None = None,
    prompts: list[Prompt] | None = None,
) -> tuple[Scorer, Model]:
    """A scorer outside a run: what `compress score` and, with the bundle's `requests` and open
    `prompts`, `compress accept` use.
    """
    for name, part in (("teacher", teacher), ("data", data), ("eval", eval)):
        refuse_credentials(asdict(part), name)
    threads = trainer.threads or machine.available_threads()
    torch.set_num_threads(threads)

    home = Store(store)
    opened = open_teacher(teacher.source, teacher.revision, home, log)
    check_length(data.seq_len, opened)

    def heldout(tokens_of: Path) -> dict[str, Packed]:
        """Held-out text in the tokens of a checkpoint, as in a run."""
        folder = home.root / "data"
        return {
            name: pack([source], opened.path, data.seq_len, folder, tokens_of=tokens_of)
            for name, source in data.heldout_names().items()
        }

    return Scorer(home, eval, heldout, opened.path, threads, requests, prompts), opened


def check_length(seq_len: int, teacher: Model) -> None:
    """ValueError when rows of `data.seq_len` tokens are longer than the teacher's context."""
    context = read_config(teacher.path).get("max_position_embeddings")
    if context is not None and seq_len > context:
        raise ValueError(
            f"data.seq_len={seq_len} is longer than the teacher's context of {context} tokens; set"
            f" data.seq_len to at most {context}"
        )


class Session:
    """What all slots of one run share.

    Opening it refuses whatever can be refused before work starts.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.done: dict[str, Measured] = {}
        self._packed: dict[str, Packed] = {}  # by sources, tokenizer and settings
        self._check_recipe()

        # Processes of one machine share its processors.
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.threads = recipe.trainer.threads or max(
            1, machine.available_threads() // local_processes
        )
        torch.set_num_threads(self.threads)
        self.precision = recipe.trainer.precision
        if self.precision == "auto":
            self.precision = machine.fast_dtype()

        self.store = Store(recipe.store)
        sweep(self.store)
        self.teacher = open_teacher(recipe.teacher.source, recipe.teacher.revision, self.store, log)
        check_length(recipe.data.seq_len, self.teacher)

    def _check_recipe(self) -> None:
        """Refuse what the recipe alone shows to be impossible, before anything is imported."""
        recipe = self.recipe
        refuse_credentials(asdict(recipe), "")
        for name in recipe.track.sinks:
            check_tracker(name)
        check_tasks(recipe.eval.tasks)
        open_prompts(recipe.eval)  # a prompt file that can't be used is refused here
        for runtime in ("torch", *(formats.parse(name)[0].runtime for name in recipe.export.files)):
            check_device(runtime, recipe.eval.device)

        # Every process takes the same share of a batch.
        processes = parallel.world()
        if processes > 1 and recipe.trainer.parallel == "none":
            raise ConfigError(
                f"{processes} processes were started, but trainer.parallel=none; use trainer=ddp or"
                " trainer=fsdp2"
            )
        several = max(processes, recipe.trainer.count()) > 1
        spread = recipe.trainer.parallel if several else "none"
        for slot, stage in recipe.stages.items():
            if not isinstance(stage, Optimization):
                continue
            if stage.batch_sequences % processes:
                raise ConfigError(
                    f"stages.{slot}.batch_sequences={stage.batch_sequences} can't be shared by"
                    f" {processes} processes; use a multiple of that"
                )
            try:
                stage.check_trainer(spread, recipe.trainer.precision, recipe.data.seq_len)
            except ConfigError as error:
                raise ConfigError(f"stages.{slot}: {error}") from error

    def open_data(self) -> None:
        """Read all text before work starts: a missing or empty source is refused here."""
        _ = self.text(self.teacher.path), self.scorer  # asking is reading
        if any(uses_chat(self.recipe.stages[slot]) for slot, _ in self.recipe.steps()):
            self.chat(self.teacher.path)
        for slot, _ in self.recipe.steps():
            self._check_length(slot)
            stage = self.recipe.stages[slot]
            if isinstance(stage, PruneVocab):
                stage.check_tokenizer(self.teacher.path)
                self.vocabulary(self.teacher.path)

    def _check_length(self, slot: str) -> None:
        """Say, or refuse with data.reread=refuse, that a stage wants more text than there is."""
        stage, data = self.recipe.stages[slot], self.recipe.data
        sentences = []
        if isinstance(stage, Optimization):
            read = self.chat if stage.reads_chat else self.text
            sequences = len(read(self.teacher.path).ids)
            sentences.append(stage.told_readings(data.seq_len, sequences))

        needed = stage.calibration_rows()
        if needed > (available := len(self.text(self.teacher.path).ids)):
            sentences.append(
                f"calibration_sequences={needed}, the text has {available} sequences: add text to"
                f" the data, or set it to at most {available}"
            )

        for sentence in filter(None, sentences):
            if data.reread is Reread.refuse:
                raise ValueError(f"{slot}: {sentence}; or set data.reread=tell")
            log(f"{slot}: {sentence}")

    def _pack(self, sources: list[str], tokens_of: Path, **settings: Any) -> Packed:
        """Text in the tokens of a checkpoint; each text and tokenizer is read once."""
        known = json.dumps([sources, tokenizer_digest(tokens_of), settings])
        if known not in self._packed:
            self._packed[known] = pack(
                sources,
                self.teacher.path,
                self.recipe.data.seq_len,
                self.store.root / "data",
                tokens_of=tokens_of,
                log=log,
                **settings,
            )
        return self._packed[known]

    def text(self, tokens_of: Path) -> Packed:
        """All training text, in the tokens of a checkpoint."""
        data = self.recipe.data
        return self._pack(
            data.train,
            tokens_of,
            weights=data.weights,
            packing=data.packing.value,
            chat_labels=data.chat_labels.value,
        )

    def vocabulary(self, tokens_of: Path) -> Packed | None:
        """Text whose tokens a smaller vocabulary keeps besides the training text's."""
        sources = self.recipe.data.vocabulary
        return self._pack(sources, tokens_of) if sources else None

    def chat(self, tokens_of: Path) -> Packed:
        """Question-answer training data, in the tokens of a checkpoint. ValueError for none."""
        data = self.recipe.data
        if not data.chat:
            raise ValueError(
                "the recipe's lora stage wants chat data, but data.chat is empty; name a source or"
                " set data=text on the stage"
            )
        return self._pack(data.chat, tokens_of, packing=data.packing.value, chat_labels="answers")

    @cached_property
    def scorer(self) -> Scorer:
        names = self.recipe.data.heldout_names()

        def heldout(tokens_of: Path) -> dict[str, Packed]:
            return {name: self._pack([source], tokens_of) for name, source in names.items()}

        return Scorer(self.store, self.recipe.eval, heldout, self.teacher.path, self.threads)

    def inputs(self, slot: str, parent: Model) -> dict[str, Any]:
        """All that determines a stage's weights; its digest is the stage's key."""
        stage, trainer = self.recipe.stages[slot], self.recipe.trainer

        # This class cuts the text that stages are calibrated on; of a mixture, the room left for
        # weights is what `overhead_bytes` leaves.
        sources = [type(stage).__module__, "compress.session:Session"]
        if isinstance(stage, OnGrid) and stage.layout_name == "mixed":
            sources.append("compress.formats.gguf")

        # `keep` decides what goes on, not what is made. Who made a signal in a folder of its own
        # counts, not where it is.
        config = plain(asdict(stage))
        config.pop("keep", None)
        if folder := config.get("signal", {}).pop("path", None):
            config["signal"]["made_with"] = made_with(folder)
        if isinstance(stage, PruneVocab) and (counted := self.vocabulary(parent.path)):
            config["counted"] = counted.digest

        # Who trains; anybody where the number of processes may change on the way.
        processes: dict[str, Any] = {
            "threads": self.threads,
            "world": parallel.world(),
            "trainer": [trainer.parallel, trainer.activation_checkpointing, trainer.moments],
        }
        if trainer.elastic:
            alike = [trainer.activation_checkpointing, trainer.moments]
            processes = {"elastic": True, "trainer": alike}

        return {
            "technique": self.recipe.technique(slot),
            "config": config,
            "parent": parent.digest,
            "teacher": self.teacher.digest,
            "data": self.text(parent.path).digest,
            "chat": self.chat(parent.path).digest if uses_chat(stage) else None,
            "seq_len": self.recipe.data.seq_len,
            "seed": self.recipe.seed,
            "precision": self.precision,
            "device": str(best_device()),
            "sources": sources_digest(*sources),
            "versions": versions_of(*WEIGHTS),
            **processes,
        }

    def context(
        self, slot: str, parent: Path, work: Path, curve: list[dict[str, float]]
    ) -> Context:
        """What the stage in `slot` may ask for, text in its parent's tokens; rows of its training
        are added to `curve`.
        """
        trainer = self.recipe.trainer
        return Context(
            teacher=self.teacher.path,
            seed=self.recipe.seed,
            seq_len=self.recipe.data.seq_len,
            work=work,
            signals=self.store.root / "signals",
            # Inputs without the last token, which has no next one to predict.
            calibration=lambda n: self.text(parent).ids[:n, :-1].long(),
            text=lambda: self.text(parent),
            chat=lambda: self.chat(parent),
            vocabulary=lambda: self.vocabulary(parent),
            file_overhead=overhead_bytes,
            precision=self.precision,
            label=slot,
            log=log,
            curve=curve.extend,
            parallel=trainer.parallel if parallel.world() > 1 else "none",
            activation_checkpointing=trainer.activation_checkpointing,
            moments=trainer.moments,
            notes=self.store.root / "notes",
        )


def _about(slot: str, parent: str, check: Callable[..., Any], *arguments: Any) -> Any:
    """What a check gives; its ValueError names the slot."""
    try:
        return check(*arguments)
    except ValueError as error:
        raise ValueError(f"slot {slot!r} after {parent!r}: {error}") from error


def uses_chat(stage: Any) -> bool:
    """Whether a stage trains on the recipe's chat data."""
    return isinstance(stage, Optimization) and stage.reads_chat


def check_calibration(session: Session, shapes: Mapping[str, dict[str, Any]]) -> None:
    """ValueError naming the slot that has too little text to weigh what it cuts. `shapes` as
    `check_shapes` gives them.
    """
    # Of the teacher's tokens, of which a cut vocabulary makes more and never fewer.
    rows, seq_len = session.text(session.teacher.path).ids.shape
    for slot, parent in session.recipe.steps():
        stage = session.recipe.stages[slot]
        if isinstance(stage, PruneDepth | PruneHeads | PruneWidth):
            given = min(rows, stage.calibration_rows())
            _about(slot, parent, stage.check_text, shapes[parent], given, seq_len - 1)


def check_shapes(session: Session) -> dict[str, dict[str, Any]]:
    """The HF config after every slot; ValueError naming the slot that can't work on its parent's
    shape, or the file without a place for it.
    """
    shapes = {"teacher": read_config(session.teacher.path)}
    for slot, parent in session.recipe.steps():
        stage = session.recipe.stages[slot]
        if parent == "teacher":
            _about(slot, parent, check_unquantized, session.teacher.path)
        shapes[slot] = _about(slot, parent, stage.check_shape, dict(shapes[parent]))
        if isinstance(stage, OnGrid):
            _about(slot, parent, stage.check_matrices, meta_model(shapes[parent]))

    # A format may need things of the shape that ships, and of the teacher's files.
    slot = session.recipe.shipped_slot()
    shipped = shapes[slot]
    packed = isinstance(session.recipe.stages.get(slot), OnGrid)
    for name in session.recipe.export.files:
        module = formats.parse(name)[0].module
        module.check_architecture(config_object(shipped))
        if packed and name == "compressed_tensors":
            _check_packable(name, shipped)
        if check_teacher := getattr(module, "check_teacher", None):
            check_teacher(session.teacher.path)
    return shapes


def _check_packable(name: str, config: dict[str, Any]) -> None:
    """ValueError, naming the file, for a model with matrices that it has no place for."""
    try:
        check_packable(meta_model(config))
    except ValueError as error:
        raise ValueError(f"export.files has {name}: {error}") from error


def thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 60 rows for the record, evenly spread, and every row with a validation; trackers get
    them all.
    """
    every = max(1, -(-len(curve) // 60))
    return [
        row
        for number, row in enumerate(curve)
        if number % every == 0 or "validation_kl" in row or number == len(curve) - 1
    ]
