"""What all models of one evaluation are scored with, and what their scores therefore depend on."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import machine
from compress.assets import configs_dir
from compress.keys import OF_RUNTIME, SCORES, sources_digest, versions_of
from compress.models.checkpoint import read_config
from compress.models.tokenizer import load_tokenizer, tokenizer_digest
from compress.score.prompts import ANSWER_TOKENS, Prompt, as_row
from compress.score.settings import Eval
from compress.score.talk import question_ids
from compress.score.task_files import local_folder
from compress.store import file_table, sha256_json
from compress.train.packed import Packed

# Whose formulas scores are: with what they import, or alone where that leads through half of the
# package.
SOURCES = (
    "compress.score.fidelity",
    "compress.score.lm",
    "compress.score.sequential",
    "compress.models.checkpoint",
    "compress.score.scorer:",
    "compress.score.inputs:",
    "compress.score.measured:",
    "compress.score.alone:",
    "compress.score.file:",
    "compress.score.beside:",
    "compress.score.open:",
    "compress.score.prompts:",
    "compress.score.talk:",
    "compress.score.latency:",
    "compress.score.size:",
    "compress.text.repetition:",
)
SOURCES_OF_RUNTIME = {
    "torch": ("compress.formats.torch_runtime:",),
    "llama.cpp": ("compress.formats.llamacpp",),
    "onnxruntime": ("compress.formats.onnxruntime",),
}


@dataclass(frozen=True)
class Heldout:
    """Rows of held-out text, one text behind the other: token ids (S, L), and by a text's name
    which of the rows are its own.
    """

    ids_SL: Tensor
    texts: dict[str, slice]


@dataclass(frozen=True)
class Setup:
    """What every model is scored with. `requests`: rendered items in place of the settings'
    tasks; `longest`: tokens that a model sees at once.
    """

    settings: Eval
    heldout: Heldout
    prompts: list[Prompt]
    requests: list[dict[str, Any]] | None
    tokenizer_dir: Path
    threads: int
    longest: int

    @property
    def data_dir(self) -> Path | None:
        """`eval.data_dir`, the home folder written out."""
        folder = self.settings.data_dir
        return Path(folder).expanduser() if folder else None

    @property
    def context_tokens(self) -> int:
        """What a model sees at once in tasks, in every runtime."""
        return min(self.settings.context_tokens, self.longest)


@dataclass(frozen=True)
class ScoreInputs:
    """What scores depend on besides the model and what is asked of it: settings, texts and tasks
    by name, a digest of our sources, and package -> version of what computes.
    """

    settings: dict[str, str]
    sources: str
    versions: dict[str, str | None]

    def key_parts(self) -> list[Any]:
        """As a part of a key in the store."""
        return [self.settings, self.sources, self.versions]


def first_rows(heldout: Mapping[str, Packed], count: int) -> Heldout:
    """The first `count` rows of each text. ValueError for a text of a single row."""
    ids_by_text = {name: text.ids[:count] for name, text in heldout.items()}
    for name, ids_SL in ids_by_text.items():
        if len(ids_SL) < 2:
            got = f"data.heldout's {name} holds {len(ids_SL)} row"
            raise ValueError(f"{got}; an interval needs at least 2: add text or lower data.seq_len")

    # Where each text begins and ends among the rows of all.
    ends = np.cumsum([0, *map(len, ids_by_text.values())]).tolist()
    texts = {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(ids_by_text)}
    return Heldout(torch.cat(list(ids_by_text.values())), texts)


def longest_context(tokenizer_dir: Path) -> int:
    """Tokens that the teacher's configuration lets a model see; without a word about it, all."""
    return read_config(tokenizer_dir).get("max_position_embeddings") or sys.maxsize


def check_context(setup: Setup) -> None:
    """ValueError when an open prompt with its answer, or what is timed, is longer than the
    teacher's context: a model with learned positions has none behind it.
    """
    settings = setup.settings
    timed = settings.prompt_tokens + settings.new_tokens
    if timed > setup.longest:
        raise ValueError(
            f"eval.prompt_tokens={settings.prompt_tokens} and eval.new_tokens={settings.new_tokens}"
            f" are longer than the teacher's context of {setup.longest} tokens; lower them"
        )
    if not setup.prompts or setup.longest == sys.maxsize:
        return
    tokenizer = load_tokenizer(setup.tokenizer_dir)
    lengths = {prompt.id: len(question_ids(tokenizer, prompt.prompt)) for prompt in setup.prompts}
    worst = max(lengths, key=lengths.__getitem__)
    if lengths[worst] + ANSWER_TOKENS > setup.longest:
        raise ValueError(
            f"the open prompt {worst!r} has {lengths[worst]} tokens, its answer up to"
            f" {ANSWER_TOKENS}, and the teacher's context {setup.longest}; set eval.open_prompts to"
            " shorter ones, or to [] for none"
        )


def digests_of(setup: Setup, heldout: Mapping[str, Packed]) -> dict[str, str]:
    """Digests of what models are asked and compared on, by what a reader calls it."""
    # A task's files ship with the package or lie below `data_dir`.
    folders = []
    for place in (configs_dir() / "tasks", setup.data_dir):
        if place:
            folders += [local_folder(name, place) for name in setup.settings.tasks]
    tables = {folder.name: file_table(folder) for folder in folders if folder.is_dir()}

    return {
        "the tasks' files": sha256_json(tables),
        "the open prompts": sha256_json([as_row(prompt) for prompt in setup.prompts]),
        "the held-out text": sha256_json({name: text.digest for name, text in heldout.items()}),
    }


def named_settings(setup: Setup, digests: Mapping[str, str]) -> dict[str, str]:
    """All that scores depend on here, by name: a change in any of these makes new ones."""
    # What lies in `data_dir` counts, not where it is.
    named = {name: value for name, value in vars(setup.settings).items() if name != "data_dir"}
    named |= {
        "schema": 4,
        "tasks": tuple(setup.settings.tasks),
        "threads": setup.threads,
        "tokenizer": tokenizer_digest(setup.tokenizer_dir),
        "longest": setup.longest,
        "requests": setup.requests and sha256_json(setup.requests),
        "tasks_digest": digests["the tasks' files"],
        "open_prompts": digests["the open prompts"],
        "machine": sha256_json(machine.describe(setup.threads))[:16],
    }
    as_text = {name: str(value) for name, value in named.items()}
    return as_text | {"text": digests["the held-out text"]}


def score_inputs(settings_named: dict[str, str], runtime: str) -> ScoreInputs:
    """What scores of a model in `runtime` depend on."""
    return ScoreInputs(
        settings_named,
        sources_digest(*SOURCES, *SOURCES_OF_RUNTIME[runtime]),
        versions_of(*SCORES, *OF_RUNTIME[runtime]),
    )
