"""Everything measured of one model, kept by what it depends on: (weights digest, evaluation digest, runtime, machine).

`Scorer.measure` gives the numbers a model has by itself (tasks, bits per byte, size, latency, memory); `Scorer.compare` those it has only
beside another (KL, top-1 agreement, accuracy kept, flips). Teacher, every stage and the shipped file go through the same two
functions with the same batch size, dtype (fp32), prompts and held-out tokens; latency runs in a process of its own, in the shipping type.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from compress import __version__, machine
from compress.assets import configs_dir
from compress.budget import is_accuracy
from compress.checkpoint import Model, best_device, load_model, load_tokenizer, read_config, tokenizer_digest
from compress.config import Eval
from compress.export import formats
from compress.export.parity import parity
from compress.score.fidelity import States, bits_and_bytes, checkpoint_head, closeness, hidden_of, perplexities
from compress.score.latency import Timing
from compress.score.latency import measure as measure_latency
from compress.score.llamacpp import LlamaCpp, gguf_head
from compress.score.onnxruntime import OnnxRuntime, onnx_head
from compress.score.paired import Paired, accuracy, paired_scores, ratio_interval
from compress.score.sequential import asked_in_parts, until_certain
from compress.score.size import size
from compress.score.tasks import TaskResult, drift, evaluate, local_folder, rescore
from compress.store import Store, file_table, sha256_json, write_json, write_whole
from compress.train.data import Packed

RUNTIMES: dict[str, Any] = {"llama.cpp": LlamaCpp, "onnxruntime": OnnxRuntime}  # besides torch
HEADS: dict[str, Any] = {"torch": checkpoint_head, "llama.cpp": gguf_head, "onnxruntime": onnx_head}


@dataclass(frozen=True)
class Measured:
    """A model's own scores and their intervals, its task items, the chance level of each task, what a reader of the times should know, and in a
    run the record that was written about it."""

    model: Model
    key: str
    scores: dict[str, float]
    items: list[dict[str, Any]]
    chance: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    latency: dict[str, Any]
    rows: dict[str, list[list[float]]]  # of figures of text: arguments of `ratio_interval`
    level: float = 0.95  # of intervals over items: higher where an early stop made looks of its own (score/sequential.py)
    record: dict[str, Any] = field(default_factory=dict)


class Scorer:
    """Scores models by the settings of an `Eval`; finished ones are read back by settings, tasks' files, text, threads and machine."""

    def __init__(
        self, store: Store, settings: Eval, heldout: Packed, tokenizer_dir: Path, threads: int, requests: list[dict[str, Any]] | None = None
    ) -> None:
        """`requests`: a bundle's rendered items, scored instead of the settings' tasks."""
        self.store, self.settings, self.tokenizer_dir, self.threads, self.requests = store, settings, tokenizer_dir, threads, requests
        self.ids_SL = heldout.ids[: settings.heldout_sequences]
        if len(self.ids_SL) < 2:
            raise ValueError(f"data.heldout holds {len(heldout.ids)} row; an interval needs at least 2: add text or lower data.seq_len")
        self.data_dir = Path(settings.data_dir).expanduser() if settings.data_dir else None
        folders = [local_folder(name, place) for place in (configs_dir() / "tasks", self.data_dir) if place for name in settings.tasks]
        tasks = sha256_json({folder.name: file_table(folder) for folder in folders if folder.is_dir()})
        self.digests = {"the tasks' files": tasks, "the held-out text": heldout.digest}
        own = vars(settings) | {
            "schema": 2, "tasks": tuple(settings.tasks), "data_dir": self.data_dir, "threads": threads,
            "requests": requests and sha256_json(requests), "tasks_digest": tasks,
            "machine": sha256_json(machine.describe(threads))[:16],
        }  # fmt: skip
        self.depends = {name: str(value) for name, value in own.items()}, heldout.digest, __version__

    def measure(self, model: Model, *, tasks: bool = True, against: Measured | None = None, limits: Sequence[Mapping[str, Any]] = ()) -> Measured:
        """The model's own scores, from the store if they are there. `tasks=False` leaves the tasks out; with `eval.stop_early` they go on only
        until every accuracy limit in `limits` on the comparison with the teacher, `against`, is decided."""
        own, text, ours = self.depends
        early = (against.items, against.chance, limits) if against and tasks and self.settings.stop_early else None
        until = early and against and [against.key, [[n, some[n].max, some[n].min] for some in limits for n in some if is_accuracy(n)]]
        # The weights' digest comes first: by it gc knows whose scores these are.
        key = f"{model.digest[:16]}-{sha256_json([model.digest, model.runtime, own, tasks, text, ours, until])[:32]}"
        path = self.store.root / "scores" / f"{key}.json"
        if not (path.is_file() and self._states_path(key).is_file()):
            write_json(path, self._own_scores(model, key, self.settings.tasks if tasks else [], early))
        return Measured(model, key, **json.loads(path.read_text()))

    def compare(self, student: Measured, reference: Measured) -> Paired:
        """kl_to_teacher and top1_agree, beside any `reference`, on the held-out text, with intervals over its rows; from the store if it is there."""
        path = self.store.root / "scores" / f"{student.key}-{reference.key}.json"
        if not path.is_file():
            write_json(path, closeness(self._states(reference), self._states(student), len(self.ids_SL)))
        near = json.loads(path.read_text())
        rows = {"kl_to_teacher": [near["kl_rows"]], "top1_agree": [near["top1_rows"]]}
        spread = {name: ratio_interval(*row) for name, row in rows.items()}
        return Paired({"kl_to_teacher": near["kl"], "top1_agree": near["top1"]}, spread, [], rows)

    def parity(self, shipped: Measured, checkpoint: Measured, name: str) -> dict[str, float]:
        """What `export/parity.py` measures of a file, `name` in `export.files`, and its checkpoint, from the store if it is there."""
        packages = [version(package.replace("_", "-")) for package in formats.parse(name)[0].packages]
        depends = sha256_json([checkpoint.key, tokenizer_digest(checkpoint.model.path), name, packages])[:32]
        path = self.store.root / "scores" / f"{shipped.key}-{depends}.parity.json"
        if not path.is_file():
            write_json(path, parity(checkpoint.model.path, shipped.model.path, name, self.ids_SL, self._states(shipped), self.threads))
        return json.loads(path.read_text())

    def beside(self, student: Measured, teacher: Measured, parent: Measured | None) -> Paired:
        """A student beside its teacher and, for the KL, its parent."""
        near = self.compare(student, teacher)
        if parent is not None:
            other = self.compare(student, parent)
            near.scores["kl_to_parent"], near.intervals["kl_to_parent"] = other.scores["kl_to_teacher"], other.intervals["kl_to_teacher"]
            near = near._replace(rows={**near.rows, "kl_to_parent": other.rows["kl_to_teacher"]})
        if not student.items:
            return near
        paired = paired_scores(student.items, teacher.items, teacher.chance, student.level, partial=self.settings.stop_early)
        scores = near.scores | paired.scores | drift(student.scores, teacher.scores)
        return Paired(scores, near.intervals | paired.intervals, paired.excluded, near.rows)

    def _states_path(self, key: str) -> Path:
        return self.store.root / "scores" / f"{key}.states.safetensors"

    def _states(self, measured: Measured) -> States:
        return States(safetensors.torch.load_file(self._states_path(measured.key))["hidden"], HEADS[measured.model.runtime](measured.model.path))

    def _own_scores(self, model: Model, key: str, tasks: list[str], early: tuple[Any, ...] | None) -> dict[str, Any]:
        from compress.score.lm import served_lm, torch_lm  # lm-eval takes seconds to import

        s, head, tokenizer = self.settings, HEADS[model.runtime](model.path), load_tokenizer(self.tokenizer_dir)
        longest = read_config(self.tokenizer_dir).get("max_position_embeddings") or sys.maxsize
        context = min(s.context_tokens, longest)  # in every runtime
        with ExitStack() as stack:
            if model.runtime == "torch":
                loaded: Any = load_model(model.path)
                hidden_NH = hidden_of(loaded.to(best_device()), self.ids_SL)
                lm = torch_lm(loaded, tokenizer, s.batch_size, context)
            else:
                opened = stack.enter_context(closing(RUNTIMES[model.runtime](model.path, self.threads, max(self.ids_SL.shape[1] + 8, context))))
                hidden_NH = torch.cat(opened.hidden_states(self.ids_SL[:, :-1].tolist()))
                lm = served_lm(opened, head, tokenizer, s.batch_size, context)
            write_whole(self._states_path(key), safetensors.torch.save({"hidden": hidden_NH.contiguous()}))
            bits_S, bytes_S = bits_and_bytes(States(hidden_NH, head), self.ids_SL, tokenizer)
            result, level = self._tasks(lm, tasks, early)
        own, pages = accuracy(result.items, level), perplexities(result.items)
        lengths = tuple(length for length in s.prompt_lengths if length + s.new_tokens <= longest)
        how = Timing(s.prompt_tokens, s.new_tokens, s.repeats, self.threads, s.processes, lengths, tuple(s.batch_sizes))
        timed = measure_latency(model.path, model.runtime, how)
        scores = {"bits_per_byte/heldout": sum(bits_S) / sum(bytes_S), "heldout_rows": len(self.ids_SL)} | size(model.path)
        scores |= result.scores | own.scores | pages.scores | timed["scores"]
        intervals = {"bits_per_byte/heldout": ratio_interval(bits_S, bytes_S)} | own.intervals | pages.intervals
        intervals |= result.intervals | timed["intervals"]
        rows = {"bits_per_byte/heldout": [bits_S, bytes_S]}
        return timed | {
            "scores": scores, "intervals": intervals, "rows": rows, "level": level, "items": result.items, "chance": result.chance,
        }  # fmt: skip

    def _tasks(self, lm: Any, tasks: list[str], early: tuple[Any, ...] | None) -> tuple[TaskResult, float]:
        """What `lm` answers, and the level of the intervals over items."""
        s = self.settings
        score = partial(evaluate, lm, limit=s.limit, data_dir=self.data_dir, num_fewshot=s.num_fewshot, perturbations=s.perturbations)
        if tasks and self.requests is not None:
            return rescore(lm, self.requests), 0.95
        if early is None:
            return score(tasks), 0.95
        items, chance, limits = early
        whole = [task for task in tasks if task not in asked_in_parts(items)]
        return until_certain(partial(rescore, lm), items, chance, limits, score(whole))
