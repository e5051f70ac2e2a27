"""Everything measured of one model, kept by what it depends on: (weights digest, evaluation digest, runtime, machine).

`Scorer.measure` gives the numbers a model has by itself (tasks, bits per byte, size, latency, memory); `Scorer.compare` those it has only
beside another (KL, top-1 agreement, accuracy kept, flips). Teacher, every stage and the shipped file go through the same two
functions with the same batch size, dtype (fp32), prompts and held-out tokens; latency runs in a process of its own, in the shipping type.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.checkpoint import best_device, digest, load_tokenizer, tokenizer_digest
from compress.score.fidelity import States, bits_per_byte, checkpoint_head, checkpoint_hidden, closeness, saved_hidden
from compress.score.latency import measure as measure_torch
from compress.score.paired import paired_scores
from compress.score.size import gguf_size, size
from compress.score.tasks import evaluate, make_hf_lm
from compress.store import Store, sha256_json, write_json
from compress.train.data import Packed
from compress.train.forward import Head


@dataclass(frozen=True)
class Settings:
    """What is measured, in numbers and names; its digest is part of every score's key."""

    tasks: tuple[str, ...]
    data_dir: Path | None
    limit: int | None
    batch_size: int
    heldout_sequences: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int
    tasks_digest: str
    machine: str


@dataclass(frozen=True)
class Model:
    """A checkpoint directory, packed or not, or a GGUF file, with the digest of its weights."""

    path: Path
    digest: str
    runtime: str = "torch"  # or "llama.cpp"

    @classmethod
    def open(cls, path: Path) -> Model:
        """What lies at `path`, a file being a GGUF."""
        return cls(path.absolute(), digest(path), "llama.cpp" if path.is_file() else "torch")


@dataclass(frozen=True)
class Measured:
    """A model's own scores, its task items, and the chance level of each task."""

    model: Model
    key: str
    scores: dict[str, float]
    items: list[dict[str, Any]] = field(default_factory=list)
    chance: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Scorer:
    """Scores models against one evaluation; finished scores are read back from the store."""

    def __init__(self, store: Store, settings: Settings, heldout: Packed, tokenizer_dir: Path, log: Callable[[str], None]) -> None:
        self.store, self.settings, self.heldout, self.log = store, settings, heldout, log
        self.tokenizer_dir = tokenizer_dir
        self.sequences = min(settings.heldout_sequences, len(heldout.ids))

    def key(self, model: Model, tasks: bool) -> str:
        """The weights' digest, by which gc knows whose scores these are, and the digest of all that they depend on."""
        from compress import __version__

        own = {k: str(v) for k, v in vars(self.settings).items()}
        return f"{model.digest[:16]}-{sha256_json([model.digest, model.runtime, own, tasks, self.heldout.digest, __version__])[:32]}"

    def measure(self, model: Model, *, tasks: bool = True) -> Measured:
        """The model's own scores, from the store if they are there. `tasks=False` leaves the tasks out."""
        key = self.key(model, tasks)
        path = self.store.root / "scores" / f"{key}.json"
        if path.is_file() and self._states_path(key).is_file():
            kept = json.loads(path.read_text())
            return Measured(model, key, kept["scores"], kept["items"], kept["chance"], kept["seconds"])
        start = time.monotonic()
        names = self.settings.tasks if tasks else ()
        raw = self._torch(model, key, names) if model.runtime == "torch" else self._llamacpp(model, key, names)
        raw["seconds"] = time.monotonic() - start
        write_json(path, raw)
        return Measured(model, key, **raw)

    def compare(self, student: Measured, reference: Measured) -> dict[str, float]:
        """{"kl", "top1"} on the held-out text, from the store if it is there."""
        path = self.store.root / "scores" / f"{student.key}-{reference.key}.json"
        if not path.is_file():
            write_json(path, closeness(self._states(reference), self._states(student)))
        return json.loads(path.read_text())

    def parity(self, shipped: Measured, checkpoint: Measured, name: str) -> dict[str, float]:
        """What `export/parity.py` measures of a file, `name` in `export.files`, and its checkpoint, from the store if it is there."""
        from compress.export import formats
        from compress.export.parity import parity

        packages = [version(package.replace("_", "-")) for package in formats.parse(name)[0].packages]
        depends = sha256_json([checkpoint.key, tokenizer_digest(checkpoint.model.path), name, packages])[:32]
        path = self.store.root / "scores" / f"{shipped.key}-{depends}.parity.json"
        if not path.is_file():
            rows = self.heldout.ids[: self.sequences]
            write_json(path, parity(checkpoint.model.path, shipped.model.path, name, rows, self._states(shipped), self.settings.threads))
        return json.loads(path.read_text())

    def beside(
        self, student: Measured, teacher: Measured, parent: Measured | None
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]], list[str]]:
        """(scores, intervals, tasks left out of `kept`) of a student beside its teacher and, for the KL, its parent."""
        near = self.compare(student, teacher)
        scores = {"kl_to_teacher": near["kl"], "top1_agree": near["top1"]}
        if parent is not None:
            scores["kl_to_parent"] = self.compare(student, parent)["kl"]
        if not student.items:
            return scores, {}, []
        paired = paired_scores(student.items, teacher.items, teacher.chance)
        return scores | paired.scores, paired.intervals, paired.excluded

    def _states_path(self, key: str) -> Path:
        return self.store.root / "scores" / f"{key}.states.safetensors"

    def _states(self, measured: Measured) -> States:
        hidden = saved_hidden(self._states_path(measured.key))
        assert hidden is not None, "measure() writes the states before the scores"
        return States(hidden, self._head(measured.model))

    def _head(self, model: Model) -> Head:
        if model.runtime == "torch":
            return checkpoint_head(model.path)
        from compress.score.llamacpp import gguf_head

        return gguf_head(model.path)

    def _closeness_inputs(self, hidden: Any, model: Model, key: str) -> dict[str, float]:
        states = States(hidden, self._head(model))
        states.save(self._states_path(key))
        return {"bits_per_byte/heldout": bits_per_byte(states, self.heldout, self.sequences, load_tokenizer(self.tokenizer_dir))}

    def _torch(self, model: Model, key: str, tasks: tuple[str, ...]) -> dict[str, Any]:
        s = self.settings
        scores = self._closeness_inputs(checkpoint_hidden(model.path, self.heldout, self.sequences), model, key)
        items, chance = [], {}
        if tasks:
            result = evaluate(make_hf_lm(model.path, s.batch_size, device=str(best_device())), tasks, s.limit, s.data_dir)
            scores, items, chance = scores | result.scores, result.items, result.chance
        scores |= measure_torch(model.path, s.prompt_tokens, s.new_tokens, s.repeats, s.threads, "bfloat16") | size(model.path)
        return {"scores": scores, "items": items, "chance": chance}

    def _llamacpp(self, model: Model, key: str, tasks: tuple[str, ...]) -> dict[str, Any]:
        import torch

        from compress.score.llamacpp import LlamaCpp, latency_in_fresh_process, make_lm

        s = self.settings
        rows = self.heldout.ids[: self.sequences, :-1].tolist()
        llama = LlamaCpp(model.path, s.threads, self.heldout.ids.shape[1] + 8)
        try:
            scores = self._closeness_inputs(torch.cat(llama.hidden_states(rows)), model, key)
            items, chance = [], {}
            if tasks:
                lm = make_lm(llama, self._head(model), load_tokenizer(self.tokenizer_dir), s.batch_size)
                result = evaluate(lm, tasks, s.limit, s.data_dir)
                scores, items, chance = scores | result.scores, result.items, result.chance
        finally:
            llama.close()
        scores |= latency_in_fresh_process(model.path, s.prompt_tokens, s.new_tokens, s.repeats, s.threads) | gguf_size(model.path)
        return {"scores": scores, "items": items, "chance": chance}
