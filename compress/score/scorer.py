"""Everything measured of one model, kept by what it depends on: (weights digest, evaluation digest, runtime, machine).

`Scorer.measure` gives the numbers a model has by itself (tasks, bits per byte, size, latency, memory); `Scorer.compare` those it has only
beside another (KL, top-1 agreement, accuracy kept, flips). Teacher, every stage and the shipped file go through the same two
functions with the same batch size, dtype (fp32), prompts and held-out tokens; latency runs in a process of its own, in the shipping type.
"""

import json
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from compress import __version__, machine
from compress.assets import configs_dir
from compress.checkpoint import Model, best_device, load_model, load_tokenizer, read_config, tokenizer_digest
from compress.config import Eval
from compress.export import formats
from compress.export.onnx import onnx_size
from compress.export.parity import parity
from compress.score.fidelity import States, bits_per_byte, checkpoint_head, checkpoint_hidden, closeness
from compress.score.latency import measure as measure_latency
from compress.score.llamacpp import LlamaCpp, gguf_head
from compress.score.onnxruntime import OnnxRuntime, onnx_head
from compress.score.paired import Paired, paired_scores
from compress.score.size import gguf_size, size
from compress.score.tasks import TaskResult, drift, evaluate, local_folder, rescore
from compress.store import Store, file_table, sha256_json, write_json, write_whole
from compress.train.data import Packed

RUNTIMES: dict[str, Any] = {"llama.cpp": LlamaCpp, "onnxruntime": OnnxRuntime}  # besides torch
HEADS: dict[str, Any] = {"torch": checkpoint_head, "llama.cpp": gguf_head, "onnxruntime": onnx_head}
SIZES: dict[str, Any] = {"torch": size, "llama.cpp": gguf_size, "onnxruntime": onnx_size}


@dataclass(frozen=True)
class Measured:
    """A model's own scores, its task items, the chance level of each task, and in a run the record that was written about it."""

    model: Model
    key: str
    scores: dict[str, float]
    items: list[dict[str, Any]]
    chance: dict[str, float]
    record: dict[str, Any] = field(default_factory=dict)


class Scorer:
    """Scores models by the settings of an `Eval`; finished ones are read back by settings, tasks' files, text, threads and machine."""

    def __init__(
        self, store: Store, settings: Eval, heldout: Packed, tokenizer_dir: Path, threads: int, requests: list[dict[str, Any]] | None = None
    ) -> None:
        """`requests`: a bundle's rendered items, scored instead of the settings' tasks."""
        self.store, self.settings, self.heldout, self.tokenizer_dir, self.threads = store, settings, heldout, tokenizer_dir, threads
        self.requests = requests
        self.sequences = min(settings.heldout_sequences, len(heldout.ids))
        self.data_dir = Path(settings.data_dir).expanduser() if settings.data_dir else None
        folders = [local_folder(name, place) for place in (configs_dir() / "tasks", self.data_dir) if place for name in settings.tasks]
        own = vars(settings) | {
            "tasks": tuple(settings.tasks), "data_dir": self.data_dir, "threads": threads,
            "requests": requests and sha256_json(requests),
            "tasks_digest": sha256_json({folder.name: file_table(folder) for folder in folders if folder.is_dir()}),
            "machine": sha256_json(machine.describe(threads))[:16],
        }  # fmt: skip
        self.depends = {name: str(value) for name, value in own.items()}, heldout.digest, __version__

    def measure(self, model: Model, *, tasks: bool = True) -> Measured:
        """The model's own scores, from the store if they are there. `tasks=False` leaves the tasks out."""
        own, text, ours = self.depends
        # The weights' digest comes first: by it gc knows whose scores these are.
        key = f"{model.digest[:16]}-{sha256_json([model.digest, model.runtime, own, tasks, text, ours])[:32]}"
        path = self.store.root / "scores" / f"{key}.json"
        if not (path.is_file() and self._states_path(key).is_file()):
            write_json(path, self._own_scores(model, key, self.settings.tasks if tasks else []))
        found = json.loads(path.read_text())
        return Measured(model, key, found["scores"], found["items"], found["chance"])

    def compare(self, student: Measured, reference: Measured) -> dict[str, float]:
        """{"kl", "top1"} on the held-out text, from the store if it is there."""
        path = self.store.root / "scores" / f"{student.key}-{reference.key}.json"
        if not path.is_file():
            write_json(path, closeness(self._states(reference), self._states(student)))
        return json.loads(path.read_text())

    def parity(self, shipped: Measured, checkpoint: Measured, name: str) -> dict[str, float]:
        """What `export/parity.py` measures of a file, `name` in `export.files`, and its checkpoint, from the store if it is there."""
        packages = [version(package.replace("_", "-")) for package in formats.parse(name)[0].packages]
        depends = sha256_json([checkpoint.key, tokenizer_digest(checkpoint.model.path), name, packages])[:32]
        path = self.store.root / "scores" / f"{shipped.key}-{depends}.parity.json"
        if not path.is_file():
            rows = self.heldout.ids[: self.sequences]
            write_json(path, parity(checkpoint.model.path, shipped.model.path, name, rows, self._states(shipped), self.threads))
        return json.loads(path.read_text())

    def beside(self, student: Measured, teacher: Measured, parent: Measured | None) -> Paired:
        """A student beside its teacher and, for the KL, its parent."""
        near = self.compare(student, teacher)
        scores = {"kl_to_teacher": near["kl"], "top1_agree": near["top1"]}
        if parent is not None:
            scores["kl_to_parent"] = self.compare(student, parent)["kl"]
        if not student.items:
            return Paired(scores, {}, [])
        paired = paired_scores(student.items, teacher.items, teacher.chance)
        return paired._replace(scores=scores | paired.scores | drift(student.scores, teacher.scores))

    def _states_path(self, key: str) -> Path:
        return self.store.root / "scores" / f"{key}.states.safetensors"

    def _states(self, measured: Measured) -> States:
        return States(safetensors.torch.load_file(self._states_path(measured.key))["hidden"], HEADS[measured.model.runtime](measured.model.path))

    def _own_scores(self, model: Model, key: str, tasks: list[str]) -> dict[str, Any]:
        from compress.score.lm import served_lm, torch_lm  # lm-eval takes seconds to import

        s, head, tokenizer = self.settings, HEADS[model.runtime](model.path), load_tokenizer(self.tokenizer_dir)
        context = min(s.context_tokens, read_config(self.tokenizer_dir).get("max_position_embeddings") or s.context_tokens)  # in every runtime
        with ExitStack() as stack:
            if model.runtime == "torch":
                hidden_NH = checkpoint_hidden(model.path, self.heldout, self.sequences)
                loaded: Any = load_model(model.path)
                lm = torch_lm(loaded.to(best_device()), tokenizer, s.batch_size, context)
            else:
                opened = stack.enter_context(closing(RUNTIMES[model.runtime](model.path, self.threads, max(self.heldout.ids.shape[1] + 8, context))))
                hidden_NH = torch.cat(opened.hidden_states(self.heldout.ids[: self.sequences, :-1].tolist()))
                lm = served_lm(opened, head, tokenizer, s.batch_size, context)
            write_whole(self._states_path(key), safetensors.torch.save({"hidden": hidden_NH.contiguous()}))
            bits = bits_per_byte(States(hidden_NH, head), self.heldout, self.sequences, tokenizer)
            result = TaskResult({}, [], {})
            if tasks and self.requests is not None:
                result = rescore(lm, self.requests)
            elif tasks:
                result = evaluate(lm, tasks, s.limit, self.data_dir, num_fewshot=s.num_fewshot, perturbations=s.perturbations)
        scores = {"bits_per_byte/heldout": bits} | result.scores | SIZES[model.runtime](model.path)
        scores |= measure_latency(model.path, s.prompt_tokens, s.new_tokens, s.repeats, self.threads, runtime=model.runtime)
        return {"scores": scores, "items": result.items, "chance": result.chance}
