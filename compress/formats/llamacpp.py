"""The file that ships, run by llama.cpp itself (`xllamacpp`): hidden states, log-likelihoods,
text, latency.

llama.cpp's server gives no prompt log-probabilities, but as an embedding server without pooling it
returns the hidden states of all positions, after the final norm: h (L, H). With the decoded head W
(V, H) of that file, logits = h W^T. All blocks run with llama.cpp's own kernels (which quantize
activations to 8 bits); only the head's product is done here in fp32, so its quantized product is
skipped. Prompts go in as token ids: no BOS is added and ids are those of the torch side. The server
listens on a free port of 127.0.0.1 inside this process.

Cost: the server computes the head for every position (about a fifth of the time for SmolLM2) and
writes JSON (2%). A causal state depends on nothing to its right, so of prompts that begin alike
only the longest is run. torch is imported where it is needed: `python -m compress.score.latency`
measures peak memory.

Shapes: L length, H hidden, V vocabulary, N answer tokens.
"""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.formats.devices import gpu_layers

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.head import Head

GREEDY = {"temperature": 0, "cache_prompt": False}
SERVED_BATCH = 512  # tokens of prompts computed together where a file is served
_PARALLEL = 4  # sequences that the server decodes together: short prompts fill a batch


class Answer(NamedTuple):
    """Token ids that were generated, the end token left out; their text; whether the model ended
    by itself.
    """

    ids: list[int]
    text: str
    ended: bool


class Ending(NamedTuple):
    """What a stream returns: tokens that were generated, the end token left out; whether the model
    ended by itself.
    """

    tokens: int
    ended: bool


class LlamaCpp:
    """A GGUF held by a llama.cpp server in this process, for hidden states or, without
    `embedding`, for speed. Close it after use.

    `ctx_len`: longest prompt in tokens; `batch`: tokens of prompts computed together, None for a
    whole prompt; `draft`: another GGUF, and how many tokens it proposes at once. ValueError: a file
    is missing or llama.cpp can't load it.
    """

    def __init__(
        self,
        gguf: Path,
        threads: int,
        ctx_len: int,
        parallel: int = _PARALLEL,
        *,
        embedding: bool = True,
        device: str = "cpu",
        draft: tuple[Path, int] | None = None,
        batch: int | None = None,
    ) -> None:
        import xllamacpp

        self.gguf, self.ctx_len = gguf, ctx_len
        if not gguf.is_file():
            raise ValueError(f"{gguf}: no such GGUF file")

        # A server that keeps nothing between prompts.
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_parallel = parallel
        params.n_ctx = ctx_len * parallel
        # Without pooling a prompt must fit one micro-batch.
        params.n_batch = params.n_ubatch = min(ctx_len, batch or ctx_len)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers = gpu_layers(device)
        params.fit_params = params.warmup = params.ui = False
        params.cache_ram_mib = 0
        params.verbosity = -1

        # Of every position the state itself, as it is.
        if embedding:
            params.embedding = True
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
            params.embd_normalize = -1

        if draft is not None:
            kinds = xllamacpp.common_speculative_type
            params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            proposing = params.speculative.draft
            proposing.mparams.path, proposing.n_max = str(draft[0]), draft[1]
            proposing.n_gpu_layers = params.n_gpu_layers
            proposing.cpuparams.n_threads = proposing.cpuparams_batch.n_threads = threads

        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ValueError(
                f"{gguf}: llama.cpp can't load it ({error}); export it again"
            ) from error

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """`states` as tensors."""
        import torch

        return [torch.from_numpy(states_LH) for states_LH in self.states(prompts)]

    def states(self, prompts: Sequence[Sequence[int]]) -> list[Any]:
        """Hidden states after the final norm, an array (L, H) fp32 per prompt of L token ids.
        ValueError: empty or too long.

        The kernels for quantized weights round by batch, so a prompt's states may depend a little
        on what else is in the list.
        """
        import numpy as np
        from more_itertools import constrained_batches

        # Of prompts that begin alike the longest; in batches, which bound the size of an answer.
        runs = maximal(prompts, self.ctx_len)
        longest = sorted(set(runs.values()), key=lambda ids: (len(ids), ids))
        states: dict[tuple[int, ...], Any] = {}
        for batch in constrained_batches(longest, self.ctx_len * _PARALLEL):
            answer = self._post("/embedding", {"content": batch})
            entries = sorted(answer, key=lambda entry: entry["index"])
            for ids, entry in zip(batch, entries, strict=True):
                states[ids] = np.array(entry["embedding"], dtype=np.float32)
                assert len(states[ids]) == len(ids), "the server added or dropped tokens"

        return [states[runs[tuple(ids)]][: len(ids)] for ids in prompts]

    def tokenize(self, text: str) -> list[int]:
        """Token ids by llama.cpp's own tokenizer, special tokens in the text recognised,
        none added.
        """
        return self._post(
            "/tokenize", {"content": text, "add_special": False, "parse_special": True}
        )["tokens"]

    def generate(self, prompt: Sequence[int], n: int, stop: Sequence[str] = ()) -> str:
        """Greedy continuation of at most `n` tokens as text, ended by EOS or a string of `stop`
        (which is cut off).
        """
        return self._post(
            "/completion", GREEDY | {"prompt": list(prompt), "n_predict": n, "stop": list(stop)}
        )["content"]

    def chat_prompt(self, turns: Sequence[dict[str, str]]) -> str:
        """A conversation rendered for an answer by the chat template inside the file, as llama.cpp
        reads it. ValueError: it fails.
        """
        return self._post("/apply-template", {"messages": list(turns)})["prompt"]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt as a deployment's server cuts it: with BOS where the file
        asks for it.
        """
        return self._post(
            "/tokenize", {"content": prompt, "add_special": True, "parse_special": True}
        )["tokens"]

    def answers(self, prompts: Sequence[str], n: int) -> list[Answer]:
        """Greedy answers of at most `n` tokens to rendered prompts, cut into tokens by llama.cpp
        as in a deployment (with BOS where the file asks for it), decoded together: one request
        holds them all, so that they are batched in the same way every time. What a prompt begins
        with as the one before it in its slot, a template's system turn, is computed once.
        """
        kept = {"cache_prompt": True, "n_predict": n, "return_tokens": True}
        entries = self._post("/completion", GREEDY | kept | {"prompt": list(prompts)})

        # To one prompt the answer is no list.
        if not isinstance(entries, list):
            entries = [entries]
        return [_answer(entry) for entry in sorted(entries, key=lambda entry: entry["index"])]

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, seeds: Sequence[int], **sampling: float
    ) -> list[Answer]:
        """Sampled continuations of at most `n` tokens, each with a seed of its own; `sampling`:
        temperature, top_p, top_k.
        """

        def continued(ids: Sequence[int], seed: int) -> Answer:
            body = {
                "min_p": 0.0,
                "cache_prompt": False,
                "return_tokens": True,
                "prompt": list(ids),
                "n_predict": n,
                "seed": seed,
            }
            return _answer(self._post("/completion", body | sampling))

        with ThreadPoolExecutor(max(1, len(prompts))) as pool:
            return list(pool.map(continued, prompts, seeds))

    def stream(self, prompt: str, n: int) -> Generator[str, None, Ending]:
        """Pieces of a greedy answer of at most `n` tokens to a rendered prompt, as they come.
        ValueError: the server refuses.
        """
        body = GREEDY | {"prompt": prompt, "n_predict": n, "stream": True}
        event: dict[str, Any] = {}
        with closing(self._request("/completion", body)) as connection:
            for line in connection.getresponse():
                data = line.removeprefix(b"data: ")
                if data.startswith(b"{"):
                    event = json.loads(data)
                    yield event.get("content", "")

        # The last event says why it stopped; a refusal is the only event.
        if "stop_type" not in event:
            raise ValueError(
                f"llama.cpp with {self.gguf}: /completion refused: {event.get('error', event)}"
            )
        ended = event["stop_type"] == "eos"
        return Ending(event["tokens_predicted"] - ended, ended)

    def generate_ids(self, prompt: Sequence[int], n: int) -> list[int]:
        """Greedy continuation of at most `n` token ids, ended by EOS."""
        return self._post(
            "/completion", GREEDY | {"prompt": list(prompt), "n_predict": n, "return_tokens": True}
        )["tokens"]

    def completion(self, prompt: str, n: int) -> dict[str, Any]:
        """The server's own account of a greedy answer of at most `n` tokens to a rendered prompt:
        `tokens`, `timings`.
        """
        body = GREEDY | {"prompt": prompt, "n_predict": n, "return_tokens": True}
        return self._post("/completion", body)

    def ends_at(self, token: int) -> bool:
        """Whether a text ends at a token: it is made to come next,
        and llama.cpp says why it stopped.
        """
        body = GREEDY | {"prompt": [token], "n_predict": 2, "logit_bias": [[token, 1000.0]]}
        return self._post("/completion", body)["stop_type"] == "eos"

    def token_times(self, body: dict[str, Any]) -> list[float]:
        """Milliseconds of each token of a streamed completion,
        the first counted from the request.
        """

        def on_chunk(chunk: Any) -> None:
            if isinstance(chunk, dict) and any(
                choice.get("text") for choice in chunk.get("choices", [])
            ):
                times.append(time.perf_counter())

        times = [time.perf_counter()]
        self._server.handle_completions(body, on_chunk)
        return [1000 * (after - before) for before, after in pairwise(times)]

    def close(self) -> None:
        """Stops the server and frees the model. A server that is stopped before its loop runs
        would never end: its slots are asked for first.
        """
        if self._server is not None:
            with closing(self._request("/slots", method="GET")) as connection:
                connection.getresponse().read()
        self._server = None

    def _request(
        self, path: str, body: dict[str, Any] | None = None, method: str = "POST"
    ) -> http.client.HTTPConnection:
        """A request that was sent. One connection each: the server drops idle ones."""
        connection = http.client.HTTPConnection(
            self._server.listening_address.removeprefix("http://")
        )
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to one request. ValueError: the server refuses."""
        with closing(self._request(path, body)) as connection:
            response = connection.getresponse()
            answer = json.loads(response.read())
        if response.status != 200:
            raise ValueError(
                f"llama.cpp with {self.gguf}: {path} refused: {answer.get('error', answer)}"
            )
        return answer


def _answer(entry: dict[str, Any]) -> Answer:
    """An answer of the server, which counts the end token in."""
    ended = entry["stop_type"] == "eos"
    return Answer(entry["tokens"][:-1] if ended else entry["tokens"], entry["content"], ended)


def maximal(
    prompts: Sequence[Sequence[int]], ctx_len: int
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Prompt -> the longest given prompt that begins with it: in sorted order it follows directly.
    ValueError: empty, or above `ctx_len` tokens.
    """
    runs: dict[tuple[int, ...], tuple[int, ...]] = {}
    last: tuple[int, ...] = ()
    for ids in sorted({tuple(ids) for ids in prompts}, reverse=True):
        if not 0 < len(ids) <= ctx_len:
            raise ValueError(f"a prompt of {len(ids)} tokens; allowed: 1 to ctx_len = {ctx_len}")
        last = last if last[: len(ids)] == ids else ids
        runs[ids] = last
    return runs


def head(gguf: Path) -> Head:
    """The fp32 head as decoded from the file. ValueError as `gguf_head`."""
    import torch

    from compress.formats.gguf_head import gguf_head
    from compress.models.head import Head

    read = gguf_head(gguf)
    bias_V = None if read.bias_V is None else torch.from_numpy(read.bias_V)
    return Head(torch.from_numpy(read.weight_VH), bias_V, read.scale, read.softcap)


def timer(gguf: Path, threads: int, device: str) -> tuple[Callable[..., list[float]], int]:
    """What `compress.score.latency` times, tokens streamed one by one, and the file's bytes."""

    @lru_cache(maxsize=1)
    def server(ctx_len: int, parallel: int) -> LlamaCpp:
        return LlamaCpp(
            gguf, threads, ctx_len, parallel, embedding=False, device=device, batch=SERVED_BATCH
        )

    def generate(prompt_tokens: int, count: int, batch: int) -> list[float]:
        llama = server(prompt_tokens + count + 8, batch)

        # One word over and over: dense kernels take the same time for any ids, and each token is
        # whole text, sent at once (of a half UTF-8 sequence the server would wait for the rest).
        word = llama.tokenize("a")[-1:]
        body = GREEDY | {"ignore_eos": True, "logit_bias": [[word[0], 1000.0]]}
        if batch == 1:
            times = llama.token_times(
                body | {"prompt": word * prompt_tokens, "max_tokens": count, "stream": True}
            )
            assert len(times) == count, f"{len(times)} chunks for {count} tokens"
            return times

        # Of a batch the whole time is measured: its tokens come together.
        start = time.perf_counter()
        answers = llama._post(
            "/completion", body | {"prompt": [word * prompt_tokens] * batch, "n_predict": count}
        )
        assert [answer["tokens_predicted"] for answer in answers] == [count] * batch
        return [1000 * (time.perf_counter() - start)]

    return generate, gguf.stat().st_size


def speaker(gguf: Path, threads: int, context: int, together: int, device: str) -> LlamaCpp:
    """The file ready for `together` questions of `context` tokens with their answers."""
    return LlamaCpp(gguf, threads, context, together, embedding=False, device=device)


def has_template(gguf: Path) -> bool:
    """Whether a chat template is in its metadata."""
    from compress.models.gguf_header import read_header

    return bool(read_header(gguf).fields.get("tokenizer.chat_template"))


def context_tokens(gguf: Path) -> int | None:
    """As its metadata say."""
    from compress.models.gguf_header import read_header

    fields = read_header(gguf).fields
    return fields.get(f"{fields['general.architecture']}.context_length")


def params_and_files(gguf: Path) -> tuple[int, list[Path]]:
    """Elements of its tensors, and the file itself."""
    from compress.models.gguf_header import read_header

    return sum(math.prod(shape) for shape in read_header(gguf).tensors.values()), [gguf]
