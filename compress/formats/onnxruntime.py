"""The directory that ships, run by ONNX Runtime: hidden states by `onnxruntime`, text and latency
by `onnxruntime_genai`.

Both open the same model.onnx. Hidden states of all positions are an output of the graph, so the
head's product over the vocabulary is not computed for them; logits = h W^T with the head decoded
from the file, in fp32, as for llama.cpp. Generation goes the way a deployment does: GenAI's
generator, its tokenizer, the end tokens of genai_config.json.

A directory may come from anybody, and genai_config.json can name a shared library, other files and
other providers. So formats/onnx_folder.py reads both files first, and refuses whatever
formats/onnx.py does not write, before ONNX Runtime sees the directory.

torch is imported where it is needed: `python -m compress.score.latency` measures peak memory.
Shapes: L length, H hidden.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.formats.devices import check_device
from compress.formats.llamacpp import Answer, Ending, maximal
from compress.formats.onnx_folder import CONFIG, MODEL, wheel
from compress.models.end_files import as_ids

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.head import Head


class OnnxRuntime:
    """An exported directory on `threads` threads; prompts of at most `ctx_len` tokens. ValueError:
    it can't be opened. Close it after use.
    """

    def __init__(self, folder: Path, threads: int, ctx_len: int, *, device: str = "cpu") -> None:
        check_device("onnxruntime", device)
        self.folder, self.threads, self.ctx_len = folder, threads, ctx_len
        from compress.formats.onnx_folder import check_folder

        # What the folder's files ask for is looked at before ONNX Runtime sees them.
        self.about: dict[str, Any] = check_folder(folder)["model"]
        genai = self._genai = wheel("onnxruntime_genai")
        try:
            config = genai.Config(str(folder))
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = genai.Model(config)
            self._tokenizer = genai.Tokenizer(self._model)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{folder}: ONNX Runtime GenAI can't load it ({error}); export it again"
            ) from error

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hidden states after the final norm, (L, H) fp32 per prompt of L token ids, run one by
        one. ValueError: empty or too long.
        """
        import torch

        # Of prompts that begin alike the longest alone is run.
        runs = maximal(prompts, self.ctx_len)
        states = {
            row: torch.from_numpy(fetch(self._session, row, ["hidden_states"])[0][0])
            for row in set(runs.values())
        }
        return [states[runs[tuple(ids)]][: len(ids)] for ids in prompts]

    @cached_property
    def _session(self) -> Any:
        """The plain session beside GenAI's, opened when it is first needed."""
        return open_session(self.folder, self.threads)

    def tokenize(self, text: str) -> list[int]:
        """Token ids by GenAI's own tokenizer."""
        return [int(i) for i in self._tokenizer.encode(text)]

    def eos_ids(self) -> set[int]:
        """The ids that end a text, as genai_config.json says."""
        return set(as_ids(self.about["eos_token_id"], self.folder / CONFIG))

    def ends_at(self, token: int) -> bool:
        """Whether a text ends at a token."""
        return token in self.eos_ids()

    def chat_prompt(self, turns: Sequence[dict[str, str]]) -> str:
        """A conversation rendered for an answer by the directory's own chat template, as GenAI
        reads it. ValueError: it fails.
        """
        try:
            return self._tokenizer.apply_chat_template(
                json.dumps(list(turns)), add_generation_prompt=True
            )
        except RuntimeError as error:
            raise ValueError(
                f"{self.folder}: ONNX Runtime GenAI can't apply the chat template ({error}); mend"
                " it and export again"
            ) from error

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt by GenAI's own tokenizer."""
        return self.tokenize(prompt)

    def answers(self, prompts: Sequence[str], n: int) -> list[Answer]:
        """Greedy answers of at most `n` tokens to rendered prompts, one by one."""
        answers = []
        ends = self.eos_ids()
        for prompt in prompts:
            ids = self.generate_ids(self.tokenize(prompt), n)
            ended = bool(ids) and ids[-1] in ends
            kept = ids[:-1] if ended else ids
            answers.append(Answer(kept, self._tokenizer.decode(kept), ended))
        return answers

    def stream(self, prompt: str, n: int) -> Generator[str, None, Ending]:
        """Pieces of a greedy answer of at most `n` tokens to a rendered prompt, as they come."""
        decode = self.pieces()
        ends = self.eos_ids()
        count = 0
        for token in self.tokens(self.tokenize(prompt), n):
            if token in ends:
                return Ending(count, True)
            count += 1
            yield decode(token)
        return Ending(count, False)

    def tensors(self) -> dict[str, Tensor]:
        """HF state-dict name -> fp32 tensor, decoded from the file."""
        from compress.formats.onnx_weights import decode_onnx

        return decode_onnx(self.folder)

    def pieces(self) -> Callable[[int], str]:
        """Text that each next token of an answer adds; "" while a character is not whole."""
        stream = self._tokenizer.create_stream()
        return lambda token: str(stream.decode(token))

    def drawn(self, prompt: Sequence[int], n: int, **search: Any) -> Iterator[tuple[int, Any]]:
        """A continuation of at most `n` ids, one by one, each with the logits (V,) that it was
        drawn of; an end token is the last. `search`: GenAI's search options.
        """
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=len(prompt) + n, **search)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(list(prompt))
        while not generator.is_done():
            logits_V = generator.get_logits().reshape(-1)
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0]), logits_V

    def tokens(self, prompt: Sequence[int], n: int, **search: Any) -> Iterator[int]:
        """Greedy continuation of at most `n` ids, one by one; an end token is the last. `search`:
        more of GenAI's search options.
        """
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + n, **search)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(list(prompt))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def generate_ids(self, prompt: Sequence[int], n: int) -> list[int]:
        """All of `tokens`."""
        return list(self.tokens(prompt, n))

    def generate(self, prompt: Sequence[int], n: int, stop: Sequence[str] = ()) -> str:
        """Greedy continuation of at most `n` tokens as text, ended by an end token or a string of
        `stop` (which is cut off).
        """
        text = ""
        stream = self._tokenizer.create_stream()
        ends = self.eos_ids()
        for token in self.tokens(prompt, n):
            if token not in ends:
                text += stream.decode(token)
            if places := [text.index(s) for s in stop if s in text]:
                return text[: min(places)]
        return text

    def close(self) -> None:
        """Frees the model."""
        self.__dict__.pop("_session", None)
        self._tokenizer = self._model = None


def open_session(folder: Path, threads: int) -> Any:
    """The graph of a directory that was looked at, or has just been written, in ONNX Runtime."""
    ort = wheel("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])


def fetch(session: Any, ids: Sequence[int], names: Sequence[str]) -> list[Any]:
    """Arrays (1, L, ...) of the graph's outputs `names` for L token ids; what none of them needs,
    such as the head's product for hidden states, is not computed.
    """
    import numpy as np

    options = wheel("onnxruntime").RunOptions()
    options.only_execute_path_to_fetches = True
    empty_cache = {
        n.name: np.zeros([1, n.shape[1], 0, n.shape[3]], "float32")
        for n in session.get_inputs()
        if n.name.startswith("past")
    }
    ids_1L = np.array([ids], "int64")
    feed = empty_cache | {"input_ids": ids_1L, "attention_mask": np.ones_like(ids_1L)}
    arrays: list[Any] = session.run(list(names), feed, options)
    return arrays


def head(folder: Path) -> Head:
    """The fp32 head as decoded from the file: the lm_head's own weight, or the tied embedding.

    ValueError where genai_config.json claims another vocabulary than the head has rows.
    """
    from compress.formats.onnx_folder import check_folder
    from compress.formats.onnx_weights import decode_onnx
    from compress.models.head import Head

    rows = check_folder(folder)["model"]["vocab_size"]
    decoded = decode_onnx(folder)
    weight_VH = decoded.get("lm_head.weight", decoded["model.embed_tokens.weight"])
    if len(weight_VH) != rows:
        raise ValueError(
            f"{folder / CONFIG}, model: 'vocab_size' is {rows:,}, and the head of {MODEL} has"
            f" {len(weight_VH):,} rows; export the model again"
        )
    return Head(weight_VH)


def timer(folder: Path, threads: int, device: str) -> tuple[Callable[..., list[float]], int]:
    """What `compress.score.latency` times, no end obeyed, and the directory's bytes."""
    runtime = OnnxRuntime(folder, threads, ctx_len=0, device=device)

    def generate(prompt_tokens: int, count: int, batch: int) -> list[float]:
        prompt = [i * 7919 % runtime.about["vocab_size"] for i in range(prompt_tokens)]
        times = [time.perf_counter()]
        times += [
            time.perf_counter()
            for _ in runtime.tokens(
                prompt, count, min_length=prompt_tokens + count, batch_size=batch
            )
        ]
        return [1000 * (after - before) for before, after in pairwise(times)]

    return generate, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def speaker(folder: Path, threads: int, context: int, together: int, device: str) -> OnnxRuntime:
    """The directory ready for questions of `context` tokens with their answers, one at a time."""
    return OnnxRuntime(folder, threads, context, device=device)


def has_template(folder: Path) -> bool:
    """Whether its tokenizer has a chat template."""
    from compress.models.tokenizer import load_tokenizer

    return bool(load_tokenizer(folder).chat_template)


def context_tokens(folder: Path) -> int | None:
    """As its genai_config.json says."""
    from compress.formats.onnx_folder import genai_config

    return int(genai_config(folder)["model"]["context_length"])


def params_and_files(folder: Path) -> tuple[int, list[Path]]:
    """Parameters of its decoded tensors, and all files of the directory."""
    from compress.formats.onnx_weights import decode_onnx

    params = sum(weight.numel() for weight in decode_onnx(folder).values())
    return params, [file for file in folder.rglob("*") if file.is_file()]
