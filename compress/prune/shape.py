"""What may be cut, and what a Hugging Face config says afterwards. No torch at import: a plan
needs only numbers.

Which families can be cut, `models/blocks.py` says. Everything stays uniform across layers, so that
stock transformers, llama.cpp and vLLM load the result.
"""

from pathlib import Path
from typing import Any

from compress.models.blocks import Row, Work, row_for

# What a config says of attention heads.
HEAD_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim")
# How many blocks there are, as a config and as GPT-2's says it.
DEPTH_KEYS = ("num_hidden_layers", "n_layer")
AUTO = "auto"  # the damping by held-out rows
HELD_OUT = 8  # of which every so many-th row is one


def check_foldable(config: dict[str, Any]) -> None:
    """ValueError for a family whose down projection can't stand for dropped blocks."""
    try:
        row_for(config, Work.fold)
    except ValueError as error:
        raise ValueError(f"{error}; set fold=false") from error


def check_numbered(config: dict[str, Any], row: Row) -> None:
    """ValueError where what a block computes depends on its number, which changes as blocks go."""
    for key in row.numbered_keys:
        value = config.get(key)
        if value is True or value not in (None, False, 1, []):
            raise ValueError(
                f"{key} is {value}: blocks of {row.architecture} then depend on their"
                f" numbers and can't be {Work.depth}; needed is a checkpoint without it"
            )


def width_of(config: dict[str, Any], row: Row) -> int:
    """FFN channels of a config; where it says none they are four times the hidden size, as GPT-2
    has it.
    """
    return int(config.get(row.width_key) or 4 * config["hidden_size"])


def snap(width: int, multiple: int) -> int:
    """The multiple nearest to `width`, halves up, at least one multiple: 900 with multiple 64
    gives 896.
    """
    return max(1, (2 * width + multiple) // (2 * multiple)) * multiple


def sizes_that_cut(multiple: int, most: int, least: int = 1) -> str:
    """Multiples from `least` to `most`, as a refusal of another one says them."""
    first, last = -(-least // multiple) * multiple, most // multiple * multiple
    if first > last:
        return f"no multiple of {multiple} does; give a smaller multiple"
    return f"allowed are {first:,} to {last:,} in steps of {multiple}, or a smaller multiple"


def with_heads(config: dict[str, Any], kv_heads: int, share: int) -> dict[str, Any]:
    """The config with so many key-value heads and query heads for each. Their width is said, which
    families take from the number of heads otherwise. ValueError where transformers can't open it.
    """
    from compress.models.checkpoint import config_object, head_dim

    heads = (kv_heads * share, kv_heads, head_dim(config_object(config)))
    changed = {**config, **dict(zip(HEAD_KEYS, heads, strict=True))}
    try:
        config_object(changed)
    except ValueError as error:
        raise ValueError(
            f"{kv_heads} key-value heads with {share} query heads each can't be opened by"
            f" transformers ({error}); keep another number"
        ) from error
    return changed


def experts_of(config: dict[str, Any], row: Row) -> tuple[int, int]:
    """Experts of a block, and how many of them see a token. ValueError where a config doesn't say
    so.
    """
    counts = [config[key] for key in row.experts_keys if config.get(key)]
    top_k = config.get(row.top_k_key)
    if not counts or not top_k:
        raise ValueError(
            f"config.json doesn't say {' or '.join(row.experts_keys)}, and {row.top_k_key}; write"
            " them there"
        )
    return int(counts[0]), int(top_k)


def with_experts(config: dict[str, Any], row: Row, experts: int, top_k: int) -> dict[str, Any]:
    """The config with so many experts of which so many see a token, under the names it has."""
    counts = {key: experts for key in row.experts_keys if key in config}
    return {**config, **counts, row.top_k_key: top_k}


def damping_of(stage: str, damping: float | str) -> float | None:
    """A stage's damping, None where held-out rows choose it. ValueError."""
    if damping == AUTO:
        return None
    if isinstance(damping, str) or not 0 < damping < 1:
        raise ValueError(
            f"{stage}.damping is {damping}: allowed is {AUTO}, or between 0 and 1, for example 0.01"
        )
    return float(damping)


def check_text(key: str, ids_shape: tuple[int, ...], columns: int, damping: float | None) -> None:
    """ValueError, with what is needed, when calibration text of so many rows and tokens a row can't
    weigh so many columns: its second moments would tell fewer apart than there are.

    `key` is the option that says how many rows; held-out rows are needed without a damping.
    """
    rows, seq_len = ids_shape
    needed = -(-columns // seq_len)
    if damping is None:
        needed = max(needed, HELD_OUT)
    if rows < needed:
        raise ValueError(
            f"{key}: {rows} sequences of {seq_len} tokens can't weigh {columns:,} columns: needed"
            f" are {needed} sequences at least, better {20 * needed}; raise it, and add text to the"
            " data where it has fewer"
        )


def without_blocks(config: dict[str, Any], dropped: set[int]) -> dict[str, Any]:
    """The config without those blocks: their count, and every list with an entry per block
    (`layer_types`, ...).
    """
    blocks = config["num_hidden_layers"]
    per_block = {
        key: [value[i] for i in range(blocks) if i not in dropped]
        for key, value in config.items()
        if "layer" in key and isinstance(value, list) and len(value) == blocks
    }
    counts = {key: blocks - len(dropped) for key in DEPTH_KEYS if key in config}
    return {**config, **per_block, **counts}


def save_checked(model: Any, out: Path, parent: Path) -> None:
    """Save in bf16 and prove that stock transformers reads back exactly the model in memory,
    renumbering and all. The model is over with then: its weights are let go of, so that two models
    never lie in memory.
    """
    import torch

    from compress.models import checkpoint

    checkpoint.save_model(model, out, tokenizer_from=parent)
    ids_BL = torch.arange(8).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        here = model(ids_BL).logits
        for parameter in model.parameters():
            checkpoint.let_go(parameter)
        reloaded = checkpoint.load_model(out, torch.bfloat16)(ids_BL).logits
    assert torch.equal(here, reloaded), f"{out} does not reload to the model that was saved"
