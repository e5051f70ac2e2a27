"""Tiny random models of the families of compress/formats/families.py, each with a tokenizer of
512 tokens, and quantized copies of them.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compress.models.checkpoint import save_model
from compress.quant.codes import FILE, Quantized
from compress.quant.grids import GRIDS
from compress.text.sources import documents

VOCABULARY = 512
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> class of transformers without its suffix, what differs from SHAPE.
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 256}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    ),
    "gemma3_text": (
        "Gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "num_hidden_layers": 6,
        },
    ),
    "phi": (
        "Phi",
        {"num_key_value_heads": 4, "intermediate_size": 256, "partial_rotary_factor": 0.5},
    ),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.75}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.25}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4, "rotary_pct": 0.25}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {"ffn_hidden_size": 256, "max_position_embeddings": 2048}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "nemotron": ("Nemotron", {"partial_rotary_factor": 0.5}),
    "glm4": ("Glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "exaone4": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        MIXTURE | {"num_experts": 4, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": ("Qwen3Moe", MIXTURE | {"num_experts": 4, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
# Those that are published with a tokenizer of BPE with byte fallback.
FALLBACK = ("gemma", "gemma2", "gemma3_text", "phi3", "nemotron", "mistral")
ROUTERS = re.compile(r"(gate|router)\.weight$")
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def tokenizer_of(name: str, out: Path) -> None:
    """A byte-level tokenizer, or one with byte fallback for FALLBACK."""
    backend = fallback() if name in FALLBACK else byte_level()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(out)


@cache
def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(backend, VOCABULARY, SPECIAL, sorted(alphabet))
    return backend


@cache
def fallback() -> Tokenizer:
    """Like Gemma's: all ways to split a token are merges, in the order of the tokens."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(backend, VOCABULARY, SPECIAL + spelled, [])
    state = json.loads(backend.to_str())
    model = state["model"]
    state["added_tokens"] = [e for e in state["added_tokens"] if e["content"] in SPECIAL]

    # Trained merges know one way to make a token.
    vocab, made = model["vocab"], ["".join(pair) for pair in model["merges"]]
    model["merges"] = [
        [token[:i], token[i:]]
        for token in dict.fromkeys(made)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    return Tokenizer.from_str(json.dumps(state))


def _train(backend: Tokenizer, size: int, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    texts = [str(text) for text in documents("embedded:topics")[:20]]
    backend.train_from_iterator(texts, trainer)


def build(name: str, out: Path) -> Path:
    """The checkpoint of a row of BUILT."""
    kind, changes = BUILT[name]
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_of(name, out)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(**SHAPE | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)

    # Norms and biases that are not what they begin with: one that is dropped shows. And numbers
    # that F16 holds.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(parameter.half().float())
    save_model(model, out, out, dtype=torch.float32)
    return out


def quantize(parent: Path, out: Path, grid: str) -> Path:
    """A copy with codes of every matrix of the checkpoint's file but routers and convolutions, on
    scales that no encoder would choose: rounding again would show.
    """
    shutil.copytree(parent, out)
    weights = load_file(parent / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    grids = {}
    for name, w in weights.items():
        rows = w.reshape(-1, w.shape[-1])
        if w.dim() < 2 or w.shape[-1] % 32 or ROUTERS.search(name):
            continue
        codes, scales = GRIDS[grid].encode(rows, name)
        q = Quantized(grid, codes, (scales.float() * 1.03).half())
        weights[name] = q.decode().reshape(w.shape)
        packed |= {f"{name}.codes": q.codes, f"{name}.scales": q.scales}
        grids[name] = grid
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, out / FILE, metadata={"grids": json.dumps(grids)})
    return out
