"""Which families llama.cpp's converter writes for us, and what of a config no file of them holds.

A file that converts and loads proves nothing: llama.cpp takes much for granted of a family, and a
model that differs computes something else in silence. So a family is in FAMILIES once
tests/formats/test_converted.py has proven it, and what its files can't say is refused before work:

    fixed   config values that llama.cpp takes for granted
    ropes   rotary scalings that its files hold
    rules   what else must hold, by name in RULES

transformers 5 stacks experts under names of its own; `published` has those that the converter
knows.

Left out, by what would be needed: families unknown to the converter (HyperCLOVA X, NanoChat,
RecurrentGemma), and those whose codes have no rows in the file, since a matrix is transposed or
scaled on its way (GPT-2, Falcon H1's head, GPT-OSS's experts).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from compress.formats import check_config


def _head_dim(config: Any) -> int:
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def _windowless(config: Any) -> bool:
    """Whether every block sees all of the context."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = window is not None and "sliding_attention" in types
    return not slides or window >= config.max_position_embeddings


def _every(n: int) -> Callable[[Any], bool]:
    """Whether every n-th block, and no other, has full attention."""

    def holds(config: Any) -> bool:
        full = [(i + 1) % n == 0 for i in range(config.num_hidden_layers)]
        return [kind == "full_attention" for kind in config.layer_types] == full

    return holds


def _fourth_unrotated(config: Any) -> bool:
    rotated = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    return list(config.no_rope_layers) == rotated


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "windowless": (
        _windowless,
        "llama.cpp drops its sliding window: set max_position_embeddings to at most sliding_window",
    ),
    "scale": (
        lambda c: c.query_pre_attn_scalar == _head_dim(c),
        "query_pre_attn_scalar is in no GGUF: llama.cpp runs it where it equals head_dim",
    ),
    "second_full": (
        _every(2),
        "layer_types are in no GGUF: llama.cpp takes every second block for full attention; keep"
        " all blocks",
    ),
    "sixth_full": (
        _every(6),
        "layer_types are in no GGUF: llama.cpp takes every sixth block for full attention; keep all"
        " blocks",
    ),
    "fourth_unrotated": (
        _fourth_unrotated,
        "no_rope_layers are in no GGUF: llama.cpp takes every fourth block for one without rotary"
        " positions; keep all blocks",
    ),
    "mha": (
        lambda c: c.num_key_value_heads == c.num_attention_heads,
        "llama.cpp runs it where num_key_value_heads equals num_attention_heads",
    ),
    "ffn_4": (
        lambda c: (getattr(c, "ffn_hidden_size", 0) or c.intermediate_size) == 4 * c.hidden_size,
        "llama.cpp runs it where the FFN is four times as wide as the model",
    ),
    "width": (
        lambda c: c.num_attention_heads * _head_dim(c) == c.hidden_size,
        "head_dim is in no GGUF of it: llama.cpp runs it where num_attention_heads * head_dim is"
        " hidden_size; keep all heads",
    ),
}


class Family(NamedTuple):
    """What a file of a family needs of its config."""

    fixed: dict[str, tuple[Any, ...]]
    rules: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ("default",)
    # End of a name -> the published names that the converter looks for. {}: of each expert, whose
    # rows are shared by several names.
    published: dict[str, tuple[str, ...]] = {}


_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_GELU: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu_pytorch_tanh",)}
_GEMMA: dict[str, tuple[Any, ...]] = {"hidden_activation": ("gelu_pytorch_tanh",)}
_EXPERTS: dict[str, tuple[str, ...]] = {
    "mlp.experts.gate_up_proj": (
        "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.{}.up_proj.weight",
    ),
    "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
}
_MIXTRAL: dict[str, tuple[str, ...]] = {
    "mlp.experts.gate_up_proj": (
        "block_sparse_moe.experts.{}.w1.weight",
        "block_sparse_moe.experts.{}.w3.weight",
    ),
    "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
    "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
}
_GRANITE: dict[str, tuple[str, ...]] = {
    "block_sparse_moe.experts.gate_up_proj": ("block_sparse_moe.input_linear.weight",),
    "block_sparse_moe.experts.down_proj": ("block_sparse_moe.output_linear.weight",),
    "block_sparse_moe.router.weight": ("block_sparse_moe.router.layer.weight",),
}
_SPARSE = _SILU | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
# HF model_type -> what its files need.
FAMILIES: dict[str, Family] = {
    "llama": Family(_SILU, ropes=("default", "llama3")),
    "mistral": Family(_SILU, ("windowless",)),
    "qwen2": Family(_SILU, ("windowless", "width")),
    "qwen3": Family(_SILU | {"attention_bias": (False,)}, ("windowless",)),
    "gemma": Family(_GELU),
    "gemma2": Family(_GEMMA, ("scale", "second_full")),
    "gemma3_text": Family(_GEMMA, ("scale", "sixth_full")),
    "phi": Family(
        {"hidden_act": ("gelu_new",), "qk_layernorm": (False,)}, ("mha", "ffn_4", "width")
    ),
    "phi3": Family(_SILU, ("windowless", "width")),
    "smollm3": Family(_SILU, ("windowless", "fourth_unrotated")),
    "olmo": Family(_SILU | {"attention_bias": (False,)}, ("width",)),
    "olmo2": Family(_SILU | {"attention_bias": (False,)}, ("width",)),
    "starcoder2": Family(_GELU, ("windowless", "width")),
    "stablelm": Family(_SILU, ("width",)),
    "gpt_neox": Family({"hidden_act": ("gelu",)}, ("width",)),
    "bloom": Family({"apply_residual_connection_post_layernorm": (False,)}),
    "falcon": Family(
        {
            "activation": ("gelu",),
            "multi_query": (True,),
            "parallel_attn": (True,),
            "new_decoder_architecture": (False,),
            "alibi": (False,),
            "max_position_embeddings": (2048,),
        },
        ("ffn_4",),
    ),
    "cohere": Family(_SILU, ("width",)),
    "granite": Family(_SILU, ("width",)),
    "nemotron": Family({"hidden_act": ("relu2",)}),
    "glm4": Family(_SILU),
    "exaone4": Family(_SILU, ("windowless",)),
    "ernie4_5": Family(_SILU),
    "lfm2": Family({}),
    "mixtral": Family(_SILU, ("windowless",), published=_MIXTRAL),
    "qwen2_moe": Family(
        _SPARSE | {"norm_topk_prob": (False,)}, ("windowless",), published=_EXPERTS
    ),
    "qwen3_moe": Family(_SPARSE | {"norm_topk_prob": (True,)}, ("windowless",), published=_EXPERTS),
    "olmoe": Family(_SILU | {"norm_topk_prob": (False,)}, ("mha", "width"), published=_EXPERTS),
    "granitemoe": Family(_SILU, ("width",), published=_GRANITE),
}
INSTEAD = "export compressed_tensors"


def check_family(config: Any) -> None:
    """ValueError when a GGUF of a config's family can't say what it says, naming what is allowed
    and what to do instead.
    """
    check_config(config, "GGUF", INSTEAD, model_type=tuple(FAMILIES))
    family = FAMILIES[config.model_type]
    check_config(config, f"a GGUF of {config.model_type}", INSTEAD, **family.fixed)

    # Of several rotary embeddings in a model, each.
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in [rope, *rope.values()]:
        kind = entry.get("rope_type", "default") if isinstance(entry, dict) else "default"
        if kind not in family.ropes:
            raise ValueError(
                f"rope_type {kind!r} can't be written as a GGUF of {config.model_type}; allowed:"
                f" {', '.join(family.ropes)}; {INSTEAD}"
            )

    for name in family.rules:
        holds, reason = RULES[name]
        if not holds(config):
            raise ValueError(f"a GGUF of this {config.model_type} is refused: {reason}; {INSTEAD}")


def hparams(config: Any) -> dict[str, Any]:
    """The config as the converter reads it, with the older names that it looks for."""
    about: dict[str, Any] = config.to_dict()
    if config.model_type == "gpt_neox":
        about["rotary_pct"] = about["rope_parameters"].get("partial_rotary_factor", 1.0)
    if config.model_type == "falcon":
        about["num_kv_heads"] = 1
    return about


def published_names(model_type: str, name: str, experts: int) -> list[str]:
    """The names that the converter knows a tensor of a checkpoint by: itself, another, or those of
    equal parts of it, of each expert in turn.
    """
    for end, names in FAMILIES[model_type].published.items():
        if name.endswith(end):
            stem = name.removesuffix(end)
            return [
                stem + part.format(e)
                for e in range(experts if "{}" in names[0] else 1)
                for part in names
            ]
    return [name]
