"""The scores that a GGUF has by itself, where nothing but llama.cpp and numpy is installed: tasks
by their rendered items, open answers, size, times, memory.

It is the path of `score/alone.py` without held-out text: the same items, statistics, answers and
times. Texts are cut by llama.cpp's own tokenizer, as a deployment's are; hidden states come from
llama.cpp, and the head's product is taken in fp32 (formats/gguf_head.py).
"""

from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress.formats.gguf_head import gguf_head
from compress.formats.llamacpp import LlamaCpp, context_tokens
from compress.models.gguf_header import read_metadata
from compress.models.model import Model
from compress.score.intervals import Scores, accuracy, perplexities
from compress.score.latency import Timing
from compress.score.latency import measure as measure_latency
from compress.score.likelihood import ArrayReadout, Likelihoods, ServedStates
from compress.score.open import answered, choice_gap, own_scores, picks_right
from compress.score.prompts import Prompt
from compress.score.settings import Eval
from compress.score.size import size
from compress.score.talk import plain_prompt
from compress.score.tasks import TaskResult, rescore

NO_TIMES: dict[str, Any] = {"scores": {}, "intervals": {}, "latency": {}}


class GgufWording:
    """Texts as token ids, by llama.cpp's tokenizer and the chat template in the file."""

    def __init__(self, server: LlamaCpp) -> None:
        fields = read_metadata(server.gguf)
        self.server = server
        self.templated = bool(fields.get("tokenizer.chat_template"))

        # What stands before a text without a context: its first token, else its end.
        names = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
        ids = [int(fields[name]) for name in names if name in fields]
        if not ids:
            raise ValueError(f"{server.gguf} names neither a first nor an end token; export again")
        self.prefix = ids[0], str(fields["tokenizer.ggml.tokens"][ids[0]])

        # An item's context comes with every choice.
        self.encode = lru_cache(maxsize=4)(self._encode)

    def _encode(self, text: str, special: bool) -> list[int]:
        return self.server.prompt_ids(text) if special else self.server.tokenize(text)

    def question(self, text: str) -> list[int]:
        """Ids of a question for an answer."""
        turns = [{"role": "user", "content": text}]
        prompt = self.server.chat_prompt(turns) if self.templated else plain_prompt(turns)
        return self.server.prompt_ids(prompt)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer."""
        return self.server.tokenize(text)


def file_scores(
    model: Model,
    settings: Eval,
    requests: Sequence[dict[str, Any]],
    prompts: Sequence[Prompt],
    threads: int,
) -> dict[str, Any]:
    """A GGUF's own scores but those of held-out text, as the fields of a `Measured`. `requests`:
    rendered items, as in `tasks.TaskResult`.

    ValueError when llama.cpp can't run it.
    """
    longest = context_tokens(model.path) or settings.context_tokens
    capacity = min(settings.context_tokens, longest)
    device = str(settings.device)
    result = TaskResult({}, [], {}, {})
    picked: dict[str, bool] = {}

    # What follows from likelihoods; nothing is loaded where nothing does.
    if requests or prompts:
        with closing(LlamaCpp(model.path, threads, capacity, device=device)) as server:
            wording = GgufWording(server)
            readout = ArrayReadout(gguf_head(model.path).logits)
            likelihoods = Likelihoods(
                ServedStates(server),
                readout,
                wording.encode,
                wording.prefix,
                settings.batch_size,
                capacity,
            )
            result = rescore(likelihoods, requests) if requests else result
            picked = picks_right(prompts, likelihoods, wording)

    # What it says, and how fast; in processes of their own.
    answers = answered(model, prompts, threads, device) if prompts else []
    times = measure_latency(model.path, model.runtime, timing_of(settings, threads, longest))
    return put_together(model.path, result, spoken_scores(answers, picked), times) | {
        "answers": answers
    }


def spoken_scores(answers: list[dict[str, Any]], picked: dict[str, bool]) -> Scores:
    """open/right, loops, ended and choice_gap; nothing where nothing was asked."""
    if not answers:
        return Scores({}, {}, [])
    scores, intervals = own_scores(answers)
    gap, gap_interval = choice_gap(picked, answers)
    return Scores(scores | gap, intervals | gap_interval, [])


def timing_of(settings: Eval, threads: int, longest: int) -> Timing:
    """How times are taken; without prompts that are longer than the model takes."""
    lengths = [
        length for length in settings.prompt_lengths if length + settings.new_tokens <= longest
    ]
    return Timing(
        settings.prompt_tokens,
        settings.new_tokens,
        settings.repeats,
        threads,
        settings.processes,
        tuple(lengths),
        tuple(settings.batch_sizes),
        str(settings.device),
        tuple(length for length in settings.context_lengths if length <= longest),
        settings.price_per_hour,
    )


def put_together(
    path: Path,
    result: TaskResult,
    spoken: Scores,
    times: dict[str, Any],
    text: Scores | None = None,
    level: float = 0.95,
) -> dict[str, Any]:
    """All of a model's own scores by name, as fields of a `Measured` but for its answers. `text`:
    figures of held-out text; `level`: of the intervals over items.
    """
    text = text or Scores({}, {}, [])
    correct = accuracy(result.items, level)
    documents = perplexities(result.items)

    # A perturbed answer's interval comes with the tasks, any other accuracy's from the items.
    scores: dict[str, float] = dict(size(path))
    scores |= text.scores | spoken.scores
    scores |= result.scores | correct.scores | documents.scores | times["scores"]
    intervals = text.intervals | spoken.intervals
    intervals |= correct.intervals | documents.intervals | result.intervals | times["intervals"]
    return times | {
        "scores": scores,
        "intervals": intervals,
        "rows": dict(text.rows),
        "level": level,
        "items": result.items,
        "chance": result.chance,
    }
