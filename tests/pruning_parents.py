"""Tiny random parents for the pruning tests, one per kind of supported model, and what every
result is held to.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import torch
from small_tokenizer import write_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from compress.models.checkpoint import save_model

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
KINDS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_bias": lambda: LlamaConfig(**SIZES, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma": lambda: GemmaConfig(**SIZES),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **ALTERNATING),
}
CONTEXT = SimpleNamespace(
    calibration=lambda n: torch.randint(256, (n, 32), generator=torch.Generator().manual_seed(0)),
    seed=0,
    precision="fp32",
    label="test",
    log=lambda line: None,
)


def make(folder: Path, kind: str = "llama") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind]()).eval()
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    write_tokenizer(tokenizer)
    save_model(model, folder / "parent", tokenizer)
    return folder / "parent"


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def run(stage, parent: Path, out: Path) -> dict[str, float]:
    """Run the stage and hold it to: parent untouched, tokenizer carried, cached and uncached
    decoding agree.
    """
    before = files(parent)
    out.mkdir()
    metrics = stage.run(parent, out, CONTEXT)
    assert files(parent) == before and files(out)["tokenizer.json"] == before["tokenizer.json"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(24)[None]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :20], use_cache=True)
        rest = model(ids[:, 20:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 20:], rtol=1e-4, atol=1e-4)
    return metrics
