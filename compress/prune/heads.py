"""Attention heads cut as text reaches them: key-value heads with all their query heads, and query
heads inside a group. Which ones, and what the output projection makes of the others, says
`compress.prune.compensation`.

A key-value head of width D takes with it its rows of k and v, the rows of q of its query heads, and
their columns of the output projection; biases follow their rows. Every layer keeps as many, and
every group as many query heads, so that stock loaders open the result. Norms of q and k have one
weight for each of the D channels, whichever head they are of, and stay. Left out: merging heads
into one (GQA out of MHA, arXiv 2305.13245), which needs training.

Letters: K kept heads, D width of a head, C columns of the output projection, R rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.models.walk import Walk
from compress.prune.compensation import Cut, Inputs, cut_columns, keep_heads


class Heads(NamedTuple):
    """Key-value heads, and query heads that share one of them."""

    kv_heads: int
    share: int


def cut_heads(walk: Walk, present: Heads, keep: Heads, damping: float | None) -> list[Cut]:
    """Cut every attention in place as the text stands in front of its block, and fit its output
    projection to what the blocks already cut send it.
    """
    cuts = []
    walk.task = "cut"
    for index, block in enumerate(walk.blocks):
        inputs = Inputs()
        walk.inputs(index, {"self_attn.o_proj": inputs.add})
        cuts.append(cut_attention(block.self_attn, inputs, present, keep, damping))
        walk.advance(index)
    return cuts


@torch.no_grad()
def cut_attention(
    attention: Any, inputs: Inputs, present: Heads, keep: Heads, damping: float | None
) -> Cut:
    """Cut one attention in place by the second moments of its output projection's inputs."""
    projection = attention.o_proj
    width = projection.in_features // (present.kv_heads * present.share)

    def choose(gram_CC: Tensor, chosen: float) -> Tensor:
        heads_K = keep_heads(projection.weight, gram_CC, present, keep, chosen)
        return rows_of(heads_K, width)

    # Which heads stay, and the projection fitted to them.
    cut = cut_columns(projection.weight, inputs, choose, damping)
    projection.weight = nn.Parameter(cut.weight_HK, requires_grad=False)
    projection.in_features = len(cut.keep_K)

    # Their queries, and keys and values of the groups that have any left.
    narrow(attention.q_proj, cut.keep_K)
    kv_heads_K = torch.unique(cut.keep_K // (width * present.share))
    for maker in (attention.k_proj, attention.v_proj):
        narrow(maker, rows_of(kv_heads_K, width))
    attention.num_key_value_groups = keep.share
    return cut


def rows_of(heads_K: Tensor, width: int) -> Tensor:
    """Rows (K * D,) of a projection that makes heads of this width."""
    channels_D = torch.arange(width, device=heads_K.device)
    return (heads_K[:, None] * width + channels_D).flatten()


def narrow(linear: nn.Linear, rows_R: Tensor) -> None:
    """Keep these outputs of a linear layer alone, in place."""
    linear.weight = nn.Parameter(linear.weight[rows_R].contiguous(), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows_R].contiguous(), requires_grad=False)
    linear.out_features = len(rows_R)
