"""A checkpoint directory in torch: asked, timed, sized and read as it ships.

Legend: B prompts or sequences, L positions.
"""

import math
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.formats.devices import Device, check_device
from compress.formats.llamacpp import Answer, Ending
from compress.formats.runtimes import Generate, Turns
from compress.formats.torch_decoding import Prompts
from compress.models.chats import render
from compress.models.checkpoint import (
    best_device,
    config_object,
    load_model,
    open_model,
    read_config,
    weight_files,
)
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.ends import obey
from compress.models.head import Head, head_of, scale_and_softcap
from compress.models.loading import head_place
from compress.models.model_config import is_packed
from compress.models.shapes import tensor_shapes
from compress.models.tokenizer import load_tokenizer

# Buffers that older checkpoints hold: no parameters.
COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


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

    def __init__(self, path: Path, together: int) -> None:
        self.path = path
        self.together = together
        self.tokenizer: Any = load_tokenizer(path)

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
        """In batches, the longest first, as compress/formats/torch_decoding.py makes them."""
        if not prompts:
            return []
        ids_B = [self.prompt_ids(prompt) for prompt in prompts]
        answer_of: dict[int, Answer] = {}
        asked = Prompts(self.model, ids_B, self.tokenizer.pad_token_id, self.together)
        for numbers, inputs in asked.batches(n):
            for i, row in zip(numbers, self._generate(inputs, n), strict=True):
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

        ids_BL = torch.tensor([self.prompt_ids(prompt)], device=self.model.device)
        inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(
                self._generate, inputs, n, streamer=streamer, stopping_criteria=[stop]
            )

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
    def _generate(self, inputs: dict[str, Any], n: int, **options: Any) -> list[list[int]]:
        """Token ids behind each prompt of a batch."""
        length = inputs["input_ids"].shape[1]

        # What its generation_config.json says of sampling and caches does not count.
        greedy = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "cache_implementation": None,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        out = self.model.generate(**inputs, max_new_tokens=n, max_length=None, **greedy, **options)
        return out[:, length:].tolist()

    def _answer(self, row: list[int]) -> Answer:
        """Up to the first end token."""
        end = next((i for i, token in enumerate(row) if token in self.ends), None)
        ids = row[:end]
        return Answer(ids, self.tokenizer.decode(ids, skip_special_tokens=True), end is not None)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered prompt; a chat template writes its own BOS."""
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template, verbose=False)[
        "input_ids"
    ]


def head(model_dir: Path) -> Head:
    """The fp32 head of a checkpoint, read without loading the model unless its weights are packed
    or have other names in the file.
    """
    config = read_config(model_dir)
    names = None if is_packed(config) else head_place(model_dir)
    if names is None:
        return head_of(load_model(model_dir)).detach()

    # Its tensors may lie in several files.
    tensors: dict[str, Tensor] = {}
    for file in weight_files(model_dir):
        with safe_open(file, "pt") as reader:
            here = [name for name in names if name in reader.keys()]  # noqa: SIM118 (no mapping)
            tensors |= {name: reader.get_tensor(name).float() for name in here}
    return Head(
        tensors[names[0]],
        tensors[names[1]] if len(names) > 1 else None,
        **scale_and_softcap(config_object(config).to_dict()),
    )


def timer(model_dir: Path, threads: int, device: str) -> tuple[Generate, int]:
    """A checkpoint, in bf16: the type that weights ship in."""
    check_device("torch", device)
    torch.set_num_threads(threads)
    place = torch.device("cuda" if device == Device.gpu else "cpu")
    model: Any = open_model(model_dir, torch.bfloat16)
    model.to(place)

    @torch.inference_mode()
    def generate(prompt_tokens: int, count: int, batch: int) -> list[float]:
        # Fixed ids, spread over the vocabulary.
        prompt_ids_L = torch.arange(prompt_tokens) * 7919 % model.config.vocab_size
        ids_BL = prompt_ids_L.repeat(batch, 1).to(place)

        cache = None
        times_ms = []
        for _ in range(count):
            start = time.perf_counter()
            out = model(ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids_BL, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            if place.type == "cuda":
                torch.cuda.synchronize()
            times_ms.append(1000 * (time.perf_counter() - start))
        return times_ms

    return generate, int(model.get_memory_footprint())


def speaker(path: Path, threads: int, context: int, together: int, device: str) -> TorchSpeaker:
    """The checkpoint ready for questions, `together` at once, on the GPU wherever there is one;
    torch has its threads already and makes room as it goes.
    """
    return TorchSpeaker(path, together)


def has_template(path: Path) -> bool:
    """Whether its tokenizer has a chat template."""
    return bool(load_tokenizer(path).chat_template)


def context_tokens(path: Path) -> int | None:
    """As its config.json says."""
    config = read_config(path)
    return config.get("max_position_embeddings") or config.get("n_positions")


def params_and_files(path: Path) -> tuple[int, list[Path]]:
    """Parameters from the headers of its weight files, and these files; of a packed directory all
    files ship.
    """
    # A head that is the embedding's matrix is left out.
    config = read_config(path)
    files = weight_files(path)
    shapes: dict[str, Any] = {}
    for file in files:
        for name, shape in tensor_shapes(file).items():
            if not name.endswith(COMPUTED):
                shapes[name] = shape
    if config.get("tie_word_embeddings") and any(name.endswith(EMBEDDINGS) for name in shapes):
        shapes.pop("lm_head.weight", None)

    # Of a packed directory all files ship.
    params = sum(math.prod(shape) for shape in shapes.values())
    return params, [
        file for file in path.rglob("*") if file.is_file()
    ] if "quantization_config" in config else files
