"""Ways to write a distribution down, and back: pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.models.head import Head

CHUNK = 32  # tokens whose full logits are held at once: on a CPU those that its cache takes
GPU_CHUNK = 512  # on a GPU, where a kernel over few tokens takes as long as one over many
BLOCK = 64  # ids summed up together; a hit is looked for in the sums first
GROUP = 64  # int8 hidden states sharing a scale
Shard = dict[str, Tensor]


class Scheme(NamedTuple):
    """What is kept of each token; `stages/training.py` checks the values."""

    name: str = "sampled"
    threshold: float = 1 / 20  # sampled: tau
    temperature: float = 1.0  # sampled: T


@torch.inference_mode()
def encode(hidden_LH: Tensor, head: Head, scheme: Scheme, generator: torch.Generator) -> Shard:
    """What is kept of one sequence: named tensors, on the CPU."""
    if scheme.name == "hidden":
        return _encode_hidden(hidden_LH)

    # Chunk by chunk, so that few full rows of logits are held at once.
    parts: list[Shard] = []
    for chunk in hidden_LH.split(CHUNK if hidden_LH.device.type == "cpu" else GPU_CHUNK):
        logits_CV = head.logits(chunk)
        if scheme.temperature != 1.0:
            logits_CV.div_(scheme.temperature)
        u_C = torch.rand(len(chunk), generator=generator, dtype=torch.float64).to(logits_CV.device)
        parts.append(sample(logits_CV, scheme.threshold, u_C))
    sequence = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    # ids in two bytes, and a third in a tensor of its own where the vocabulary needs it
    ids = sequence.pop("ids")
    sequence["ids_low"] = (ids & 0xFFFF).to(torch.uint16)
    if head.ids_count > 1 << 16:
        sequence["ids_high"] = (ids >> 16).to(torch.uint8)
    return sequence


def _encode_hidden(hidden_LH: Tensor) -> Shard:
    """int8 codes (L, H) and fp16 scales (L, groups) of hidden states (L, H)."""
    length, width = hidden_LH.shape
    groups = torch.nn.functional.pad(hidden_LH.float(), (0, -width % GROUP)).view(length, -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(6e-8).half()
    codes = (groups / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {
        "codes": codes.flatten(1)[:, :width].contiguous().cpu(),
        "scales": scale[..., 0].cpu(),
    }


def sample(logits_CV: Tensor, tau: float, u_C: Tensor) -> Shard:
    """`sampled` of fp32 logits with one uniform u in [0, 1) a token.

    heads, draws (C,) uint8; ids of heads, then of draws, token by token; fp16 probabilities of the
    heads; rest, entropy (C,) fp16.
    """
    tokens = len(logits_CV)
    device = logits_CV.device

    # Probabilities in the memory of one copy, and their entropy.
    max_C1 = logits_CV.amax(-1, keepdim=True)
    p_CV = (logits_CV - max_C1).exp_()
    sum_C1 = p_CV.sum(-1, keepdim=True)
    p_CV.div_(sum_C1)
    entropy_C = (max_C1 + sum_C1.log())[:, 0] - torch.linalg.vecdot(p_CV, logits_CV)

    # Heads are kept as they are and leave the rest to be drawn from.
    head_token, head_column = (p_CV >= tau).nonzero(as_tuple=True)
    head_p = p_CV[head_token, head_column].half()
    p_CV[head_token, head_column] = 0.0
    rest_C = p_CV.sum(-1).half()

    # S draws a token, at the points (u + i) / S of its rest.
    draws_C = (rest_C.double() / tau).ceil().long().clamp_max(255)
    draw_token = torch.repeat_interleave(torch.arange(tokens, device=device), draws_C)
    first_C = draws_C.cumsum(0) - draws_C
    number = torch.arange(len(draw_token), device=device) - first_C[draw_token]
    draw_column = _systematic(p_CV, draw_token, (u_C[draw_token] + number) / draws_C[draw_token])

    # Token by token; a stable order keeps a token's heads before its draws.
    token = torch.cat([head_token, draw_token])
    column = torch.cat([head_column, draw_column])
    by_token = torch.sort(token, stable=True).indices
    heads_C = torch.bincount(head_token, minlength=tokens)
    return {
        "heads": heads_C.to(torch.uint8), "draws": draws_C.to(torch.uint8), "ids": column[by_token],
        "probs": head_p, "rest": rest_C, "entropy": entropy_C.clamp_min(0).half(),
    }  # fmt: skip


def _systematic(rest_CV: Tensor, token_M: Tensor, quantile_M: Tensor) -> Tensor:
    """Columns (M,) where the cumulative sum of the token's row reaches its quantile in [0, 1) of
    the row's total.
    """
    # The cumulative sum at the end of every block of BLOCK ids.
    rest_CV = torch.nn.functional.pad(rest_CV, (0, -rest_CV.shape[1] % BLOCK))
    blocks_CBb = rest_CV.view(len(rest_CV), -1, BLOCK)
    ends_CB = blocks_CBb.sum(-1).double().cumsum(-1)

    # The block of each hit.
    point_M = quantile_M * ends_CB[token_M, -1]
    block_M = torch.searchsorted(ends_CB[token_M], point_M[:, None], right=True)[:, 0].clamp_max(
        ends_CB.shape[1] - 1
    )

    # And its place inside.
    before_M = torch.where(block_M > 0, ends_CB[token_M, (block_M - 1).clamp_min(0)], 0.0)
    inside_Mb = blocks_CBb[token_M, block_M].double().cumsum(-1)
    column_M = torch.searchsorted(inside_Mb, (point_M - before_M)[:, None], right=True)[
        :, 0
    ].clamp_max(BLOCK - 1)
    return block_M * BLOCK + column_M


def decode(rows: list[Shard], scheme: Scheme) -> dict[str, Tensor]:
    """Tensors of a batch out of `encode`'s, for N tokens in all: what `as_target` takes."""
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    if scheme.name == "hidden":
        codes, scales = joined["codes"], joined["scales"].float()
        return {
            "teacher_hidden": (
                codes.float() * scales.repeat_interleave(GROUP, 1)[:, : codes.shape[1]]
            )
        }

    # Ids out of two bytes, or three.
    ids = joined["ids_low"].view(torch.int16).long() & 0xFFFF
    if "ids_high" in joined:
        ids += joined["ids_high"].long() << 16

    # Of which token each id is, at which place among the token's.
    heads_N = joined["heads"].long()
    draws_N = joined["draws"].long()
    count_N = heads_N + draws_N
    token = torch.repeat_interleave(torch.arange(len(heads_N)), count_N)
    place = torch.arange(len(ids)) - (count_N.cumsum(0) - count_N)[token]
    is_head = place < heads_N[token]

    # A head has its own probability, a draw its share of the rest; all add up to 1.
    probs = joined["probs"].float()
    rest_N = joined["rest"].float()
    kept_N = torch.zeros(len(heads_N)).index_add_(0, token[is_head], probs)
    p = (rest_N / draws_N.clamp_min(1))[token]
    p[is_head] = probs
    p /= (kept_N + rest_N)[token]

    # As many columns as the token of most ids has; the others' end in weight 0.
    shape = (len(heads_N), max(1, int(count_N.max())))
    return {
        "ids": torch.zeros(shape, dtype=torch.long).index_put_((token, place), ids),
        "probs": torch.zeros(shape).index_put_((token, place), p),
        "entropy": joined["entropy"].float(),
    }  # fmt: skip
