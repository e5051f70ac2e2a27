"""Causal attention for training on a CPU: exact, in blocks of queries, several times faster than torch's own CPU kernel backwards.

For a block of C queries and the keys up to its end, with s = 1 / sqrt(D) or what the model says,

    P = softmax(s Q K^T + mask)    O = P V    dV = P^T dO    dP = dO V^T    dS = P (dP - rowsum(P dP))    dQ = s dS K    dK = s dS^T Q

so nothing right of the diagonal is computed but inside a block. Only Q, K and V are kept; backward makes P again, as FlashAttention does
(arXiv 2205.14135, section 3.1). Query heads that share a KV head are rows of one product: K and V are never repeated. Products
are of the autocast type (else of V's), softmax sums in fp32, as transformers' eager attention.

Legend: B sequences, H query heads, K KV heads, G = H / K, L positions, D head dimension, C queries of a block, E keys up to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "causal_blocks"
BLOCK = 128


class _Blocks(torch.autograd.Function):
    """(B, H, L, D), (B, K, L, D), (B, K, L, D) -> (B, H, L, D)."""

    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            out_BHLD = torch.empty_like(q_BHLD, memory_format=torch.contiguous_format)
            for part, end, p, _ in _probabilities(q_BHLD, k_BKLD, mask, scale):
                out_BHLD[:, :, part] = torch.bmm(p, v_BKLD.flatten(0, 1)[:, :end]).view(out_BHLD[:, :, part].shape)
        ctx.save_for_backward(q_BHLD, k_BKLD, v_BKLD, mask)
        ctx.scale = scale
        return out_BHLD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        q_BHLD, k_BKLD, v_BKLD, mask = ctx.saved_tensors
        d_q, out = torch.empty_like(q_BHLD, memory_format=torch.contiguous_format), grad_outputs[0]
        k, v = k_BKLD.flatten(0, 1), v_BKLD.flatten(0, 1)
        d_k, d_v = (torch.zeros(k.shape, dtype=torch.promote_types(k.dtype, torch.float32)) for _ in range(2))
        for part, end, p, q in _probabilities(q_BHLD, k_BKLD, mask, ctx.scale):
            d_out = out[:, :, part].reshape(q.shape)
            d_v[:, :end] += torch.bmm(p.transpose(1, 2), d_out)
            d_s = torch._softmax_backward_data(torch.bmm(d_out, v[:, :end].transpose(1, 2)), p, -1, p.dtype)
            d_q[:, :, part] = torch.bmm(d_s, k[:, :end]).mul_(ctx.scale).view(d_q[:, :, part].shape)
            d_k[:, :end] += torch.bmm(d_s.transpose(1, 2), q)  # these queries carry the scale
        return d_q, d_k.view(k_BKLD.shape).to(k.dtype), d_v.view(v_BKLD.shape).to(v.dtype), None, None


def _probabilities(q_BHLD: Tensor, k_BKLD: Tensor, mask: Tensor | None, scale: float) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Of each block: its queries' place, E, P (B K, G C, E) and the scaled queries (B K, G C, D)."""
    batch, heads, length, dim = q_BHLD.shape
    groups = batch * k_BKLD.shape[1]
    k = k_BKLD.flatten(0, 1)
    for start in range(0, length, BLOCK):
        part, end = slice(start, min(start + BLOCK, length)), min(start + BLOCK, length)
        q = (q_BHLD[:, :, part] * scale).reshape(groups, -1, dim)
        scores = torch.bmm(q, k[:, :end].transpose(1, 2))
        by_head = scores.view(batch, heads, end - start, end)
        if mask is None:
            by_head[..., start:].masked_fill_(torch.ones(end - start, end - start, dtype=torch.bool).triu_(1), -torch.inf)
        else:
            by_head.masked_fill_(~mask[:, :, part, :end], -torch.inf)
        yield part, end, scores.softmax(-1), q


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
               scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it, (B, L, H, D); whatever is not plain causal attention of whole sequences on a CPU goes to torch's own."""
    plain = query.device.type == "cpu" and query.shape[2] == key.shape[2] > 1 and not dropout and is_causal is not False
    plain = plain and getattr(module, "is_causal", True) and (attention_mask is None or attention_mask.dtype == torch.bool)
    if not plain or any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    q, k, v = (t.to(compute).contiguous() for t in (query, key, value))
    out: Tensor = _Blocks.apply(q, k, v, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous(), None


def use_blocks(model: Any) -> None:
    """Let a transformers model, peft-wrapped or not, compute attention this way where it can; the choice is not saved with the model.

    Rows of a mask must keep at least one key. What does not use torch's attention keeps its own.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(base, "config", None), "_attn_implementation", None) == "sdpa":
        base.set_attn_implementation(NAME)
