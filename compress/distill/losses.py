"""Distillation losses on the output head, without ever holding all logits.

Pure functions of tensors.

With student logits z and teacher logits t, q = softmax(z / T), p = softmax(t / T) and label y, the
loss of one token is

    kl_weight * T^2 * D(p, q) + ce_weight * (-log softmax(z)_y)         (Hinton et al., arXiv
    1503.02531, section 2)

    forward_kl       D = sum_v p (log p - log q)             dD/dz = (q - p) / T
    reverse_kl       D = sum_v q (log q - log p)             g = log q - log p
    jsd              D = b KL(p || m) + (1 - b) KL(q || m)   g = (1 - b) log(q / m)
                     (arXiv 2306.13649, section 3), m = b p + (1 - b) q, in logarithms: where p and
                     q both underflow, m would be 0
    total_variation  D = 1/2 sum_v |p - q|                   g = 1/2 sign(q - p)

where dD/dz = q (g - sum_v q g) / T. A student's head may have more rows than the two models share
ids: padding, which the teacher never gives. Both weights then also act on -log of the mass that
softmax(z) leaves to the shared ids, which is what forward KL and cross-entropy over the whole head
come to, and is finite for the others too; all else is computed on the shared ids.

The teacher comes in one of two forms:

    Sparse   K ids with weights w, an unbiased picture of p, and p's entropy H:
             forward_kl = -sum_k w_k log q_k - H
    Dense    its final hidden states and head: logits are made chunk by chunk, every divergence is
             exact

As the gradient is known in closed form, the forward pass computes it chunk by chunk of tokens and
keeps only d loss / d h (N, H) and d loss / d W (V, H); backward multiplies them by the incoming
scalar. Memory is one chunk of logits, not N x V. A chunk's matrix products want many tokens (each
adds a whole V x H product to d W), its softmax wants few, that stay in the cache: hence two sizes.
Measured on 2 cores, 2048 x 576 x 49152, bf16: the head took 1.01 s with 512 tokens at once, 0.75 s
with 32. Sums over chunks are fp32 where the weight is shorter: in bf16, of 8 significant bits,
later chunks would be rounded away.

Legend: N tokens, H hidden, V vocabulary, K teacher ids a token, C tokens a chunk, c tokens of it at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.models.head import Head

CHUNK_TOKENS = 512  # of one matrix product: 50 MB of bf16 logits at V = 49152
VOCABULARY_ROWS = 8192  # of d W added up at once
CACHED_TOKENS = 32  # of one softmax on a CPU: 6 MB of fp32 logits
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation")


class Sparse(NamedTuple):
    """K ids a token (N, K) int64 with weights (N, K) whose expectation is p, and p's entropy (N,).
    Weight 0 is padding.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    entropy_N: Tensor


class Dense(NamedTuple):
    """The teacher's final hidden states (N, H') and its head."""

    hidden_NH: Tensor
    head: Head


Target = Sparse | Dense


@dataclass(frozen=True)
class Mix:
    """Which divergence, and how it is mixed with cross-entropy and `hidden_mse`."""

    kl_weight: float = 1.0
    ce_weight: float = 0.0
    divergence: str = "forward_kl"
    temperature: float = 1.0
    jsd_beta: float = 0.5
    hidden_weight: float = 0.0

    def check(self, target: Target | None) -> None:
        """ValueError for what can't be computed: an unknown divergence, or one that this form of
        the teacher can't give.
        """
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence {self.divergence!r} is unknown; allowed are {', '.join(DIVERGENCES)}"
            )
        if self.kl_weight and target is None:
            raise ValueError(f"kl_weight={self.kl_weight} needs the teacher's signal; got none")
        if not isinstance(target, Dense | None) and self.divergence != "forward_kl":
            raise ValueError(
                f"{self.divergence} needs all of the teacher's probabilities: use"
                " signal.scheme=hidden or online, not sparse ids"
            )


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
            head = head.to(compute)
            if isinstance(target, Dense):
                target = Dense(target.hidden_NH.to(compute), target.head.to(compute))
            d_hidden = torch.empty_like(hidden_NH) if need_h else None
            empty = (
                torch.empty_like if len(hidden_NH) else torch.zeros_like
            )  # the first chunk overwrites it
            summed = torch.promote_types(weight_VH.dtype, torch.float32)
            d_weight = (
                (empty(weight_VH, dtype=summed) if into_VH is None else into_VH) if need_w else None
            )
            d_bias = (
                torch.zeros_like(bias_V, dtype=summed) if bias_V is not None and need_b else None
            )
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
        one = scale.device.type == "cpu" and float(scale) == 1.0  # asking a GPU would wait for it
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
        logits_cV = head.finish(product_CV[part])
        kept_cV = logits_cV.clone() if head.softcap is not None else logits_cV
        loss, grad_cV = _on_shared(
            logits_cV, labels_C[part], counted_C[part], target_at(part), mix, shared
        )
        grad_cV = head.back(grad_cV, kept_cV)
        if d_bias is not None:
            d_bias += grad_cV.sum(0)
        product_CV[part] = grad_cV
        total += loss
    return total


def _on_shared(
    logits_CV: Tensor, labels_C: Tensor, counted_C: Tensor, target: Any, mix: Mix, shared: int
) -> tuple[Tensor, Tensor]:
    """`_gradient` on the shared ids, and what the mass behind them costs. Overwrites its logits."""
    if shared == logits_CV.shape[1]:
        return _gradient(logits_CV, labels_C, counted_C, target, mix)
    weight_C = (mix.kl_weight + mix.ce_weight) * counted_C
    log_q_CV = logits_CV.log_softmax(-1)
    log_mass_C1 = log_q_CV[:, :shared].logsumexp(-1, keepdim=True)
    grad_CV = log_q_CV.exp()
    grad_CV[:, :shared] -= (log_q_CV[:, :shared] - log_mass_C1).exp()
    grad_CV *= weight_C[:, None]
    loss, shared_grad_CV = _gradient(
        logits_CV[:, :shared].contiguous(), labels_C, counted_C, target, mix
    )
    grad_CV[:, :shared] += shared_grad_CV
    return loss - (weight_C * log_mass_C1[:, 0]).double().sum(), grad_CV


def _gradient(
    logits_CV: Tensor, labels_C: Tensor, counted_C: Tensor, target: Any, mix: Mix
) -> tuple[Tensor, Tensor]:
    """Weighted loss sum of some tokens and d loss / d logits (C, V). Overwrites its logits."""
    ce_C, kl_C = mix.ce_weight * counted_C, mix.kl_weight * counted_C
    if not mix.kl_weight or (not isinstance(target, Tensor) and mix.temperature == 1.0):
        return _sparse(logits_CV, labels_C, kl_C, ce_C, target if mix.kl_weight else None)
    if isinstance(target, Tensor):
        loss, grad_CV = _dense(logits_CV, target, kl_C, mix)
    # ids whose weights are softmax(t / T)'s; the first of them stands for the label, of weight 0
    else:
        loss, grad_CV = _sparse(
            logits_CV / mix.temperature, target.ids_NK[:, 0], kl_C, 0 * kl_C, target
        )
        loss, grad_CV = loss * mix.temperature**2, grad_CV.mul_(mix.temperature)
    if not mix.ce_weight:
        return loss, grad_CV
    ce_loss, ce_grad_CV = _sparse(logits_CV, labels_C, kl_C, ce_C, None)
    return loss + ce_loss, grad_CV.add_(ce_grad_CV)


def _sparse(
    logits_CV: Tensor, labels_C: Tensor, kl_C: Tensor, ce_C: Tensor, target: Sparse | None
) -> tuple[Tensor, Tensor]:
    """kl_C * forward KL + ce_C * cross-entropy, and the gradient; one pass of exp serves both.
    Overwrites its logits.
    """
    label_C1 = logits_CV.gather(1, labels_C[:, None])
    targets_CK = logits_CV.gather(1, labels_C[:, None] if target is None else target.ids_NK)
    max_C1 = logits_CV.amax(-1, keepdim=True)
    exp_CV = logits_CV.sub_(max_C1).exp_()  # in place from here on
    sum_C1 = exp_CV.sum(-1, keepdim=True)
    lse_C = (max_C1 + sum_C1.log())[:, 0]
    loss_C = ce_C * (lse_C - label_C1[:, 0])
    everywhere_C = ce_C
    if target is not None:
        mass_C = target.probs_NK.sum(-1)
        loss_C = loss_C + kl_C * (
            mass_C * lse_C - (target.probs_NK * targets_CK).sum(-1) - target.entropy_N
        )
        everywhere_C = kl_C * mass_C + ce_C
    grad_CV = exp_CV.mul_(everywhere_C[:, None] / sum_C1)
    if target is not None:
        grad_CV.scatter_add_(1, target.ids_NK, -kl_C[:, None] * target.probs_NK)
    grad_CV.scatter_add_(1, labels_C[:, None], -ce_C[:, None])
    return loss_C.double().sum(), grad_CV


def _dense(logits_CV: Tensor, teacher_CV: Tensor, kl_C: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Any divergence from both models' logits (C, V), times T^2, and its gradient."""
    temperature, beta = mix.temperature, mix.jsd_beta
    log_q_CV = (logits_CV / temperature).log_softmax(-1)
    log_p_CV = (teacher_CV / temperature if temperature != 1.0 else teacher_CV).log_softmax(-1)
    q_CV = log_q_CV.exp()
    if mix.divergence == "forward_kl":
        p_CV = log_p_CV.exp()
        loss_C = torch.linalg.vecdot(p_CV, log_p_CV.sub_(log_q_CV))
        grad_CV = q_CV.sub_(p_CV)
    else:
        if mix.divergence == "reverse_kl":
            g_CV = log_q_CV - log_p_CV
            loss_C = torch.linalg.vecdot(q_CV, g_CV)
        elif mix.divergence == "jsd":
            p_CV = log_p_CV.exp()
            log_m_CV = torch.logaddexp(log_p_CV + math.log(beta), log_q_CV + math.log1p(-beta))
            g_CV = (1 - beta) * (log_q_CV - log_m_CV)
            loss_C = beta * torch.linalg.vecdot(p_CV, log_p_CV - log_m_CV) + torch.linalg.vecdot(
                q_CV, g_CV
            )
        else:
            difference_CV = q_CV - log_p_CV.exp()
            g_CV = 0.5 * difference_CV.sign()
            loss_C = 0.5 * difference_CV.abs().sum(-1)
        grad_CV = q_CV * (g_CV - torch.linalg.vecdot(q_CV, g_CV)[:, None])
    return (temperature**2 * kl_C * loss_C).double().sum(), grad_CV.mul_(
        temperature * kl_C[:, None]
    )


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
    """Sum over the masked tokens of the loss in the module's docstring, in nats.

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
    if (
        not torch.is_grad_enabled()
    ):  # a parameter still asks for its gradient inside of an autograd function
        hidden_NH, head = hidden_NH.detach(), head.detach()
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


def hidden_mse(student_NH: Tensor, teacher_NH: Tensor, mask_N: Tensor) -> Tensor:
    """Sum over masked tokens of the mean squared difference of last hidden states, each scaled to
    unit RMS (arXiv 1910.01108, section 2).
    """

    def unit(x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()

    return ((unit(student_NH) - unit(teacher_NH)).pow(2).mean(-1) * mask_N).sum()
