"""Asking a model something, in the runtime it is for and the way a deployment would: greedy answers to a user's turn.

Every model is asked through what ships with it: its own chat template and tokenizer as its own runtime reads them, and its own idea of
where an answer ends (a GGUF's metadata, genai_config.json, generation_config.json). That is the point: a template that lost its generation
prompt, a doubled BOS or a missing end is then seen as what it does to answers. A model without a chat template is asked in plain text.

llama.cpp and ONNX Runtime speak in score/llamacpp.py and score/onnxruntime.py; torch here, in fp32 as everything is scored.
Legend: B prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from more_itertools import chunked

from compress.checkpoint import Model, best_device, load_model, load_tokenizer
from compress.score.llamacpp import Answer, LlamaCpp
from compress.score.onnxruntime import OnnxRuntime
from compress.train.forward import use_cpu_kernels

CONTEXT_TOKENS = 512  # of a question with its answer
TOGETHER = 32  # questions that are answered together: the rest waits
Turns = Sequence[dict[str, str]]


class Speaker(Protocol):
    """A model in its runtime. `chat_prompt` renders turns {"role", "content"} for an answer; ValueError where its template fails."""

    def chat_prompt(self, turns: Turns) -> str: ...
    def answers(self, prompts: Sequence[str], n: int) -> list[Answer]: ...  # greedy, at most n tokens each
    def stream(self, prompt: str, n: int) -> Iterator[str]: ...  # pieces of one greedy answer
    def close(self) -> None: ...


def rendered(tokenizer: Any, turns: Turns, where: Path) -> str:
    """Turns as an HF tokenizer's chat template renders them for an answer. ValueError when it fails or renders nothing of what was said."""
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: its chat template fails ({error}); mend chat_template in the tokenizer's files") from error
    if turns[-1]["content"].strip() not in text:
        raise ValueError(f"{where}: its chat template drops what the user says; mend chat_template in the tokenizer's files")
    return text


class TorchSpeaker:
    """A checkpoint directory as transformers runs it, its generation_config.json obeyed but for sampling."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer: Any = load_tokenizer(path)
        self.tokenizer.padding_side = "left"
        self.model: Any = load_model(path).to(best_device())
        use_cpu_kernels(self.model)
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) - {None}
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)

    def chat_prompt(self, turns: Turns) -> str:
        return rendered(self.tokenizer, turns, self.path)

    def answers(self, prompts: Sequence[str], n: int) -> list[Answer]:
        """In batches of TOGETHER, the longest first, padded on the left."""
        ids_B = [self._ids(prompt) for prompt in prompts]
        order = sorted(range(len(ids_B)), key=lambda i: -len(ids_B[i]))
        found: dict[int, Answer] = {}
        for some in chunked(order, TOGETHER):
            batch = self.tokenizer.pad({"input_ids": [ids_B[i] for i in some]}, return_tensors="pt")
            for i, row in zip(some, self._generate(batch, n), strict=True):
                found[i] = self._answer(row)
        return [found[i] for i in range(len(prompts))]

    def stream(self, prompt: str, n: int) -> Iterator[str]:
        """By transformers' own streamer; the model runs in a thread of its own."""
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        batch = self.tokenizer.pad({"input_ids": [self._ids(prompt)]}, return_tensors="pt")
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self._generate, batch, n, streamer=streamer)
            done.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))  # also when it failed
            yield from (piece for piece in streamer if piece)
            done.result()

    def close(self) -> None:
        self.model = None

    def _ids(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt; a chat template writes its own BOS."""
        return self.tokenizer(prompt, add_special_tokens=not self.tokenizer.chat_template, verbose=False)["input_ids"]

    @torch.inference_mode()
    def _generate(self, batch: Any, n: int, **how: Any) -> list[list[int]]:
        """Token ids behind each prompt of a padded batch."""
        batch = batch.to(self.model.device)
        length = batch["input_ids"].shape[1]
        plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": self.tokenizer.pad_token_id}
        out = self.model.generate(**batch, max_new_tokens=n, max_length=None, **plain, **how)
        return out[:, length:].tolist()

    def _answer(self, row: list[int]) -> Answer:
        """Up to the first end token."""
        end = next((i for i, token in enumerate(row) if token in self.ends), None)
        ids = row[:end]
        return Answer(ids, self.tokenizer.decode(ids, skip_special_tokens=True), end is not None)


SPEAKERS: dict[str, Callable[[Path, int], Speaker]] = {
    "torch": lambda path, threads: TorchSpeaker(path),
    "llama.cpp": lambda path, threads: LlamaCpp(path, threads, CONTEXT_TOKENS, TOGETHER, embedding=False),
    "onnxruntime": lambda path, threads: OnnxRuntime(path, threads, CONTEXT_TOKENS),
}


def open_speaker(model: Model, threads: int) -> AbstractContextManager[Speaker]:
    """A model in its own runtime, closed at the end of a `with` block. ValueError when the runtime can't load it."""
    return closing(SPEAKERS[model.runtime](model.path, threads))


def has_template(model: Model) -> bool:
    """Whether a chat template ships with the model."""
    if model.runtime == "llama.cpp":
        from compress.export.gguf import read_fields

        return bool(read_fields(model.path)[0].get("tokenizer.chat_template"))
    return bool(load_tokenizer(model.path).chat_template)


def prompts_of(speaker: Speaker, questions: Sequence[str], templated: bool) -> list[str]:
    """Questions as the model wants them: rendered by its chat template, or as lines of plain text."""
    if not templated:
        return [question + "\n" for question in questions]
    return [speaker.chat_prompt([{"role": "user", "content": question}]) for question in questions]
