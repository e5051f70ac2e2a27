"""What `gpu_check.py` works on: shapes of real models with random weights, a tokenizer with as many
ids, random text, and what a stage may ask for. Nothing is downloaded.

Speed and memory of dense kernels don't depend on the numbers: matrices are normal of deviation
0.02, norms ones, biases zeros. Ids of the text are log-uniform: id i comes about as often as 1 / i,
as words do. With `dry` a shape keeps its name and has TINY's sizes: the same code, on any CPU.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Sizes of Qwen2.5 (arXiv 2412.15115, table 1; vocabularies as its checkpoints store them), and a
# small one whose training state is saved in half a second; and a Qwen3-MoE of sizes between.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "0.5B of experts": {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32768,
        "tie_word_embeddings": True,
    },
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
TINY_EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEVIATION = 0.02


def config_of(name: str, dry: bool, **changes: Any) -> Any:
    """A config of one of SHAPES: Qwen2's, or with experts Qwen3-MoE's."""
    from transformers import Qwen2Config, Qwen3MoeConfig

    with_experts = "num_experts" in SHAPES[name]
    tiny = TINY | (TINY_EXPERTS if with_experts else {})
    sizes = SHAPES[name] | (tiny if dry else {}) | changes
    return (Qwen3MoeConfig if with_experts else Qwen2Config)(
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["Qwen3MoeForCausalLM" if with_experts else "Qwen2ForCausalLM"],
        **sizes,
    )


def random_model(config: Any, seed: int, dtype: torch.dtype, home: str = "cpu") -> Any:
    """A model in eval mode whose numbers are drawn on the best device, one matrix at a time."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from compress.models.checkpoint import best_device

    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator(best_device()).manual_seed(seed)
    place = generator.device

    # A tied head shares its matrix again afterwards.
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            drawn = torch.empty(parameter.shape, dtype=dtype, device=place)
            if parameter.dim() > 1:
                drawn.normal_(0.0, DEVIATION, generator=generator)
            else:
                drawn.fill_(float(name == "weight"))
            module._parameters[name] = nn.Parameter(drawn.to(home))
    model.tie_weights()
    return model.eval()


def write_tokenizer(folder: Path, ids: int) -> None:
    """A byte-level BPE of so many ids: all bytes, then pairs, then triples of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs: Iterator[tuple[str, str]] = product(alphabet, alphabet)
    triples = ((a + b, c) for a, b, c in product(alphabet, repeat=3))
    room = ids - len(SPECIAL) - len(alphabet)
    merges = list(islice(chain(pairs, triples), room))
    tokens = [*SPECIAL, *alphabet, *(left + right for left, right in merges)]

    # As transformers saves one.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], bos_token=SPECIAL[0], pad_token=SPECIAL[0]
    )
    fast.save_pretrained(folder)


def random_text(vocabulary: int, rows: int, length: int, seed: int = 0) -> Any:
    """`Packed` rows (rows, length + 1), every token of which is a label."""
    from compress.train.packed import Packed

    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(rows, length + 1, generator=generator, dtype=torch.float64)
    ids_SL = (share * math.log(vocabulary)).exp().long().clamp(max=vocabulary - 1)
    mask_SL = torch.ones_like(ids_SL, dtype=torch.bool)
    return Packed(ids_SL.int(), mask_SL, f"random:{vocabulary}:{rows}x{length}:{seed}")


@dataclass(frozen=True)
class Place:
    """Where checks work: a folder that they share, and whether they run dry."""

    folder: Path
    dry: bool

    @cached_property
    def device(self) -> torch.device:
        """What is checked."""
        from compress.models.checkpoint import best_device

        return best_device()

    def size(self, real: int, dry: int) -> int:
        """One of the two."""
        return dry if self.dry else real

    def tokenizer(self, out: Path, ids: int) -> None:
        """Its files in a folder, written once for all of them."""
        written = self.folder / f"tokenizer-{ids}"
        if not written.is_dir():
            write_tokenizer(written, ids)
        shutil.copytree(written, out, dirs_exist_ok=True)

    def checkpoint(self, name: str, seed: int = 0) -> Path:
        """The directory of a random checkpoint in bf16, made by whoever asks first."""
        from compress.models.checkpoint import save_model

        out = self.folder / f"{name}-{seed}"
        if not out.is_dir():
            beside = self.folder / f".{out.name}.part"
            config = config_of(name, self.dry)
            self.tokenizer(beside, config.vocab_size)
            model = random_model(config, seed, torch.bfloat16)
            save_model(model, beside, tokenizer_from=beside)
            beside.rename(out)
        return out

    def hollow(self, name: str, **changes: Any) -> Path:
        """The directory of a checkpoint without weights: config and tokenizer alone."""
        sizes = "-".join(f"{key}{value}" for key, value in changes.items())
        out = self.folder / f"{name}-hollow-{sizes}"
        config = config_of(name, self.dry, **changes)
        self.tokenizer(out, config.vocab_size)
        (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        return out

    def context(self, teacher: Path, text: Any, work: str, **changes: Any) -> Any:
        """What a stage may ask for, on random text."""
        from compress.stages.context import Context

        own = self.folder / work
        (own / "work").mkdir(parents=True, exist_ok=True)
        given: dict[str, Any] = {"precision": "fp32" if self.dry else "bf16"} | changes
        return Context(
            teacher=teacher,
            seed=0,
            seq_len=text.ids.shape[1] - 1,
            work=own / "work",
            signals=own / "signals",
            calibration=lambda n: text.ids[:n, :-1].long(),
            text=lambda: text,
            chat=lambda: text,
            file_overhead=lambda checkpoint: 1000,
            label=work,
            log=lambda message: print(message, flush=True),
            curve=lambda rows: None,
            **given,
        )
