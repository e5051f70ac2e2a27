"""The scores that a model has by itself: tasks, open answers, bits per byte, size, times, memory.

Teacher, every stage and the shipped file go through the same functions with the same batch size,
dtype (fp32), prompts and held-out tokens, each in its own runtime.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from compress.formats.llamacpp import LlamaCpp
from compress.formats.onnxruntime import OnnxRuntime
from compress.formats.runtimes import runtime_of
from compress.models.checkpoint import best_device, load_model
from compress.models.ends import obey
from compress.models.model import Model
from compress.models.tokenizer import load_tokenizer
from compress.score.fidelity import States, bits_and_bytes, hidden_of
from compress.score.file import NO_TIMES, put_together, spoken_scores, timing_of
from compress.score.inputs import Heldout, Setup
from compress.score.intervals import Scores, ratio_interval
from compress.score.latency import measure as measure_latency
from compress.score.measured import EarlyStop
from compress.score.open import HfWording, answered, picks_right
from compress.score.prompts import Prompt
from compress.score.sequential import asked_in_parts, until_certain
from compress.score.tasks import TaskResult, evaluate, rescore
from compress.store import write_whole

# Runtimes whose models are scored through a server of hidden states; torch computes them itself.
SERVERS: dict[str, Any] = {"llama.cpp": LlamaCpp, "onnxruntime": OnnxRuntime}


def scores_alone(
    model: Model,
    setup: Setup,
    states_file: Path,
    *,
    tasks: list[str],
    asked: str,
    timed: bool,
    early: EarlyStop | None,
) -> dict[str, Any]:
    """A model's own scores, as the fields of a `Measured`; its final hidden states over the
    held-out rows go to `states_file`. `asked`: all open prompts, the fixed quarter, or none.
    """
    # What the loaded model computes.
    tokenizer = load_tokenizer(setup.tokenizer_dir)
    with _opened(model, setup, tokenizer) as (lm, states):
        hidden = {"hidden": states.hidden_NH.contiguous()}
        write_whole(states_file, safetensors.torch.save(hidden))
        bits_S, bytes_S = bits_and_bytes(states, setup.heldout.ids_SL, tokenizer)
        result, level = _tasks(lm, setup, tasks, early)
        picked: dict[str, bool] = {}
        if asked != "none":
            picked = picks_right(setup.prompts, lm.likelihoods, HfWording(tokenizer))
    del lm, states  # the model's place on the device is what is timed next
    torch.cuda.empty_cache()  # does nothing where no GPU is in use
    text = _of_text(bits_S, bytes_S, setup.heldout)

    # What it says when it is asked.
    prompts = _prompts_asked(setup.prompts, asked)
    device = setup.settings.device
    answers = answered(model, prompts, setup.threads, device) if prompts else []
    spoken = spoken_scores(answers, picked)

    # Times, in processes of their own.
    times = NO_TIMES
    if timed or setup.settings.time_stages:
        timing = timing_of(setup.settings, setup.threads, setup.longest)
        times = measure_latency(model.path, model.runtime, timing)
        bytes_a_token = text.scores["bytes_per_token/heldout"]
        times["scores"]["bytes_per_sec"] = times["scores"]["tok_per_sec"] * bytes_a_token

    text.scores["heldout_rows"] = len(setup.heldout.ids_SL)
    fields = put_together(model.path, result, spoken, times, text, level)
    return fields | {"answers": answers}


@contextmanager
def _opened(model: Model, setup: Setup, tokenizer: Any) -> Iterator[tuple[Any, States]]:
    """A model in its own runtime as an `LM`, and its states over the held-out rows."""
    from compress.score.lm import served_lm, torch_lm  # lm-eval takes seconds to import

    head = runtime_of(model.runtime).head(model.path)
    ids_SL = setup.heldout.ids_SL
    batch_size = setup.settings.batch_size
    if model.runtime == "torch":
        loaded: Any = load_model(model.path)
        hidden_NH = hidden_of(loaded.to(best_device()), ids_SL)
        obey(loaded, model.path)
        lm = torch_lm(loaded, tokenizer, batch_size, setup.context_tokens)
        yield lm, States(hidden_NH, head)
        return

    # A server holds the longer of a held-out row and what a task may show.
    capacity = max(ids_SL.shape[1] + 8, setup.context_tokens)
    device = setup.settings.device
    with closing(
        SERVERS[model.runtime](model.path, setup.threads, capacity, device=device)
    ) as server:
        hidden_NH = torch.cat(server.hidden_states(ids_SL[:, :-1].tolist()))
        lm = served_lm(server, head, tokenizer, batch_size, setup.context_tokens)
        yield lm, States(hidden_NH, head)


def _tasks(
    lm: Any, setup: Setup, tasks: list[str], early: EarlyStop | None
) -> tuple[TaskResult, float]:
    """What `lm` answers, and the level of the intervals over items."""
    # A bundle's own items, as they were rendered.
    if tasks and setup.requests is not None:
        return rescore(lm, setup.requests), 0.95

    score = partial(
        evaluate,
        lm,
        limit=setup.settings.limit,
        data_dir=setup.data_dir,
        num_fewshot=setup.settings.num_fewshot,
        perturbations=setup.settings.perturbations,
    )
    if early is None:
        return score(tasks), 0.95

    # What can't be asked item by item is asked in full.
    items, chance = early.teacher.items, early.teacher.chance
    in_parts = asked_in_parts(items)
    rest = score([task for task in tasks if task not in in_parts])
    return until_certain(partial(rescore, lm), items, chance, early.limits, rest)


def _of_text(bits_S: list[float], bytes_S: list[int], heldout: Heldout) -> Scores:
    """Bits per byte and bytes per token of each held-out text, and of all as `heldout`."""
    labels = heldout.ids_SL.shape[1] - 1
    result = Scores({}, {}, [], {})
    rows: dict[str, list[list[float]]] = {}
    for name, part in {"heldout": slice(None), **heldout.texts}.items():
        bits, count = bits_S[part], [float(number) for number in bytes_S[part]]
        result.scores[f"bits_per_byte/{name}"] = sum(bits) / sum(count)
        result.scores[f"bytes_per_token/{name}"] = sum(count) / (len(count) * labels)
        result.scores[f"heldout_rows/{name}"] = len(bits)
        result.intervals[f"bits_per_byte/{name}"] = ratio_interval(bits, count)
        rows[f"bits_per_byte/{name}"] = [bits, count]
    return result._replace(rows=rows)


def _prompts_asked(prompts: Sequence[Prompt], asked: str) -> list[Prompt]:
    """All of the prompts, the fixed quarter, or none."""
    quarter = [prompt for prompt in prompts if prompt.in_quarter]
    return {"all": list(prompts), "quarter": quarter, "none": []}[asked]
