"""A teacher as an author: who writes text on a prompt, on whatever this machine has.

llama.cpp writes on a CPU, from a Q8_0 file of the teacher; vLLM on a GPU where it is installed,
else transformers. Batched floating-point sums differ between engines and machines, and with them
now and then a word.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from compress import machine
from compress.keys import sources_digest
from compress.machine import fast_dtype
from compress.models.checkpoint import best_device, digest, load_model
from compress.models.ends import end_ids, obey
from compress.models.tokenizer import load_tokenizer
from compress.store import sha256_json

Log = Callable[[str], None]
QUESTION_TEMPERATURE, ANSWER_TEMPERATURE = 0.7, 0.4
TOP_P, TOP_K = 0.95, 50
AT_ONCE = {"transformers": 16, "vllm": 512, "llama.cpp": 384}  # documents of a piece
SLOTS = 96  # that llama.cpp decodes together: 340 tokens/s on two idle cores, 290 with 48
CONTEXT_TOKENS = 1024  # of a conversation, template included, that llama.cpp holds


class Said(NamedTuple):
    """What an author wrote behind a prompt, and whether it ended by itself."""

    text: str
    ended: bool


class Author(Protocol):
    """A teacher that writes: prompts (ids), tokens at most, temperature, a seed each -> what it
    wrote behind each.

    `slots`: calls that it serves at the same time; 1 where a call's own prompts are the batch.
    """

    slots: int

    def write(
        self, prompts: Sequence[list[int]], tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Said]: ...
    def close(self) -> None: ...


class TransformersAuthor:
    """Any checkpoint, in bf16 where the machine is faster so.

    One seed, the first, counts for a batch.
    """

    slots = 1

    def __init__(self, teacher: Path) -> None:
        self.tokenizer: Any = load_tokenizer(teacher)
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        dtype = torch.bfloat16 if fast_dtype() == "bf16" else torch.float32
        model: Any = load_model(teacher, dtype)
        self.model: Any = model.to(best_device())
        self.ends = obey(self.model, teacher, self.tokenizer)

    @torch.inference_mode()
    def write(
        self, prompts: Sequence[list[int]], tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Said]:
        torch.manual_seed(seeds[0])
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(
            self.model.device
        )
        out = self.model.generate(
            **batch,
            max_new_tokens=tokens,
            do_sample=True,
            top_p=TOP_P,
            top_k=TOP_K,
            temperature=temperature,
            pad_token_id=self.tokenizer.pad_token_id,
        )

        # What was written stands behind the padded prompts.
        rows = out[:, batch["input_ids"].shape[1] :].tolist()
        return [
            Said(self.tokenizer.decode(row, skip_special_tokens=True), bool(self.ends & set(row)))
            for row in rows
        ]

    def close(self) -> None:
        self.model = None


class VllmAuthor:
    """vLLM, for a GPU."""

    slots = 1

    def __init__(self, teacher: Path) -> None:
        from vllm import LLM

        self.tokenizer: Any = load_tokenizer(teacher)
        self.engine: Any = LLM(str(teacher), dtype="bfloat16")
        self.ends = end_ids(teacher, self.tokenizer)

    def write(
        self, prompts: Sequence[list[int]], tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Said]:
        from vllm import SamplingParams

        sampling: dict[str, Any] = {"temperature": temperature, "top_p": TOP_P, "top_k": TOP_K}
        sampling |= {"max_tokens": tokens, "stop_token_ids": self.ends}
        requests = self.engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(seed=seed, **sampling) for seed in seeds],
            use_tqdm=False,
        )

        # Of each request there is one output.
        outputs = [request.outputs[0] for request in requests]
        return [
            Said(
                self.tokenizer.decode(output.token_ids, skip_special_tokens=True),
                output.finish_reason == "stop",
            )
            for output in outputs
        ]

    def close(self) -> None:
        self.engine = None


class LlamaCppAuthor:
    """llama.cpp on a Q8_0 file of the teacher, which is written into `folder` once."""

    slots = SLOTS

    def __init__(self, teacher: Path, folder: Path) -> None:
        from compress.formats.gguf import export_gguf
        from compress.formats.llamacpp import LlamaCpp

        key = sha256_json([digest(teacher), sources_digest("compress.formats.gguf")])
        file = folder / f"author-{key[:32]}.gguf"
        if not file.is_file():
            export_gguf(teacher, file, "Q8_0")
        self.server = LlamaCpp(
            file, machine.available_threads(), CONTEXT_TOKENS, SLOTS, embedding=False
        )

    def write(
        self, prompts: Sequence[list[int]], tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Said]:
        answers = self.server.sample(
            prompts, tokens, seeds, temperature=temperature, top_p=TOP_P, top_k=TOP_K
        )
        return [Said(answer.text, answer.ended) for answer in answers]

    def close(self) -> None:
        self.server.close()


def engine_for(teacher: Path) -> str:
    """What writes here: vllm, llama.cpp where the teacher's architecture has a place in a GGUF, or
    transformers.
    """
    from transformers import AutoConfig

    from compress.formats import gguf

    if torch.cuda.is_available():
        return "vllm" if find_spec("vllm") else "transformers"
    try:
        gguf.check_architecture(AutoConfig.from_pretrained(teacher, local_files_only=True))
    except ValueError:
        return "transformers"
    return "llama.cpp"


def open_author(engine: str, teacher: Path, folder: Path) -> Author:
    """The teacher as an author in one of the three engines."""
    if engine == "llama.cpp":
        return LlamaCppAuthor(teacher, folder)
    return VllmAuthor(teacher) if engine == "vllm" else TransformersAuthor(teacher)
