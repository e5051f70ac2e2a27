"""Everything measured of one model, kept by what it depends on: (weights digest, evaluation
digest, runtime, machine).

`Scorer.measure` gives the numbers a model has by itself (tasks, open answers, bits per byte, size,
latency, memory); `Scorer.compare` those it has only beside another (KL, top-1 agreement),
`Scorer.beside` all that it has beside its teacher (accuracy and answers kept, flips). Teacher,
every stage and the shipped file go through the same functions with the same batch size, dtype
(fp32), prompts and held-out tokens; latency runs in a process of its own, in the shipping type.
Stages in between are asked a fixed quarter of the open prompts and are not timed.

Closeness is measured on each held-out text, by name, and over all their rows.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from compress import formats, machine
from compress.assets import configs_dir
from compress.budget import is_accuracy
from compress.formats.llamacpp import LlamaCpp, gguf_head
from compress.formats.onnxruntime import OnnxRuntime, onnx_head
from compress.keys import OF_RUNTIME, SCORES, sources_digest, versions_of
from compress.models.checkpoint import Model, best_device, load_model, read_config
from compress.models.ends import obey
from compress.models.tokenizer import load_tokenizer, tokenizer_digest
from compress.models.vocabulary import check_same
from compress.score.fidelity import (
    States,
    bits_and_bytes,
    checkpoint_head,
    closeness,
    hidden_of,
    perplexities,
)
from compress.score.intervals import Scores, accuracy, paired_scores, ratio_interval
from compress.score.latency import Timing
from compress.score.latency import measure as measure_latency
from compress.score.open import answered, beside_teacher, choice_gap, own_scores, plausible
from compress.score.parity import parity
from compress.score.prompts import Prompt, as_row, prompts_of_eval
from compress.score.sequential import asked_in_parts, until_certain
from compress.score.settings import Eval
from compress.score.size import size
from compress.score.talk import question_ids
from compress.score.task_files import local_folder
from compress.score.tasks import TaskResult, drift, evaluate, rescore
from compress.store import Store, file_table, sha256_json, write_json, write_whole
from compress.train.packed import Packed

RUNTIMES: dict[str, Any] = {"llama.cpp": LlamaCpp, "onnxruntime": OnnxRuntime}  # besides torch
HEADS: dict[str, Any] = {"torch": checkpoint_head, "llama.cpp": gguf_head, "onnxruntime": onnx_head}
# Whose formulas scores are: with what they import, or alone where that leads through half of the
# package.
SOURCES = (
    "compress.score.fidelity",
    "compress.score.lm",
    "compress.score.sequential",
    "compress.models.checkpoint",
    "compress.score.scorer:",
    "compress.score.open:",
    "compress.score.prompts:",
    "compress.score.talk:",
    "compress.score.latency:",
    "compress.score.size:",
    "compress.text.repetition:",
)
SOURCES_OF_RUNTIME = {
    "torch": (),
    "llama.cpp": ("compress.formats.llamacpp",),
    "onnxruntime": ("compress.formats.onnxruntime",),
}


@dataclass(frozen=True)
class Measured:
    """A model's own scores and their intervals, its task items, the chance level of each task,
    what a reader of the times should know, and in a run the record that was written about it.
    """

    model: Model
    key: str
    scores: dict[str, float]
    items: list[dict[str, Any]]
    chance: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    latency: dict[str, Any]
    rows: dict[str, list[list[float]]]  # of figures of text: arguments of `ratio_interval`
    answers: list[dict[str, Any]] = field(
        default_factory=list
    )  # to the open prompts, rows of score/open.py
    # of intervals over items: higher where an early stop made looks of its own
    # (score/sequential.py)
    level: float = 0.95
    record: dict[str, Any] = field(default_factory=dict)


def open_prompts(settings: Eval) -> list[Prompt]:
    """The open prompts of evaluation settings. ValueError as `score.open.read_prompts`."""
    return prompts_of_eval(settings.open_prompts, settings.data_dir, settings.open_limit)


class Scorer:
    """Scores models by the settings of an `Eval`; finished ones are read back by settings, tasks'
    files, text, threads and machine.
    """

    def __init__(
        self,
        store: Store,
        settings: Eval,
        heldout: Mapping[str, Packed],
        tokenizer_dir: Path,
        threads: int,
        requests: list[dict[str, Any]] | None = None,
        prompts: list[Prompt] | None = None,
    ) -> None:
        """`heldout`: texts by name. `requests`, `prompts`: a bundle's rendered items and open
        prompts, in place of the settings' own.
        """
        self.store, self.settings, self.tokenizer_dir, self.threads, self.requests = (
            store,
            settings,
            tokenizer_dir,
            threads,
            requests,
        )
        self.prompts = open_prompts(settings) if prompts is None else prompts
        parts = {name: text.ids[: settings.heldout_sequences] for name, text in heldout.items()}
        for name, ids_SL in parts.items():
            if len(ids_SL) < 2:
                got = f"data.heldout's {name} holds {len(ids_SL)} row"
                raise ValueError(
                    f"{got}; an interval needs at least 2: add text or lower data.seq_len"
                )
        self.ids_SL = torch.cat(list(parts.values()))
        ends = np.cumsum([0, *map(len, parts.values())]).tolist()
        self.texts = {
            name: slice(ends[i], ends[i + 1]) for i, name in enumerate(parts)
        }  # name -> its rows of ids_SL

        # What scores depend on: a change in any of these makes new ones.
        self.data_dir = Path(settings.data_dir).expanduser() if settings.data_dir else None
        folders = [
            local_folder(name, place)
            for place in (configs_dir() / "tasks", self.data_dir)
            if place
            for name in settings.tasks
        ]
        tasks = sha256_json(
            {folder.name: file_table(folder) for folder in folders if folder.is_dir()}
        )
        asked = sha256_json([as_row(prompt) for prompt in self.prompts])
        text = sha256_json({name: packed.digest for name, packed in heldout.items()})
        self.digests = {
            "the tasks' files": tasks,
            "the open prompts": asked,
            "the held-out text": text,
        }
        self.longest = (
            read_config(tokenizer_dir).get("max_position_embeddings") or sys.maxsize
        )  # tokens that a model sees
        own = (
            {name: value for name, value in vars(settings).items() if name != "data_dir"}
            | {  # what lies there counts, not where it is
                "schema": 4,
                "tasks": tuple(settings.tasks),
                "threads": threads,
                "tokenizer": tokenizer_digest(tokenizer_dir),
                "longest": self.longest,
                "requests": requests and sha256_json(requests),
                "tasks_digest": tasks,
                "open_prompts": asked,
                "machine": sha256_json(machine.describe(threads))[:16],
            }
        )
        self.settings_named = {name: str(value) for name, value in own.items()} | {"text": text}

    def measure(
        self,
        model: Model,
        *,
        tasks: bool = True,
        asked: str = "all",
        timed: bool = True,
        against: Measured | None = None,
        limits: Sequence[Mapping[str, Any]] = (),
    ) -> Measured:
        """The model's own scores, from the store if they are there.

        `tasks=False` leaves the tasks out; with `eval.stop_early` they go on only until every
        accuracy limit in `limits` on the comparison with the teacher, `against`, is decided.
        `asked`: all open prompts, the fixed quarter, or none.
        """
        early = (
            (against.items, against.chance, limits)
            if against and tasks and self.settings.stop_early
            else None
        )
        until = (
            early
            and against
            and [
                against.key,
                [[n, some[n].max, some[n].min] for some in limits for n in some if is_accuracy(n)],
            ]
        )
        # The model's digest comes first: by it gc knows whose scores these are.
        named = [
            model.digest,
            model.runtime,
            self.depends(model.runtime),
            tasks,
            asked,
            timed,
            until,
        ]
        key = f"{model.digest[:16]}-{sha256_json(named)[:32]}"
        path = self.store.root / "scores" / f"{key}.json"
        if not (path.is_file() and self._states_path(key).is_file()):
            self.check_tokenizer(model)
            write_json(
                path,
                self._own_scores(
                    model, key, self.settings.tasks if tasks else [], early, asked, timed=timed
                ),
            )
        return Measured(model, key, **json.loads(path.read_text()))

    def check_tokenizer(self, model: Model) -> list[str]:
        """Refuse a model of other tokens before anything is scored; what else differs from the
        teacher's tokenizer, as sentences.

        ValueError as `vocabulary.check_same`.
        """
        return check_same(model, self.tokenizer_dir)

    def depends(self, runtime: str) -> list[Any]:
        """What scores depend on besides the model and what is asked of it: settings, texts and
        tasks, sources, and versions of what computes.
        """
        ours = sources_digest(*SOURCES, *SOURCES_OF_RUNTIME[runtime])
        return [self.settings_named, ours, versions_of(*SCORES, *OF_RUNTIME[runtime])]

    def compare(self, student: Measured, reference: Measured) -> Scores:
        """kl_to_teacher and top1_agree, beside any `reference`, on the held-out texts, each and
        together, with intervals over rows; from the store if it is there.
        """
        path = self.store.root / "scores" / f"{student.key}-{reference.key}.json"
        if not path.is_file():
            write_json(
                path, closeness(self._states(reference), self._states(student), len(self.ids_SL))
            )
        near, found = json.loads(path.read_text()), Scores({}, {}, [], {})
        rows: dict[str, list[list[float]]] = {}
        for name, values_S in (
            ("kl_to_teacher", near["kl_rows"]),
            ("top1_agree", near["top1_rows"]),
        ):
            rows |= {name: [values_S]} | {
                f"{name}/{text}": [values_S[part]] for text, part in self.texts.items()
            }
        for name, (values,) in rows.items():
            found.scores[name], found.intervals[name] = (
                math.fsum(values) / len(values),
                ratio_interval(values),
            )
        return found._replace(rows=rows)

    def parity(self, shipped: Measured, checkpoint: Measured, name: str) -> dict[str, float]:
        """What `score/parity.py` measures of a file, `name` in `export.files`, and its
        checkpoint, from the store if it is there.
        """
        depends = sha256_json(
            [
                checkpoint.key,
                name,
                sources_digest("compress.score.parity", formats.parse(name)[0].source),
            ]
        )[:32]
        path = self.store.root / "scores" / f"{shipped.key}-{depends}.parity.json"
        if not path.is_file():
            write_json(
                path,
                parity(
                    checkpoint.model.path,
                    shipped.model.path,
                    name,
                    self.ids_SL,
                    self._states(shipped),
                    self.threads,
                ),
            )
        return json.loads(path.read_text())

    def beside(self, student: Measured, teacher: Measured, parent: Measured | None) -> Scores:
        """A student beside its teacher and, for the KL, its parent."""
        near = self.compare(student, teacher)
        rows = dict(near.rows)
        if parent is not None:
            other = self.compare(student, parent)
            for name in [name for name in other.scores if name.startswith("kl_to_teacher")]:
                renamed = name.replace("kl_to_teacher", "kl_to_parent")
                near.scores[renamed], near.intervals[renamed], rows[renamed] = (
                    other.scores[name],
                    other.intervals[name],
                    other.rows[name],
                )
        if student.answers and teacher.answers:
            scores, intervals = beside_teacher(student.answers, teacher.answers)
            near.scores.update(scores)
            near.intervals.update(intervals)
            every = len(student.answers) == len(
                teacher.answers
            )  # not of stages in between: it takes the teacher six seconds
            if every and (told := self._plausible(student, teacher)):
                near.scores["open/plausible"], near.intervals["open/plausible"] = (
                    told["value"],
                    told["interval"],
                )
        near = near._replace(rows=rows)
        if not student.items:
            return near
        paired = paired_scores(
            student.items,
            teacher.items,
            teacher.chance,
            student.level,
            partial=self.settings.stop_early,
        )
        scores = near.scores | paired.scores | drift(student.scores, teacher.scores)
        return Scores(scores, near.intervals | paired.intervals, paired.excluded, near.rows)

    def _plausible(self, student: Measured, teacher: Measured) -> dict[str, Any]:
        """What the teacher finds of the student's answers, from the store if it is there; {} where
        the teacher is not a torch checkpoint.
        """
        from compress.score.lm import torch_lm  # lm-eval takes seconds to import

        path = self.store.root / "scores" / f"{student.key}-{teacher.key}.open.json"
        if teacher.model.runtime != "torch":
            return {}
        if not path.is_file():
            tokenizer = load_tokenizer(teacher.model.path)
            loaded: Any = load_model(teacher.model.path)
            lm = torch_lm(loaded.to(best_device()), tokenizer, self.settings.batch_size)
            write_json(path, plausible(student.answers, teacher.answers, lm, tokenizer))
        return json.loads(path.read_text())

    def _states_path(self, key: str) -> Path:
        return self.store.root / "scores" / f"{key}.states.safetensors"

    def _states(self, measured: Measured) -> States:
        return States(
            safetensors.torch.load_file(self._states_path(measured.key))["hidden"],
            HEADS[measured.model.runtime](measured.model.path),
        )

    def _own_scores(
        self,
        model: Model,
        key: str,
        tasks: list[str],
        early: tuple[Any, ...] | None,
        asked: str,
        *,
        timed: bool,
    ) -> dict[str, Any]:
        from compress.score.lm import served_lm, torch_lm  # lm-eval takes seconds to import

        s, head, tokenizer = (
            self.settings,
            HEADS[model.runtime](model.path),
            load_tokenizer(self.tokenizer_dir),
        )
        context = min(s.context_tokens, self.longest)  # in every runtime
        with ExitStack() as stack:
            if model.runtime == "torch":
                loaded: Any = load_model(model.path)
                hidden_NH = hidden_of(loaded.to(best_device()), self.ids_SL)
                obey(loaded, model.path)
                lm = torch_lm(loaded, tokenizer, s.batch_size, context)
            else:
                opened = stack.enter_context(
                    closing(
                        RUNTIMES[model.runtime](
                            model.path, self.threads, max(self.ids_SL.shape[1] + 8, context)
                        )
                    )
                )
                hidden_NH = torch.cat(opened.hidden_states(self.ids_SL[:, :-1].tolist()))
                lm = served_lm(opened, head, tokenizer, s.batch_size, context)
            write_whole(
                self._states_path(key), safetensors.torch.save({"hidden": hidden_NH.contiguous()})
            )
            bits_S, bytes_S = bits_and_bytes(States(hidden_NH, head), self.ids_SL, tokenizer)
            result, level = self._tasks(lm, tasks, early)
            picked = self._choice_form(lm, tokenizer) if asked != "none" else {}
        own, pages = accuracy(result.items, level), perplexities(result.items)
        scores: dict[str, float] = {"heldout_rows": len(self.ids_SL)} | size(model.path)
        intervals: dict[str, Any] = {}
        rows: dict[str, list[list[float]]] = {}

        # Bits per byte of each held-out text, and of all.
        for name, part in {"heldout": slice(None), **self.texts}.items():
            bits, count = bits_S[part], [float(b) for b in bytes_S[part]]
            scores |= {
                f"bits_per_byte/{name}": sum(bits) / sum(count),
                f"heldout_rows/{name}": len(bits),
            }
            rows[f"bits_per_byte/{name}"], intervals[f"bits_per_byte/{name}"] = (
                [
                    bits,
                    count,
                ],
                ratio_interval(bits, count),
            )

        # What it says when it is asked.
        prompts = {
            "all": self.prompts,
            "quarter": [p for p in self.prompts if p.in_quarter],
            "none": [],
        }[asked]
        answers = answered(model, prompts, self.threads) if prompts else []
        if answers:
            said, spread = own_scores(answers)
            gap, gap_spread = choice_gap(picked, answers)
            scores, intervals = scores | said | gap, intervals | spread | gap_spread

        # Times, in processes of their own.
        lengths = tuple(
            length for length in s.prompt_lengths if length + s.new_tokens <= self.longest
        )
        how = Timing(
            s.prompt_tokens,
            s.new_tokens,
            s.repeats,
            self.threads,
            s.processes,
            lengths,
            tuple(s.batch_sizes),
        )
        times: dict[str, Any] = {"scores": {}, "intervals": {}, "latency": {}}
        if timed or s.time_stages:
            times = measure_latency(model.path, model.runtime, how)
        scores |= result.scores | own.scores | pages.scores | times["scores"]
        intervals |= own.intervals | pages.intervals | result.intervals | times["intervals"]
        return times | {
            "scores": scores,
            "intervals": intervals,
            "rows": rows,
            "level": level,
            "items": result.items,
            "chance": result.chance,
            "answers": answers,
        }

    def _choice_form(self, lm: Any, tokenizer: Any) -> dict[str, bool]:
        """Id -> whether the model finds the right one of four answers the likeliest, of the fixed
        quarter's facts.
        """
        facts = [prompt for prompt in self.prompts if prompt.choices and prompt.in_quarter]
        requests = []
        for prompt in facts:
            context = question_ids(tokenizer, prompt.prompt)
            for choice in (prompt.answer, *prompt.choices):
                requests.append(
                    (("", ""), context, tokenizer(choice, add_special_tokens=False)["input_ids"])
                )
        logliks = (
            [loglik for loglik, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
            if requests
            else []
        )
        starts, ends = (
            np.cumsum([0] + [1 + len(p.choices) for p in facts])[:-1],
            np.cumsum([1 + len(p.choices) for p in facts]),
        )
        return {
            p.id: int(np.argmax(logliks[a:b])) == 0
            for p, a, b in zip(facts, starts, ends, strict=True)
        }

    def _tasks(
        self, lm: Any, tasks: list[str], early: tuple[Any, ...] | None
    ) -> tuple[TaskResult, float]:
        """What `lm` answers, and the level of the intervals over items."""
        s = self.settings
        score = partial(
            evaluate,
            lm,
            limit=s.limit,
            data_dir=self.data_dir,
            num_fewshot=s.num_fewshot,
            perturbations=s.perturbations,
        )
        if tasks and self.requests is not None:
            return rescore(lm, self.requests), 0.95
        if early is None:
            return score(tasks), 0.95
        items, chance, limits = early
        whole = [task for task in tasks if task not in asked_in_parts(items)]
        return until_certain(partial(rescore, lm), items, chance, limits, score(whole))
