"""Everything measured of one model, kept by what it depends on: (weights digest, evaluation
digest, runtime, machine).

`Scorer.measure` gives the numbers a model has by itself (score/alone.py: tasks, open answers, bits
per byte, size, latency, memory); `Scorer.compare` those it has only beside another (KL, top-1
agreement), `Scorer.beside` all that it has beside its teacher (accuracy and answers kept, flips).
Latency runs in a process of its own, in the shipping type. Stages in between are asked a fixed
quarter of the open prompts and are not timed.

Below `scores` in the store lie, by keys of models:

    KEY.json                 a model's own scores     KEY.states.safetensors   its hidden states
    KEY-DIGEST.states.safetensors                     a reference's, in a student's tokens
    KEY-KEY.json             closeness of two         KEY-KEY.open.json        open/plausible
    KEY-DIGEST.parity.json   parity of a file with its checkpoint
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch

from compress import formats
from compress.formats.devices import check_device
from compress.formats.gguf_tokenizer import read_tokenizer
from compress.formats.runtimes import runtime_of
from compress.keys import sources_digest
from compress.models.checkpoint import Model, best_device, load_model
from compress.models.gguf_header import read_metadata
from compress.models.reading import read_in, reading
from compress.models.tokenizer import load_tokenizer
from compress.models.vocabulary import check_same
from compress.score.alone import scores_alone
from compress.score.beside import closeness_scores, items_beside, kl_to_parent
from compress.score.fidelity import States, closeness, hidden_of
from compress.score.inputs import (
    ScoreInputs,
    Setup,
    check_context,
    digests_of,
    first_rows,
    longest_context,
    named_settings,
    score_inputs,
)
from compress.score.intervals import Scores, merged
from compress.score.measured import EarlyStop, Measured
from compress.score.open import beside_teacher, plausible
from compress.score.parity import parity
from compress.score.prompts import Prompt, prompts_of_eval
from compress.score.settings import Eval
from compress.scratch import Scratch
from compress.store import Store, sha256_json, write_json, write_whole
from compress.train.packed import Packed


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
        heldout: Callable[[Path], Mapping[str, Packed]],
        tokenizer_dir: Path,
        threads: int,
        requests: list[dict[str, Any]] | None = None,
        prompts: list[Prompt] | None = None,
    ) -> None:
        """`heldout`: a checkpoint's directory -> texts by name in its tokens. `tokenizer_dir`: the
        teacher's. `requests`, `prompts`: a bundle's rendered items and open prompts, in place of
        the settings' own.
        """
        self.store = store
        self.prompts = open_prompts(settings) if prompts is None else prompts
        self._heldout = heldout
        texts = heldout(tokenizer_dir)
        self.setup = Setup(
            settings=settings,
            heldout=first_rows(texts, settings.heldout_sequences),
            prompts=self.prompts,
            requests=requests,
            tokenizer_dir=tokenizer_dir,
            threads=threads,
            longest=longest_context(tokenizer_dir),
        )
        check_context(self.setup)

        # What scores depend on: a change in any of these makes new ones.
        self.digests = digests_of(self.setup, texts)
        self.settings_named = named_settings(self.setup, self.digests)

        # What each model is scored with, in its own tokens, by its digest.
        self._setups: dict[str, tuple[Setup, dict[str, str]]] = {}
        self._rebuilt = Scratch()

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
        `asked`: all open prompts, the fixed quarter, or none. ConfigError where its runtime can't
        compute on `eval.device`.
        """
        check_device(model.runtime, self.setup.settings.device)
        early = None
        if against is not None and tasks and self.setup.settings.stop_early:
            early = EarlyStop(against, limits)

        # The model's digest comes first: by it gc knows whose scores these are.
        setup, settings_named = self._setup_of(model)
        depends = score_inputs(settings_named, model.runtime).key_parts()
        until = early.key_parts() if early else None
        named = [model.digest, model.runtime, depends, tasks, asked, timed, until]
        key = f"{model.digest[:16]}-{sha256_json(named)[:32]}"

        path = self._path(f"{key}.json")
        if not (path.is_file() and self._states_path(key).is_file()):
            fields = scores_alone(
                model,
                setup,
                self._states_path(key),
                tasks=self.setup.settings.tasks if tasks else [],
                asked=asked,
                timed=timed,
                early=early,
            )
            write_json(path, fields)
        return Measured(model, key, **json.loads(path.read_text()))

    def check_tokenizer(self, model: Model) -> list[str]:
        """Refuse a model of other tokens before anything is scored; what else differs from the
        teacher's tokenizer, as sentences.

        ValueError as `vocabulary.check_same`.
        """
        return check_same(model, self.setup.tokenizer_dir)

    def depends(self, runtime: str) -> ScoreInputs:
        """What scores of a model with the teacher's tokens depend on besides it and what is asked
        of it: settings, texts and tasks, sources, and versions of what computes.
        """
        return score_inputs(self.settings_named, runtime)

    def _setup_of(self, model: Model) -> tuple[Setup, dict[str, str]]:
        """What a model is scored with, in its own tokens, and the settings by name. ValueError as
        `check_tokenizer`.
        """
        if model.digest in self._setups:
            return self._setups[model.digest]
        self.check_tokenizer(model)

        setup, named = self.setup, self.settings_named
        if reading(model.path, setup.tokenizer_dir) is not None:
            tokens = self._tokens_of(model)
            texts = self._heldout(tokens)
            rows = first_rows(texts, setup.settings.heldout_sequences)
            setup = replace(setup, heldout=rows, tokenizer_dir=tokens)
            named = named_settings(setup, digests_of(setup, texts))
        self._setups[model.digest] = setup, named
        return setup, named

    def _tokens_of(self, model: Model) -> Path:
        """A directory with the HF tokenizer of a model whose tokens are its own: its directory, or
        what a GGUF says of it, written down.
        """
        if model.path.is_dir():
            return model.path
        folder = self._rebuilt.path / model.digest[:32]
        if not folder.is_dir():
            folder.mkdir()
            read_tokenizer(read_metadata(model.path), folder)
        return folder

    def compare(self, student: Measured, reference: Measured) -> Scores:
        """kl_to_teacher and top1_agree, beside any `reference`, on the held-out texts, each and
        together, with intervals over rows; from the store if it is there.
        """
        heldout = self._setup_of(student.model)[0].heldout
        path = self._path(f"{student.key}-{reference.key}.json")
        if not path.is_file():
            states = self._states_beside(reference, student), self._states(student)
            write_json(path, closeness(*states, len(heldout.ids_SL)))
        return closeness_scores(json.loads(path.read_text()), heldout.texts)

    def parity(self, shipped: Measured, checkpoint: Measured, name: str) -> dict[str, float]:
        """What `score/parity.py` measures of a file, `name` in `export.files`, and its
        checkpoint, from the store if it is there.
        """
        sources = sources_digest("compress.score.parity", formats.parse(name)[0].source)
        depends = sha256_json([checkpoint.key, name, sources])[:32]

        path = self._path(f"{shipped.key}-{depends}.parity.json")
        if not path.is_file():
            figures = parity(
                checkpoint.model.path,
                shipped.model.path,
                name,
                self._setup_of(shipped.model)[0].heldout.ids_SL,
                self._states(shipped),
                self.setup.threads,
            )
            write_json(path, figures)
        return json.loads(path.read_text())

    def beside(self, student: Measured, teacher: Measured, parent: Measured | None) -> Scores:
        """A student beside its teacher and, for the KL, its parent."""
        parts = [self.compare(student, teacher)]
        if parent is not None:
            parts.append(kl_to_parent(self.compare(student, parent)))
        if student.answers and teacher.answers:
            parts.append(self._answers_beside(student, teacher))
        if student.items:
            stop_early = self.setup.settings.stop_early
            parts.append(items_beside(student, teacher, stop_early=stop_early))
        return merged(parts)

    def _answers_beside(self, student: Measured, teacher: Measured) -> Scores:
        """Open answers beside the teacher's."""
        result = Scores(*beside_teacher(student.answers, teacher.answers), [])

        # Not of stages in between: it takes the teacher six seconds.
        if len(student.answers) == len(teacher.answers):
            plausible_record = self._plausible(student, teacher)
            if plausible_record:
                result.scores["open/plausible"] = plausible_record["value"]
                result.intervals["open/plausible"] = plausible_record["interval"]
        return result

    def _plausible(self, student: Measured, teacher: Measured) -> dict[str, Any]:
        """What the teacher finds of the student's answers, from the store if it is there; {} where
        the teacher is not a torch checkpoint.
        """
        from compress.score.lm import torch_lm  # lm-eval takes seconds to import

        if teacher.model.runtime != "torch":
            return {}
        path = self._path(f"{student.key}-{teacher.key}.open.json")
        if not path.is_file():
            tokenizer = load_tokenizer(teacher.model.path)
            loaded: Any = load_model(teacher.model.path)
            lm = torch_lm(loaded.to(best_device()), tokenizer, self.setup.settings.batch_size)
            write_json(path, plausible(student.answers, teacher.answers, lm, tokenizer))
        return json.loads(path.read_text())

    def _path(self, name: str) -> Path:
        return self.store.root / "scores" / name

    def _states_path(self, key: str) -> Path:
        return self._path(f"{key}.states.safetensors")

    def _states(self, measured: Measured) -> States:
        hidden_NH = safetensors.torch.load_file(self._states_path(measured.key))["hidden"]
        return States(hidden_NH, runtime_of(measured.model.runtime).head(measured.model.path))

    def _states_beside(self, reference: Measured, student: Measured) -> States:
        """The reference's states on the held-out rows of the student: its own where both have the
        same tokens, else read in the student's. ValueError for a file of other tokens.
        """
        fold = reading(student.model.path, reference.model.path)
        if fold is None:
            return self._states(reference)
        if reference.model.runtime != "torch":
            raise ValueError(
                f"{reference.model.path} can't be read in the tokens of {student.model.path}; give"
                " the checkpoint that the file was made of"
            )

        # Kept by both, for the next one in these tokens.
        setup, named = self._setup_of(student.model)
        path = self._states_path(f"{reference.key}-{sha256_json(named)[:32]}")
        head = replace(runtime_of(reference.model.runtime).head(reference.model.path), fold=fold)
        if not path.is_file():
            loaded: Any = load_model(reference.model.path)
            read_in(loaded, fold)
            hidden_NH = hidden_of(loaded.to(best_device()), setup.heldout.ids_SL)
            write_whole(path, safetensors.torch.save({"hidden": hidden_NH.contiguous()}))
        return States(safetensors.torch.load_file(path)["hidden"], head)
