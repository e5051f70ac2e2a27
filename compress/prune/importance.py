"""What a network would miss least: blocks by their influence, and FFNs cut as text reaches them.

Blocks (ShortGPT, arXiv 2403.03853, section 3). A block that hardly turns its input does little:
    BI = 1 - E_tokens[cos(h_in, h_out)].
The least influential block goes, every later block is scored again on what it now receives, and so
on.

FFN channels go by second-order cost, `compress.prune.compensation`.

Letters: B sequences, L tokens of one, N tokens, H hidden, F channels.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from compress.models.blocks import Row
from compress.models.walk import Walk
from compress.prune.compensation import Cut, Inputs, cut_columns, keep_channels
from compress.prune.compensation import damp as damp  # where compress.quant.gptq looks for it
from compress.prune.linears import matrix_of, narrow, refit


def block_influence(h_in_NH: Tensor, h_out_NH: Tensor) -> float:
    """1 - mean cosine between what enters and what leaves a block: 0 does nothing, 2 turns every
    token round.
    """
    return influence_of([h_in_NH], [h_out_NH])


def influence_of(entering: list[Tensor], leaving: list[Tensor]) -> float:
    """Block influence over groups (..., H) of what enters and what leaves."""
    cosines = [
        torch.nn.functional.cosine_similarity(h_in.float(), h_out.float(), dim=-1).flatten()
        for h_in, h_out in zip(entering, leaving, strict=True)
    ]
    return 1.0 - torch.cat(cosines).double().mean().item()


def drop_blocks(walk: Walk, count: int, keep_first: int, keep_last: int) -> list[tuple[int, float]]:
    """The `count` blocks to drop as (index in the model, influence when it went), in the order
    they go; none of the first `keep_first` or the last `keep_last`.

    Only what follows a dropped block is computed again. In memory are the states in front of
    blocks that are less influential than all before them, of which each can be the next to go once
    those behind it are gone: `count` at most.
    """
    kept = list(range(len(walk.blocks) - keep_last))
    lower: deque[tuple[float, int, list[Tensor]]] = deque(maxlen=count)
    dropped: list[tuple[int, float]] = []
    at = 0
    while len(dropped) < count:
        # As many blocks at most are to come.
        walk.pace.steps = walk.pace.done + (count - len(dropped)) * len(kept[at:])
        walk.task = f"weighed, {len(dropped)} of {count} gone"

        # The influence of those that now receive something else.
        for index in kept[at:]:
            entering = list(walk.states)
            walk.advance(index)
            if index < keep_first:
                continue
            influence = influence_of(entering, walk.states)
            if not lower or influence < lower[-1][0]:
                lower.append((influence, index, entering))

        # The least influential goes; the text stands again in front of where it was.
        influence, index, walk.states = lower.pop()
        dropped.append((index, influence))
        at = kept.index(index)
        del kept[at]
    return dropped


def cut_ffns(walk: Walk, row: Row, keep: int, damping: float | None) -> list[Cut]:
    """Cut every FFN to `keep` channels in place as the text stands in front of its block, and fit
    it. Every block receives what the blocks already cut send it.
    """
    cuts = []
    walk.task = "cut"
    for index, block in enumerate(walk.blocks):
        inputs = Inputs()
        walk.inputs(index, {row.down: inputs.add})
        cuts.append(cut_ffn(row, block, inputs, keep, damping))
        walk.advance(index)
    return cuts


def cut_ffn(row: Row, block: Any, inputs: Inputs, keep: int, damping: float | None) -> Cut:
    """Cut one FFN by the second moments of its down projection's inputs, and fit it."""
    down = block.get_submodule(row.down)
    weight_HF = matrix_of(down)

    def choose(gram_FF: Tensor, chosen: float) -> Tensor:
        return keep_channels(weight_HF, gram_FF, keep, chosen)

    # Which channels stay, and the projection fitted to them.
    cut = cut_columns(weight_HF, inputs, choose, damping)
    refit(down, cut.weight_HK)

    # What makes them; where gates and ups are one matrix, in both of its halves.
    makers = [block.get_submodule(name) for name in row.gate_up]
    halves = 2 if row.gated and len(makers) == 1 else 1
    width = weight_HF.shape[1]
    rows = torch.cat([cut.keep_K + half * width for half in range(halves)])
    for maker in makers:
        assert len(matrix_of(maker)) == halves * width, f"{row.gate_up} of {row.architecture}"
        narrow(maker, rows)
    return cut
