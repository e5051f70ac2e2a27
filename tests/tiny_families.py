"""A tiny random model of every family in `models/blocks.py`, and of some that have no row there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.models.checkpoint import save_model

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
ALTERNATING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 4.0,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
}

# Architecture -> model type, and what its config says besides SIZES.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {"rope_parameters": LLAMA_ROPE}),
    "MistralForCausalLM": ("mistral", {"sliding_window": 8}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", {}),
    "GemmaForCausalLM": ("gemma", {}),
    "Gemma2ForCausalLM": ("gemma2", ALTERNATING),
    "Gemma3ForCausalLM": ("gemma3_text", ALTERNATING),
    "Phi3ForCausalLM": ("phi3", {"rope_parameters": PARTIAL_ROPE, "sliding_window": 8}),
    "SmolLM3ForCausalLM": ("smollm3", {"no_rope_layer_interval": 2}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "GraniteForCausalLM": ("granite", MULTIPLIERS),
    "GPTNeoXForCausalLM": ("gpt_neox", {}),
    "GPT2LMHeadModel": ("gpt2", {"n_inner": 128}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", EXPERTS),
    "OlmoeForCausalLM": ("olmoe", EXPERTS),
}
# Without a row.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Lfm2ForCausalLM": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    "GraniteMoeHybridForCausalLM": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            **MAMBA,
        },
    ),
    "Qwen3_5ForCausalLM": (
        "qwen3_5_text",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    # its blocks give tuples, which five of them could not be without
    "FalconForCausalLM": ("falcon", {"head_dim": None, "num_hidden_layers": 5}),
}


def config_of(architecture: str) -> Any:
    kind, changes = (ROWS | OTHERS)[architecture]
    sizes = {key: value for key, value in (SIZES | changes).items() if value is not None}
    return AutoConfig.for_model(kind, **sizes)


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(architecture)).eval()
    assert type(model).__name__ == architecture
    with torch.no_grad():  # norms that are not all ones and biases that are not all zeros
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make(folder: Path, architecture: str, tokenizer_from: Path) -> Path:
    if not folder.is_dir():
        save_model(model_of(architecture), folder, tokenizer_from)
    return folder


def mixture(kind: str = "qwen3_moe", normed: bool = True, **changes: Any) -> Any:
    """Of six experts, in float64, as its own plain loop over them computes it."""
    sizes = SIZES | EXPERTS | {"num_experts": 6, "norm_topk_prob": normed} | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).double().eval()
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.weight.mul_(4)  # of some experts more than of others
    return model
