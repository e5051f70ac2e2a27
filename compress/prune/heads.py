"""Attention heads cut as text reaches them: key-value heads with all their query heads, and query
heads inside a group. Which ones, and what the output projection makes of the others, says
`compress.prune.compensation`.

A key-value head of width D takes with it its rows of k and v, the rows of q of its query heads, and
their columns of the output projection; biases follow their rows. Every layer keeps as many, and
every group as many query heads, so that stock loaders open the result. Norms of q and k have one
weight for each of the D channels, whichever head they are of, and stay. Left out: merging heads
into one (GQA out of MHA, arXiv 2305.13245), which needs training.

Letters: K kept heads or rows, D width of a head, H hidden, C columns of the output projection.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.models.blocks import Row, inputs_of, qkv_of
from compress.models.walk import Walk
from compress.prune.compensation import Cut, Inputs, cut_columns, keep_heads
from compress.prune.linears import matrix_of, narrow, refit


class Heads(NamedTuple):
    """Key-value heads, and query heads that share one of them."""

    kv_heads: int
    share: int


def cut_heads(
    walk: Walk, row: Row, present: Heads, keep: Heads, damping: float | None
) -> list[Cut]:
    """Cut every attention in place as the text stands in front of its block, and fit its output
    projection to what the blocks already cut send it.
    """
    cuts = []
    walk.task = "cut"
    for index, block in enumerate(walk.blocks):
        inputs = Inputs()
        walk.inputs(index, {row.o: inputs.add})
        cuts.append(cut_attention(row, block, inputs, present, keep, damping))
        walk.advance(index)
    return cuts


@torch.no_grad()
def cut_attention(
    row: Row, block: Any, inputs: Inputs, present: Heads, keep: Heads, damping: float | None
) -> Cut:
    """Cut one attention in place by the second moments of its output projection's inputs."""
    projection = block.get_submodule(row.o)
    width = inputs_of(projection) // (present.kv_heads * present.share)
    parts = qkv_of(row, block, width)
    weight_HC = matrix_of(projection)

    def choose(gram_CC: Tensor, chosen: float) -> Tensor:
        heads_K = keep_heads(weight_HC, gram_CC, present, keep, chosen)
        return rows_of(heads_K, width)

    # Which heads stay, and the projection fitted to them.
    cut = cut_columns(weight_HC, inputs, choose, damping)
    refit(projection, cut.weight_HK)

    # Their queries, and keys and values of the groups that have any left.
    kv_heads_K = torch.unique(cut.keep_K // (width * present.share))
    kv_rows_K = rows_of(kv_heads_K, width)
    kept_rows: dict[Any, list[Tensor]] = {}
    for part, kept_K in zip(parts, (cut.keep_K, kv_rows_K, kv_rows_K), strict=True):
        kept_rows.setdefault(part.linear, []).append(part.rows_K[kept_K.cpu()])
    for linear, rows in kept_rows.items():
        narrow(linear, torch.cat(rows).to(linear.weight.device))

    _tell(block.get_submodule(row.o.rpartition(".")[0]), keep)
    return cut


def _tell(attention: Any, keep: Heads) -> None:
    """Say how many heads there are, in what an attention computes with; the config that it shares
    with blocks that are not cut yet stays as it is.
    """
    attention.num_key_value_groups = keep.share
    if hasattr(attention, "num_key_value_heads"):
        attention.num_key_value_heads = keep.kv_heads
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads = keep.kv_heads * keep.share
    attention.config.num_key_value_heads = keep.kv_heads


def rows_of(heads_K: Tensor, width: int) -> Tensor:
    """Rows (K * D,) of a projection that makes heads of this width."""
    channels_D = torch.arange(width, device=heads_K.device)
    return (heads_K[:, None] * width + channels_D).flatten()
