"""The loss on the output head, without ever holding all logits.

As the gradient is known in closed form, the forward pass computes it chunk by chunk of tokens and
keeps only d loss / d h (N, H) and d loss / d W (V, H); backward multiplies them by the incoming
scalar. Memory is one chunk of logits, not N x V. A chunk's matrix products want many tokens (each
adds a whole V x H product to d W), its softmax wants few, that stay in the cache: hence two sizes.
Measured on 2 cores, 2048 x 576 x 49152, bf16: the head took 1.01 s with 512 tokens at once, 0.75 s
with 32. Sums over chunks are fp32 where the weight is shorter: in bf16, of 8 significant bits,
later chunks would be rounded away.

Legend: N tokens, H hidden, V vocabulary, C tokens a chunk, c tokens of it at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.distill.losses import Dense, Mix, Target, loss_and_gradient
from compress.models.head import Head

CHUNK_TOKENS = 512  # of one matrix product: 50 MB of bf16 logits at V = 49152
VOCABULARY_ROWS = 8192  # of d W added up at once
CACHED_TOKENS = 32  # of one softmax on a CPU: 6 MB of fp32 logits


class _FusedHead(torch.autograd.Function):
    """loss sum over tokens and its gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        labels_N: Tensor,
        counted_N: Tensor,
        target: Target | None,
        mix: Mix,
        chunk: int,
        into_VH: Tensor | None,
        shared: int,
    ) -> Tensor:
        device = hidden_NH.device.type
        compute = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else weight_VH.dtype
        )
        need_h, need_w, need_b = ctx.needs_input_grad[:3]

        with torch.autocast(device, enabled=False):
            # Both heads in the type of the products.
            head = head.to(compute)
            if isinstance(target, Dense):
                target = Dense(target.hidden_NH.to(compute), target.head.to(compute))

            # Room for the gradients that are asked for. The first chunk overwrites d W.
            d_hidden = torch.empty_like(hidden_NH) if need_h else None
            empty = torch.empty_like if len(hidden_NH) else torch.zeros_like
            summed = torch.promote_types(weight_VH.dtype, torch.float32)
            d_weight = None
            if need_w:
                d_weight = empty(weight_VH, dtype=summed) if into_VH is None else into_VH
            d_bias = (
                torch.zeros_like(bias_V, dtype=summed) if bias_V is not None and need_b else None
            )

            # Chunk by chunk: logits, their gradient in the same memory, then the products with it.
            total = hidden_NH.new_zeros((), dtype=torch.float64)
            for start in range(0, len(hidden_NH), chunk):
                part = slice(start, start + chunk)
                h_CH = hidden_NH[part].to(compute)
                product_CV = _products(h_CH, head)
                total += _to_gradient(
                    product_CV,
                    head,
                    labels_N[part],
                    counted_N[part],
                    _reader(target, part),
                    mix,
                    d_bias,
                    shared,
                )
                grad_CV = product_CV.to(compute)
                if d_hidden is not None:
                    d_hidden[part] = grad_CV @ head.weight_VH
                if d_weight is not None:
                    _add_product(d_weight, grad_CV, h_CH, fresh=into_VH is None and start == 0)

        # What was added to `into_VH` is not handed back a second time.
        d_weight = None if into_VH is not None or d_weight is None else d_weight.to(weight_VH.dtype)
        ctx.save_for_backward(
            d_hidden,
            d_weight,
            None if d_bias is None or bias_V is None else d_bias.to(bias_V.dtype),
        )
        return total.to(torch.float32 if compute != torch.float64 else torch.float64)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        scale = grad_outputs[0]
        # Asking a GPU for the number would wait for it.
        one = scale.device.type == "cpu" and float(scale) == 1.0
        return (
            *(grad if one or grad is None else grad.mul_(scale) for grad in ctx.saved_tensors),
            *[None] * 8,
        )


def _products(h_CH: Tensor, head: Head) -> Tensor:
    """h W^T (C, V) in the type of both; on a GPU from bf16 or fp16 in fp32, as its cores sum them:
    logits of 16 to 32 lie 0.125 apart in bf16.
    """
    if h_CH.is_cuda and h_CH.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(h_CH, head.weight_VH.T, out_dtype=torch.float32)
    return h_CH @ head.weight_VH.T


def _add_product(d_weight_VH: Tensor, grad_CV: Tensor, h_CH: Tensor, fresh: bool) -> None:
    """d_weight += grad.T @ h, or = where `fresh`; where the types differ, rows at a time: a
    low-precision product of its own would be V x H.
    """
    if d_weight_VH.dtype == h_CH.dtype:
        torch.mm(grad_CV.T, h_CH, out=d_weight_VH) if fresh else d_weight_VH.addmm_(grad_CV.T, h_CH)
        return
    for rows, columns in zip(
        d_weight_VH.split(VOCABULARY_ROWS), grad_CV.split(VOCABULARY_ROWS, 1), strict=True
    ):
        rows.copy_(columns.T @ h_CH) if fresh else rows.add_(columns.T @ h_CH)


def _reader(target: Any, part: slice) -> Callable[[slice], Any]:
    """For a chunk of a target: places in the chunk -> the target there, a Dense one's as logits
    (c, V) of one product for the whole chunk.
    """
    if target is None:
        return lambda at: None
    if not isinstance(target, Dense):
        return lambda at: target._make(tensor[part][at] for tensor in target)
    head = target.head
    products_CV = _products(target.hidden_NH[part], head)
    return lambda at: head.finish(products_CV[at])


def _to_gradient(
    product_CV: Tensor,
    head: Head,
    labels_C: Tensor,
    counted_C: Tensor,
    target_at: Callable[[slice], Any],
    mix: Mix,
    d_bias: Tensor | None,
    shared: int,
) -> Tensor:
    """Overwrite a chunk's products by d loss / d product; the weighted loss sum. `d_bias` (V,) is
    added to.
    """
    total = product_CV.new_zeros((), dtype=torch.float64)
    step = CACHED_TOKENS if product_CV.device.type == "cpu" else len(product_CV)
    for start in range(0, len(product_CV), step):
        part = slice(start, start + step)

        # Logits are overwritten by their gradient; the way back through a softcap needs them.
        logits_cV = head.finish(product_CV[part])
        kept_cV = logits_cV.clone() if head.softcap is not None else logits_cV
        loss, grad_cV = loss_and_gradient(
            logits_cV, labels_C[part], counted_C[part], target_at(part), mix, shared
        )

        # From d loss / d logits to d loss / d product, through softcap, scale and bias.
        grad_cV = head.back(grad_cV, kept_cV)
        if d_bias is not None:
            d_bias += grad_cV.sum(0)
        product_CV[part] = grad_cV
        total += loss
    return total


def head_loss(
    hidden_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    mask_N: Tensor,
    target: Target | None,
    mix: Mix,
    chunk: int = CHUNK_TOKENS,
    into_VH: Tensor | None = None,
    shared: int | None = None,
) -> Tensor:
    """Sum over the masked tokens of the loss in `compress/distill/losses.py`, in nats.

    hidden (N, H) after the final norm, labels (N,) int64, mask (N,) bool. Logits are computed in
    the autocast type when autocast is on, else in the weight's type; softmax and sums are fp32
    (fp64 for fp64 input). The first `shared` rows of the head stand for ids that teacher and labels
    may have, the rest is padding. Without gradients no buffer for one is made. ValueError when the
    mix can't be had from the target.

    With `into_VH`, the head weight's own `.grad` of earlier micro-batches, d loss / d W is added
    there at once, and backward, which must then be called with gradient 1, leaves it alone: a V x H
    buffer and two passes over it less (as Megatron's gradient accumulation fusion).
    """
    mix.check(target)
    real = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32

    # Inside of an autograd function a parameter asks for its gradient all the same.
    if not torch.is_grad_enabled():
        hidden_NH = hidden_NH.detach()
        head = head.detach()

    rows = len(head.weight_VH) if shared is None else shared
    return _FusedHead.apply(
        hidden_NH,
        head.weight_VH,
        head.bias_V,
        head,
        labels_N,
        mask_N.to(real),
        target,
        mix,
        chunk,
        into_VH,
        rows,
    )
