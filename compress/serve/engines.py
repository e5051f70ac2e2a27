"""torch and ONNX Runtime GenAI, token by token: what `speaking.py` serves.

Both read prompts as in `score/talk.py`: the model's own template and tokenizer, and its own idea of
where an answer ends. A token comes with its log-probability under the model's plain distribution,
without temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple, Protocol

Turns = Sequence[dict[str, str]]


class Sampling(NamedTuple):
    """How the next token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Token(NamedTuple):
    """A token and its log-probability in nats."""

    id: int
    logprob: float


class Engine(Protocol):
    """A model that answers one request at a time."""

    ends: set[int]
    context: int | None
    templated: bool

    def prompt(self, turns: Turns) -> str:
        """Turns by the model's chat template. ValueError: it fails."""

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""

    def tokens(
        self, ids: Sequence[int], n: int, sampling: Sampling, stop: Event
    ) -> Iterator[Token]:
        """At most `n` tokens, the end token last where there is one; none once `stop` is set."""

    def decoder(self) -> Callable[[int], str]:
        """Text that each next token adds; "" while a character is not whole."""


class TorchEngine:
    """A checkpoint directory by transformers, on the GPU wherever there is one."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch

        from compress.formats.torch_runtime import TorchSpeaker, context_tokens

        torch.set_num_threads(threads)
        self._speaker = TorchSpeaker(path, 1)
        self.ends = set(self._speaker.ends)
        self.context = context_tokens(path)
        self.templated = bool(self._speaker.tokenizer.chat_template)

    def prompt(self, turns: Turns) -> str:
        return self._speaker.chat_prompt(turns)

    def ids(self, text: str) -> list[int]:
        return self._speaker.prompt_ids(text)

    def tokens(
        self, ids: Sequence[int], n: int, sampling: Sampling, stop: Event
    ) -> Iterator[Token]:
        """By transformers' own loop, which runs in a thread and hands over what it draws."""
        queue: SimpleQueue[Token | BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                self._generate(ids, n, sampling, stop, queue)
                queue.put(None)
            except BaseException as error:
                queue.put(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while (token := queue.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            stop.set()
            thread.join()

    def _generate(
        self, ids: Sequence[int], n: int, sampling: Sampling, stop: Event, queue: Any
    ) -> None:
        """Puts every token into `queue`, behind the model's logits of which it was drawn."""
        import torch

        model = self._speaker.model
        logits_V: list[torch.Tensor] = []

        class Streamer:
            """What `generate` tells of: first the prompt, then each token."""

            begun = False

            def put(self, value: torch.Tensor) -> None:
                if self.begun:
                    token = int(value.flatten()[-1])
                    logprobs_V = logits_V.pop().float().log_softmax(-1)
                    queue.put(Token(token, float(logprobs_V[token])))
                self.begun = True

            def end(self) -> None:
                pass

        def keep(module: Any, arguments: Any, output: Any) -> None:
            logits_V[:] = [output.logits[0, -1]]

        def stopped(ids_BL: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full(ids_BL.shape[:1], stop.is_set(), device=ids_BL.device)

        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if sampling.temperature > 0:
            drawn = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)

        # The end token is among those that are handed over.
        hook = model.register_forward_hook(keep)
        ids_1L = torch.tensor([list(ids)], device=model.device)
        try:
            with torch.inference_mode():
                model.generate(
                    input_ids=ids_1L,
                    attention_mask=torch.ones_like(ids_1L),
                    max_new_tokens=n,
                    max_length=None,
                    top_k=None,
                    pad_token_id=self._speaker.tokenizer.pad_token_id,
                    streamer=Streamer(),
                    stopping_criteria=[stopped],
                    **drawn,
                )
        finally:
            hook.remove()

    def decoder(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        backend = self._speaker.tokenizer.backend_tokenizer
        return lambda token: stream.step(backend, token) or ""


class OnnxEngine:
    """A directory by ONNX Runtime GenAI, on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        from compress.formats.onnxruntime import OnnxRuntime, context_tokens, has_template

        self.context = context_tokens(path)
        self.templated = has_template(path)
        self._runtime = OnnxRuntime(path, threads, self.context or 0)
        self.ends = self._runtime.eos_ids()

    def prompt(self, turns: Turns) -> str:
        return self._runtime.chat_prompt(turns)

    def ids(self, text: str) -> list[int]:
        return self._runtime.prompt_ids(text)

    def tokens(
        self, ids: Sequence[int], n: int, sampling: Sampling, stop: Event
    ) -> Iterator[Token]:
        """By GenAI's generator."""
        search: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            search = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
            if sampling.seed is not None:
                search["random_seed"] = sampling.seed
        for token, logits_V in self._runtime.drawn(ids, n, **search):
            largest = float(logits_V.max())
            total = float(sum_exp(logits_V - largest))
            yield Token(token, float(logits_V[token]) - largest - math.log(total))
            if stop.is_set():
                return

    def decoder(self) -> Callable[[int], str]:
        return self._runtime.pieces()


def sum_exp(logits_V: Any) -> float:
    """Sum of exp over (V,) in float64."""
    import numpy as np

    return float(np.exp(logits_V.astype("float64")).sum())


def open_engine(runtime: str, path: Path, threads: int) -> Engine:
    """A model ready for prompts. ValueError: it can't be opened."""
    if runtime == "torch":
        return TorchEngine(path, threads)
    return OnnxEngine(path, threads)
