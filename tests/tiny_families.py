"""Tiny random models of every family: those with a row in models/blocks.py, those that
formats/families.py can write, and hybrids that have neither.

One table, TINY. A family that a GGUF holds only where its config says less says so there too
(`in_gguf`): a window as wide as the context, full attention in every sixth block.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import VOCABULARY, tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compress.models import blocks
from compress.models.checkpoint import save_model
from compress.quant.codes import FILE, Quantized
from compress.quant.grids import GRIDS

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Where two experts are nearly as good, arithmetic decides: the smaller a mixture, the seldomer.
SHALLOW = {"num_hidden_layers": 2, "intermediate_size": 96}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
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
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


class Tiny(NamedTuple):
    """What a family's config says besides SIZES. None as a value: it is not said."""

    config: dict[str, Any]
    in_gguf: dict[str, Any] = {}  # instead, where a GGUF holds less


def partial(share: float) -> dict[str, Any]:
    """Rotary positions in a share of a head."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    return {"rope_parameters": rope}


# Model type of transformers, and behind a space what differs -> what its config says.
TINY: dict[str, Tiny] = {
    "llama": Tiny({"rope_parameters": LLAMA3}),
    "llama biases": Tiny({"attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny({"sliding_window": 8}, {"sliding_window": 256}),
    "mistral windowless": Tiny({"sliding_window": None}),
    "qwen2": Tiny({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "qwen3": Tiny({"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": Tiny({"head_dim": 32}),
    "gemma2": Tiny(GEMMA | {"layer_types": ALTERNATING}),
    "gemma3_text": Tiny(
        GEMMA | {"layer_types": ALTERNATING},
        {"num_hidden_layers": 6, "layer_types": None},
    ),
    "phi": Tiny(partial(0.5) | {"num_key_value_heads": 4, "intermediate_size": 256}),
    "phi3": Tiny(partial(0.75) | {"sliding_window": 8}, {"sliding_window": None}),
    "smollm3": Tiny(
        {"no_rope_layer_interval": 2},
        {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    ),
    "olmo": Tiny({}),
    "olmo2": Tiny({}),
    "starcoder2": Tiny({"sliding_window": None}),
    "stablelm": Tiny(partial(0.25)),
    "gpt_neox": Tiny(partial(0.25) | {"num_key_value_heads": 4}),
    "gpt2": Tiny({"n_inner": 128}),
    "bloom": Tiny({}),
    "falcon": Tiny(
        {  # its blocks give tuples, which five of them could not be without
            "num_hidden_layers": 5,
            "head_dim": None,
            "ffn_hidden_size": 256,
            "max_position_embeddings": 2048,
        }
    ),
    "cohere": Tiny({"logit_scale": 0.25}),
    "granite": Tiny(MULTIPLIERS),
    "nemotron": Tiny(partial(0.5)),
    "glm4": Tiny(partial(0.5)),
    "exaone4": Tiny({"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "ernie4_5": Tiny({}),
    "lfm2": Tiny({"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 96}),
    "granitemoehybrid": Tiny(
        MAMBA
        | LOCAL_EXPERTS
        | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 64}
    ),
    "qwen3_5_text": Tiny(
        LINEAR | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    ),
    "mixtral": Tiny(LOCAL_EXPERTS, SHALLOW),
    "qwen2_moe": Tiny(EXPERTS | {"shared_expert_intermediate_size": 64}, SHALLOW),
    "qwen3_moe": Tiny(EXPERTS | {"norm_topk_prob": True}, SHALLOW),
    "olmoe": Tiny(EXPERTS, SHALLOW | {"num_key_value_heads": 4}),
    "granitemoe": Tiny(LOCAL_EXPERTS, SHALLOW),
}
# Those that no GGUF holds.
NO_GGUF = ("gpt2", "granitemoehybrid", "qwen3_5_text")
IN_GGUF = [name for name in TINY if name not in NO_GGUF]
# Class of transformers -> the first name of its model type.
NAMES = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]: name for name in TINY if " " not in name}
CLASSES = {name: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name.partition(" ")[0]] for name in TINY}
# Those without a row in models/blocks.py.
OTHERS = [name for name in NAMES if blocks.named({"architectures": [name]}) is None]

ROUTERS = re.compile(r"(gate|router)\.weight$")


def config_of(name: str, in_gguf: bool = False) -> Any:
    """The config of a row of TINY, named by itself or by its class."""
    name = NAMES.get(name, name)
    tiny = TINY[name]
    sizes = SIZES | tiny.config | (tiny.in_gguf if in_gguf else {})
    given = {key: value for key, value in sizes.items() if value is not None}
    given |= {"sliding_window": None} if sizes.get("sliding_window", 0) is None else {}
    return AutoConfig.for_model(name.partition(" ")[0], **given)


def model_of(name: str, in_gguf: bool = False) -> Any:
    """Its model, of numbers that F16 holds."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, in_gguf)).eval()
    assert type(model).__name__ == CLASSES[NAMES.get(name, name)]

    # Norms that are not all ones and biases that are not all zeros: one that is dropped shows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.half().float())
    return model


def make(folder: Path, name: str, tokenizer_from: Path) -> Path:
    """Its checkpoint with another's tokenizer, made once."""
    if not folder.is_dir():
        save_model(model_of(name), folder, tokenizer_from)
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


def build(name: str, out: Path) -> Path:
    """Its checkpoint as a GGUF can hold it, with a tokenizer of its family's kind."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_of(name, out)
    save_model(model_of(name, in_gguf=True), out, out, dtype=torch.float32)
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
