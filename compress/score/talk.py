"""Asking a model something, in the runtime it is for and the way a deployment would: greedy
answers to a user's turn.

Every model is asked through what ships with it: its own chat template and tokenizer as its own
runtime reads them, and its own idea of where an answer ends (a GGUF's metadata, genai_config.json,
generation_config.json). That is the point: a template that lost its generation prompt, a doubled
BOS or a missing end is then seen as what it does to answers. A model without a chat template is
asked in plain text.

llama.cpp and ONNX Runtime speak in formats/llamacpp.py and formats/onnxruntime.py; torch here, in
fp32 as everything is scored. Legend: B prompts.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from more_itertools import chunked

from compress.formats.llamacpp import Answer, Ending, LlamaCpp
from compress.formats.onnxruntime import OnnxRuntime
from compress.models.chats import prompt_ids, render
from compress.models.checkpoint import Model, best_device, load_model
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.ends import obey
from compress.models.tokenizer import load_tokenizer

CONTEXT_TOKENS = 512  # of a question with its answer
TOGETHER = 32  # questions that are answered together: the rest waits
Turns = Sequence[dict[str, str]]


class Speaker(Protocol):
    """A model in its runtime."""

    def chat_prompt(self, turns: Turns) -> str:
        """Turns {"role", "content"} rendered for an answer; ValueError where its template fails."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """What the model sees."""

    def answers(self, prompts: Sequence[str], n: int) -> list[Answer]:
        """Greedy, at most `n` tokens each."""

    def stream(self, prompt: str, n: int) -> Generator[str, None, Ending]:
        """Pieces of one greedy answer."""

    def close(self) -> None:
        """Frees what the runtime holds."""


def rendered(tokenizer: Any, turns: Turns, where: Path) -> str:
    """Turns as an HF tokenizer's chat template renders them for an answer. ValueError when it
    fails or renders nothing of what was said.
    """
    try:
        text = render(tokenizer, [turns], generation=True)[0]
    except ValueError as error:
        raise ValueError(
            f"{where}: its chat template fails ({error}); mend chat_template in the tokenizer's"
            " files"
        ) from error

    # A template without a place for the user's turn would ask every question alike.
    if turns[-1]["content"].strip() not in text:
        raise ValueError(
            f"{where}: its chat template drops what the user says; mend chat_template in the"
            " tokenizer's files"
        )
    return text


class TorchSpeaker:
    """A checkpoint directory as transformers runs it, its generation_config.json obeyed but for
    sampling; it ends where compress/models/ends.py says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer: Any = load_tokenizer(path)
        self.tokenizer.padding_side = "left"

        model: Any = load_model(path)
        self.model: Any = model.to(best_device())
        use_cpu_kernels(self.model)
        self.ends = obey(self.model, path, self.tokenizer)

        # Any token pads, as nothing looks at padding.
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = (
                self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
            )

    def chat_prompt(self, turns: Turns) -> str:
        return rendered(self.tokenizer, turns, self.path)

    def answers(self, prompts: Sequence[str], n: int) -> list[Answer]:
        """In batches of TOGETHER, the longest first, padded on the left."""
        ids_B = [self.prompt_ids(prompt) for prompt in prompts]
        longest_first = sorted(range(len(ids_B)), key=lambda i: -len(ids_B[i]))
        answer_of: dict[int, Answer] = {}
        for batch_numbers in chunked(longest_first, TOGETHER):
            ids = [ids_B[i] for i in batch_numbers]
            batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            for i, row in zip(batch_numbers, self._generate(batch, n), strict=True):
                answer_of[i] = self._answer(row)
        return [answer_of[i] for i in range(len(prompts))]

    def stream(self, prompt: str, n: int) -> Generator[str, None, Ending]:
        """By transformers' own streamer; the model runs in a thread of its own, which stops when
        the stream is closed.
        """
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = Event()

        def stop(ids_BL: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """Whether nobody listens any more."""
            return torch.full(ids_BL.shape[:1], closed.is_set(), device=ids_BL.device)

        batch = self.tokenizer.pad({"input_ids": [self.prompt_ids(prompt)]}, return_tensors="pt")
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(self._generate, batch, n, streamer=streamer, stopping_criteria=[stop])

            # The stream ends with the job, also when it failed.
            job.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
            try:
                yield from (piece for piece in streamer if piece)
            finally:
                closed.set()
            answer = self._answer(job.result()[0])
        return Ending(len(answer.ids), answer.ended)

    def close(self) -> None:
        self.model = None

    def prompt_ids(self, text: str) -> list[int]:
        return text_ids(self.tokenizer, text)

    @torch.inference_mode()
    def _generate(self, batch: Any, n: int, **options: Any) -> list[list[int]]:
        """Token ids behind each prompt of a padded batch."""
        batch = batch.to(self.model.device)
        length = batch["input_ids"].shape[1]

        # What its generation_config.json says of sampling does not count.
        greedy = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        out = self.model.generate(**batch, max_new_tokens=n, max_length=None, **greedy, **options)
        return out[:, length:].tolist()

    def _answer(self, row: list[int]) -> Answer:
        """Up to the first end token."""
        end = next((i for i, token in enumerate(row) if token in self.ends), None)
        ids = row[:end]
        return Answer(ids, self.tokenizer.decode(ids, skip_special_tokens=True), end is not None)


SPEAKERS: dict[str, Callable[[Path, int, int, int], Speaker]] = {
    "torch": lambda path, threads, context, together: TorchSpeaker(path),
    "llama.cpp": lambda path, threads, context, together: LlamaCpp(
        path, threads, context, together, embedding=False
    ),
    "onnxruntime": lambda path, threads, context, together: OnnxRuntime(path, threads, context),
}


def open_speaker(
    model: Model, threads: int, context: int = CONTEXT_TOKENS, together: int = TOGETHER
) -> AbstractContextManager[Speaker]:
    """A model in its own runtime for `together` questions of `context` tokens with their answers,
    closed at the end of a `with` block.

    ValueError when the runtime can't load it.
    """
    return closing(SPEAKERS[model.runtime](model.path, threads, context, together))


def plain_text(turns: Turns) -> str:
    """Turns as a model without a chat template is asked them: each a line."""
    return "".join(turn["content"] + "\n" for turn in turns)


def question_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a question for an answer, as an HF tokenizer's model is asked it."""
    turns = [{"role": "user", "content": question}]
    return (
        prompt_ids(tokenizer, turns)
        if tokenizer.chat_template
        else text_ids(tokenizer, plain_text(turns))
    )


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered prompt; a chat template writes its own BOS."""
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template, verbose=False)[
        "input_ids"
    ]


def has_template(model: Model) -> bool:
    """Whether a chat template ships with the model."""
    if model.runtime == "llama.cpp":
        from compress.models.gguf_header import read_fields

        return bool(read_fields(model.path)[0].get("tokenizer.chat_template"))
    return bool(load_tokenizer(model.path).chat_template)


def prompts_of(speaker: Speaker, questions: Sequence[str], templated: bool) -> list[str]:
    """Questions as the model wants them: rendered by its chat template,
    or as lines of plain text.
    """
    asked = [[{"role": "user", "content": question}] for question in questions]
    return [speaker.chat_prompt(turns) if templated else plain_text(turns) for turns in asked]
