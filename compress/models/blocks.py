"""The one file that knows decoders by name: a row a family says where its parts are, what is odd
about it and what can't be done to it. Nobody else names a projection, a norm or an architecture.

A block is h <- h + c attention(norm h), then h <- h + c ffn(norm h), c being 1 in most families.
Attention makes q, k and v, by three projections or a fused one, and adds what its output
projection o makes of them. An FFN is down(act(gate x) * up x), its gate and up perhaps fused, or
without a gate down(act(up x)). What deviates is a field; what would break a technique is a field
that says why, and what would be needed.

Blocks are found in any model that has a list of as many modules as its config counts, with a row
or without one: distilling, scoring and rounding without data need no more. Left out: mixers that
are no attention (convolutions, state spaces), whose models have no row.

Letters: L tokens, H hidden, K outputs of a layer that are meant. No torch at import: a plan reads
rows, not tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn


class Quirk(StrEnum):
    """What else a family may have, in words of a table."""

    tied = "tied head"
    biases = "biases of q, k, v"
    rope_scaling = "rope scaling"
    windows = "sliding windows"
    softcaps = "soft-caps"
    embedding_scale = "scaled embedding"
    no_rope = "blocks without positions"
    parallel = "attention beside the FFN"


class Work(StrEnum):
    """What may be impossible for a row, as a refusal says it: "can't be ..."."""

    width = "narrowed"
    depth = "pruned in depth"
    heads = "pruned of heads"
    fold = "folded"
    experts = "pruned of experts"
    calibrated = "rounded by calibration text"


@dataclass(frozen=True)
class Row:
    """A family of decoders. Paths are those of modules: the first four below the model, the others
    below a block. Reasons `no_...` are empty where a technique works.
    """

    family: str  # as people call it
    architecture: str  # the class of transformers
    quirks: tuple[Quirk, ...] = ()

    # What is outside of blocks.
    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"

    # Attention. One name of three is a fused projection: all q, all k, all v, or head by head.
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    by_head: bool = False
    o: str = "self_attn.o_proj"
    qk_norm: str = ""  # "head": a weight for each channel of a head; "all": over all heads

    # FFN. One name of two is fused, all gates before all ups, unless there is no gate.
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    down: str = "mlp.down_proj"
    router: str = ""  # of a mixture: its FFNs are experts, stacked in two tensors
    experts_keys: tuple[str, ...] = ()  # of the config: how many, under each name it may have
    top_k_key: str = ""  # how many of them see a token
    transposed: bool = False  # matrices are transformers' Conv1D, (C, R)

    # Norms: in front of attention and FFN, "" where there is none, and behind them.
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    norms_behind: tuple[str, ...] = ()

    # Keys of the config: the FFN's width, the c above, and what makes a block depend on its number.
    width_key: str = "intermediate_size"
    residual_key: str = ""
    numbered_keys: tuple[str, ...] = ()

    # Why not, and what would be needed.
    no_width: str = ""
    no_heads: str = ""
    no_fold: str = ""
    no_calibrated: str = ""

    def reason(self, work: Work) -> str:
        """Why it can't be done, "" where it can."""
        if work is Work.experts:
            return "" if self.router else NO_EXPERTS
        return "" if work is Work.depth else str(getattr(self, f"no_{work.name}"))


NORMED = (
    "its blocks normalize what their down projection adds, which is then not linear in its weights;"
    " needed is a fit through the norm"
)
ALL_HEADS = (
    "a norm over all heads makes each depend on the others; needed are norms of single heads"
)
NO_HEAD_DIM = (
    "its config can't say how wide a head is but by how many there are; needed is a key for it"
)
EXPERTS_WIDTH = "its FFNs are experts; needed is a cut by what the router sends to each"
EXPERTS_FOLD = "its FFNs are experts; needed is one down projection that adds to the stream"
NO_EXPERTS = "its FFNs are no experts; needed is a mixture"
TRANSPOSED = "its matrices are stored transposed; needed are grids along their inputs"

BEHIND_BOTH = ("post_attention_layernorm", "post_feedforward_layernorm")

ROWS = (
    Row("Llama 2 to 3.3", "LlamaForCausalLM", (Quirk.rope_scaling,)),
    Row("Mistral", "MistralForCausalLM", (Quirk.windows,)),
    Row("Qwen2, Qwen2.5", "Qwen2ForCausalLM", (Quirk.biases, Quirk.windows)),
    Row("Qwen3", "Qwen3ForCausalLM", (Quirk.windows,), qk_norm="head"),
    Row("Gemma", "GemmaForCausalLM", (Quirk.tied, Quirk.embedding_scale)),
    Row(
        "Gemma 2",
        "Gemma2ForCausalLM",
        (Quirk.tied, Quirk.embedding_scale, Quirk.windows, Quirk.softcaps),
        ffn_norm="pre_feedforward_layernorm",
        norms_behind=BEHIND_BOTH,
        no_fold=NORMED,
    ),
    Row(
        "Gemma 3",
        "Gemma3ForCausalLM",
        (Quirk.tied, Quirk.embedding_scale, Quirk.windows, Quirk.softcaps),
        qk_norm="head",
        ffn_norm="pre_feedforward_layernorm",
        norms_behind=BEHIND_BOTH,
        no_fold=NORMED,
    ),
    Row(
        "Phi-3, Phi-4-mini",
        "Phi3ForCausalLM",
        (Quirk.rope_scaling, Quirk.windows),
        qkv=("self_attn.qkv_proj",),
        gate_up=("mlp.gate_up_proj",),
    ),
    Row("SmolLM3", "SmolLM3ForCausalLM", (Quirk.tied, Quirk.windows, Quirk.no_rope)),
    Row(
        "OLMo2",
        "Olmo2ForCausalLM",
        qk_norm="all",
        attention_norm="",
        ffn_norm="",
        norms_behind=BEHIND_BOTH,
        no_heads=ALL_HEADS,
        no_fold=NORMED,
    ),
    Row(
        "Granite 3",
        "GraniteForCausalLM",
        (Quirk.embedding_scale,),
        residual_key="residual_multiplier",
    ),
    Row(
        "GPT-NeoX, Pythia",
        "GPTNeoXForCausalLM",
        (Quirk.biases, Quirk.parallel),
        embedding="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        qkv=("attention.query_key_value",),
        by_head=True,
        o="attention.dense",
        gate_up=("mlp.dense_h_to_4h",),
        gated=False,
        down="mlp.dense_4h_to_h",
        no_heads=NO_HEAD_DIM,
    ),
    Row(
        "GPT-2",
        "GPT2LMHeadModel",
        (Quirk.tied, Quirk.biases),
        embedding="transformer.wte",
        blocks="transformer.h",
        norm="transformer.ln_f",
        qkv=("attn.c_attn",),
        o="attn.c_proj",
        gate_up=("mlp.c_fc",),
        gated=False,
        down="mlp.c_proj",
        transposed=True,
        attention_norm="ln_1",
        ffn_norm="ln_2",
        width_key="n_inner",
        numbered_keys=("scale_attn_by_inverse_layer_idx",),
        no_heads=NO_HEAD_DIM,
        no_calibrated=TRANSPOSED,
    ),
    Row(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        (Quirk.windows,),
        qk_norm="head",
        gate_up=("mlp.experts.gate_up_proj",),
        down="mlp.experts.down_proj",
        router="mlp.gate",
        experts_keys=("num_local_experts", "num_experts"),
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        numbered_keys=("decoder_sparse_step", "mlp_only_layers"),
        no_width=EXPERTS_WIDTH,
        no_fold=EXPERTS_FOLD,
    ),
    Row(
        "OLMoE",
        "OlmoeForCausalLM",
        qk_norm="all",
        gate_up=("mlp.experts.gate_up_proj",),
        down="mlp.experts.down_proj",
        router="mlp.gate",
        experts_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        no_width=EXPERTS_WIDTH,
        no_heads=ALL_HEADS,
        no_fold=EXPERTS_FOLD,
    ),
)


def named(config: Mapping[str, Any]) -> Row | None:
    """The row of a Hugging Face config, as a dict; None where there is none."""
    architecture = (config.get("architectures") or [""])[0]
    return next((row for row in ROWS if row.architecture == architecture), None)


def lengths_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Inputs that a model's matrices have, by the keys under which its config says them."""
    row = named(config)
    width_key = row.width_key if row is not None else "intermediate_size"
    return {key: config[key] for key in ("hidden_size", width_key) if config.get(key)}


def row_for(config: Mapping[str, Any], work: Work) -> Row:
    """The row of a config that this can be done to. ValueError naming the architecture, what
    would be needed, and those that can.
    """
    row = named(config)
    if row is None:
        got = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
        reason = "needed is a row in compress/models/blocks.py"
    else:
        got = row.architecture
        reason = row.reason(work)
    if row is not None and not reason:
        return row

    allowed = ", ".join(each.architecture for each in ROWS if not each.reason(work))
    raise ValueError(f"architecture {got} can't be {work}: {reason}; allowed are {allowed}")


def row_of(model: Any) -> Row | None:
    """The row of a model, whatever wraps its class; None where there is none."""
    names = [kind.__name__ for kind in type(model).__mro__]
    config = getattr(model, "config", None)
    names += getattr(config, "architectures", None) or []
    return next((row for row in ROWS if row.architecture in names), None)


def row_of_block(row: Row, block: Any) -> Row:
    """The row as it is true of one block: of a mixture some may have a plain FFN, which then is
    where most families have theirs.
    """
    try:
        block.get_submodule(row.router)
    except AttributeError:
        return replace(row, router="", gate_up=Row.gate_up, down=Row.down)
    return row


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a causal language model. ValueError when it has no list of that many
    modules.
    """
    return _blocks(model)[1]


def blocks_prefix(model: Any) -> str:
    """What names of a block's tensors begin with, without its number: `model.layers.`."""
    blocks = blocks_of(model)
    path = next(name for name, module in model.named_modules() if module is blocks)
    return f"{path}."


def _blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """Path below the decoder, and blocks."""
    from torch import nn

    depth = model.config.num_hidden_layers
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} blocks, where features and adapters are"
        " placed; distill without features"
    )


def final_norm(model: Any, ids_1L: Tensor) -> Any:
    """The norm behind the blocks: of a model without a row the module that gives its decoder's
    last hidden states of those ids. ValueError when there is none.
    """
    row = row_of(model)
    if row is not None:
        return model.get_submodule(row.norm)

    given: list[tuple[Any, Any]] = []
    decoder = model.get_decoder()
    with ExitStack() as hooks:
        for module in decoder.children():
            hook = module.register_forward_hook(lambda m, _, out: given.append((m, out)))
            hooks.enter_context(hook)
        last_1LH = decoder(input_ids=ids_1L, use_cache=False).last_hidden_state

    for module, out in reversed(given):
        if getattr(out, "shape", None) == last_1LH.shape and (out == last_1LH).all():
            return module
    raise ValueError(f"{type(model).__name__} has no norm behind its blocks")


class Part(NamedTuple):
    """A linear layer and which of its outputs are meant, (K,)."""

    linear: Any
    rows_K: Tensor


def qkv_of(row: Row, block: Any, width: int) -> tuple[Part, Part, Part]:
    """What makes q, k and v of a block with heads of this width, outputs in the order of heads.
    ValueError naming what is missing.
    """
    import torch

    try:
        linears = [block.get_submodule(name) for name in row.qkv]
        columns = inputs_of(block.get_submodule(row.o))
    except AttributeError as error:
        raise ValueError(f"{type(block).__name__} has no {', '.join(row.qkv)}: {error}") from error

    # Three projections, each of one.
    if len(linears) == 3:
        q, k, v = (Part(each, torch.arange(outputs_of(each))) for each in linears)
        return q, k, v

    # One, head by head or q before k before v.
    (fused,) = linears
    rows = torch.arange(outputs_of(fused))
    if row.by_head:
        q, k, v = (Part(fused, part.flatten()) for part in rows.view(-1, 3, width).unbind(1))
        return q, k, v
    shared = (len(rows) - columns) // 2
    q, k, v = (Part(fused, part) for part in rows.split([columns, shared, shared]))
    return q, k, v


def inputs_of(linear: Any) -> int:
    """Inputs of a linear layer, stored transposed or not."""
    return int(getattr(linear, "in_features", None) or linear.nx)


def outputs_of(linear: Any) -> int:
    """Its outputs."""
    return int(getattr(linear, "out_features", None) or linear.nf)
