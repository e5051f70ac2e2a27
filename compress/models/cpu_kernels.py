"""Attention and RMS norms for training on a CPU (`use_cpu_kernels`): exact, in pieces that stay in
the cache. Attention is several times faster than torch's own CPU kernel, most of it backwards.

For a block of C queries and the keys up to its end, with s = 1 / sqrt(D) or what the model says,

    P = softmax(s Q K^T + mask)    O = P V
    dV = P^T dO    dP = dO V^T    dS = P (dP - rowsum(P dP))    dQ = s dS K    dK = s dS^T Q

so nothing right of the diagonal is computed but inside a block. Only Q, K and V are kept; backward
makes P again, as FlashAttention does (arXiv 2205.14135, section 3.1). Query heads that share a KV
head are rows of one product: K and V are never repeated. Products are of the autocast type (else of
V's), softmax sums in fp32, as transformers' eager attention.

RMS norm (arXiv 1910.07467), y = x r w with r = (mean x^2 + eps)^(-1/2), keeps x and r alone. With
x' = x r and g = w dL/dy,

    dL/dx = r (g - x' mean(g x'))    dL/dw = sum x' dL/dy

Under autocast y is of its type at once, which every linear layer behind it would round it to.

Legend: B sequences, H query heads, K KV heads, L positions, D head dimension, C queries of a block
or tokens of a chunk, E keys up to a block's end, N tokens, W hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm

NAME = "causal_blocks"
BLOCK = 128  # queries at once
ROWS = 256  # tokens of a norm at once: 0.6 MB at width 576


class _Blocks(torch.autograd.Function):
    """(B, H, L, D), (B, K, L, D), (B, K, L, D) -> (B, H, L, D)."""

    @staticmethod
    def forward(
        ctx: Any, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        # The types are those of the inputs, whatever autocast says outside.
        with torch.autocast("cpu", enabled=False):
            out_BHLD = torch.empty_like(q_BHLD, memory_format=torch.contiguous_format)
            for part, end, p, _ in _probabilities(q_BHLD, k_BKLD, mask, scale):
                out_BHLD[:, :, part] = torch.bmm(p, v_BKLD.flatten(0, 1)[:, :end]).view(
                    out_BHLD[:, :, part].shape
                )

        ctx.save_for_backward(q_BHLD, k_BKLD, v_BKLD, mask)
        ctx.scale = scale
        return out_BHLD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        q_BHLD, k_BKLD, v_BKLD, mask = ctx.saved_tensors
        out = grad_outputs[0]
        k, v = k_BKLD.flatten(0, 1), v_BKLD.flatten(0, 1)

        # Every block adds to dK and dV of the keys before it, so these are summed in fp32.
        d_q = torch.empty_like(q_BHLD, memory_format=torch.contiguous_format)
        d_k, d_v = (
            torch.zeros(k.shape, dtype=torch.promote_types(k.dtype, torch.float32))
            for _ in range(2)
        )

        # In the notation above: p is P, d_s is dS, and q carries the scale already.
        for part, end, p, q in _probabilities(q_BHLD, k_BKLD, mask, ctx.scale):
            d_out = out[:, :, part].reshape(q.shape)
            d_v[:, :end] += torch.bmm(p.transpose(1, 2), d_out)
            d_s = torch._softmax_backward_data(
                torch.bmm(d_out, v[:, :end].transpose(1, 2)), p, -1, p.dtype
            )
            d_q[:, :, part] = torch.bmm(d_s, k[:, :end]).mul_(ctx.scale).view(d_q[:, :, part].shape)
            d_k[:, :end] += torch.bmm(d_s.transpose(1, 2), q)

        return (
            d_q,
            d_k.view(k_BKLD.shape).to(k.dtype),
            d_v.view(v_BKLD.shape).to(v.dtype),
            None,
            None,
        )


def _probabilities(
    q_BHLD: Tensor, k_BKLD: Tensor, mask: Tensor | None, scale: float
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Of each block: its queries' place, E, P (B K, G C, E)
    and the scaled queries (B K, G C, D).
    """
    batch, heads, length, dim = q_BHLD.shape
    groups = batch * k_BKLD.shape[1]
    k = k_BKLD.flatten(0, 1)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        part = slice(start, end)

        # Query heads of one KV head are rows of the same product.
        q = (q_BHLD[:, :, part] * scale).reshape(groups, -1, dim)
        scores = torch.bmm(q, k[:, :end].transpose(1, 2))

        # A query sees nothing behind itself, nor what the mask forbids.
        by_head = scores.view(batch, heads, end - start, end)
        if mask is None:
            by_head[..., start:].add_(
                torch.full((end - start, end - start), -torch.inf, dtype=scores.dtype).triu_(1)
            )
        else:
            # The least number, not -inf: a query that sees nothing, as padding on the left, must
            # not become NaN, which spreads to all others.
            by_head.masked_fill_(~mask[:, :, part, :end], torch.finfo(scores.dtype).min)

        yield part, end, scores.softmax(-1), q


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it, (B, L, H, D); whatever is not plain causal attention of whole
    sequences on a CPU goes to torch's own.
    """
    # Whole sequences on a CPU: every query has its key, and nothing is dropped.
    whole_sequences = (
        query.device.type == "cpu"
        and query.shape[2] == key.shape[2] > 1
        and query.shape[3] == value.shape[3]
        and not dropout
    )

    # A mask of booleans says who sees whom; one of numbers, which is added to scores, is torch's.
    causal = (
        is_causal is not False
        and getattr(module, "is_causal", True)
        and (attention_mask is None or attention_mask.dtype == torch.bool)
    )
    if not (whole_sequences and causal) or any(
        kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux")
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )

    # Products of the type that autocast asks for, else of the values' own.
    compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    q, k, v = (t.to(compute).contiguous() for t in (query, key, value))
    out = _Blocks.apply(
        q, k, v, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    return out.transpose(1, 2).contiguous(), None


class _RMSNorm(torch.autograd.Function):
    """x (N, W), w (W,) -> (N, W) in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x_NW: Tensor, w_W: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out_NW = torch.empty(x_NW.shape, dtype=dtype)
        r_N1 = torch.empty(len(x_NW), 1, dtype=x_NW.dtype)

        # r is kept for backward; its chunk is written in place.
        for x_CW, out_CW, r_C1 in zip(
            x_NW.split(ROWS), out_NW.split(ROWS), r_N1.split(ROWS), strict=True
        ):
            torch.linalg.vector_norm(x_CW, dim=-1, keepdim=True, out=r_C1)
            r_C1.square_().div_(x_CW.shape[1]).add_(eps).rsqrt_()
            out_CW.copy_((x_CW * r_C1).mul_(w_W))

        ctx.save_for_backward(x_NW, w_W, r_N1)
        return out_NW

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x_NW, w_W, r_N1 = ctx.saved_tensors
        d_x = torch.empty_like(x_NW)
        d_w = torch.zeros_like(w_W)

        # unit_CW is x' of the formula above; g_CW begins as dL/dy and becomes g.
        for x_CW, r_C1, g_CW, d_x_CW in zip(
            *(t.split(ROWS) for t in (x_NW, r_N1, grad_outputs[0], d_x)), strict=True
        ):
            unit_CW = x_CW * r_C1
            g_CW = g_CW.to(x_NW.dtype, copy=True)
            d_w += (g_CW * unit_CW).sum(0)
            mean_C1 = torch.linalg.vecdot(g_CW.mul_(w_W), unit_CW)[:, None].div_(x_CW.shape[1])
            torch.mul(g_CW.addcmul_(unit_CW, mean_C1, value=-1), r_C1, out=d_x_CW)
        return d_x, d_w, None, None


def _norm(module: Any, x: Tensor) -> Tensor:
    """Forward of a Llama-style norm; where x and weight are not fp32 on a CPU it is
    the module's own.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or module.weight.dtype != torch.float32:
        return type(module).forward(module, x)

    # Under autocast the linear layers behind would round to its type: the norm does so at once.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    with torch.autocast("cpu", enabled=False):
        out = _RMSNorm.apply(x.flatten(0, -2), module.weight, module.variance_epsilon, dtype)
    return out.view(x.shape)


def use_cpu_kernels(model: Any) -> None:
    """Let a transformers model, peft-wrapped or not, compute this way where it can; the choice is
    not saved with the model.

    What does not use torch's attention, or another norm than Llama's, keeps its own.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(NAME)

    # Norms are told by what they compute: every family has a copy of Llama's.
    for module in model.modules():
        if _code(type(module)) == _code(LlamaRMSNorm):
            module.forward = MethodType(_norm, module)


def _code(kind: type) -> Any:
    """Bytecode of `forward`: transformers' modelling files hold copies of the same norm under their
    own names.
    """
    code = getattr(kind.forward, "__code__", None)  # type: ignore[attr-defined]
    return code and (code.co_code, code.co_names, code.co_consts)
