"""Distillation losses on the output head, without ever holding all logits. Pure functions of tensors.

With student logits z = W h, q = softmax(z), teacher distribution p and label y, the loss of one token is

    kl_weight * KL(p || q) + ce_weight * (-log q_y)                 (Hinton et al., arXiv 1503.02531, section 2, temperature 1)

The teacher comes as K ids with weights w (a sparse, unbiased picture of p, see `signal.py`) and its exact entropy H(p), so
KL(p || q) = -sum_k w_k log q_k - H(p), and the gradient with respect to the logits is

    kl_weight * (q sum_k w_k - w) + ce_weight * (q - onehot(y)).

As the gradient is known in closed form, the forward pass computes it chunk by chunk of tokens and keeps only d loss / d h
(N, H) and d loss / d W (V, H); backward multiplies them by the incoming scalar. Peak memory is one chunk of logits, not N x V.

Legend: N tokens, H hidden, V vocabulary, K teacher ids a token, C tokens a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 512  # 512 x 49152 fp32 logits are 100 MB; not tuned yet


class _FusedHead(torch.autograd.Function):
    """loss sum over tokens and its gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, ids_NK: Tensor, probs_NK: Tensor, labels_N: Tensor,
                kl_N: Tensor, ce_N: Tensor, chunk: int) -> Tensor:  # fmt: skip
        need_h, need_w = ctx.needs_input_grad[:2]
        compute = torch.get_autocast_dtype(hidden_NH.device.type) if torch.is_autocast_enabled(hidden_NH.device.type) else weight_VH.dtype
        with torch.autocast(hidden_NH.device.type, enabled=False):
            head_VH = weight_VH.to(compute)
            d_hidden = torch.empty_like(hidden_NH) if need_h else None
            d_weight = torch.zeros_like(weight_VH) if need_w else None
            total = hidden_NH.new_zeros((), dtype=torch.float64)
            for start in range(0, len(hidden_NH), chunk):
                part = slice(start, start + chunk)
                h_CH = hidden_NH[part].to(compute)
                loss, grad_CV = _chunk(h_CH @ head_VH.T, ids_NK[part], probs_NK[part], labels_N[part], kl_N[part], ce_N[part])
                total += loss
                grad_CV = grad_CV.to(compute)
                if d_hidden is not None:
                    d_hidden[part] = grad_CV @ head_VH
                if d_weight is not None and compute == d_weight.dtype:
                    d_weight.addmm_(grad_CV.T, h_CH)  # adds in place: a product of its own would be V x H each time
                elif d_weight is not None:
                    d_weight += grad_CV.T @ h_CH
        ctx.save_for_backward(*(t for t in (d_hidden, d_weight) if t is not None))
        return total.to(torch.float32 if compute != torch.float64 else torch.float64)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        saved, scale = list(ctx.saved_tensors), grad_outputs[0]
        d_hidden = saved.pop(0) * scale if ctx.needs_input_grad[0] else None
        d_weight = saved.pop(0).mul_(scale) if ctx.needs_input_grad[1] else None  # ours alone, so scaled in place
        return d_hidden, d_weight, None, None, None, None, None, None


def _chunk(logits_CV: Tensor, ids_CK: Tensor, probs_CK: Tensor, labels_C: Tensor, kl_C: Tensor, ce_C: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted loss sum of a chunk (without the entropy, which is a constant) and d loss / d logits (C, V)."""
    logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    mass_C, targets_CK, label_C1 = probs_CK.sum(-1), logits_CV.gather(1, ids_CK), logits_CV.gather(1, labels_C[:, None])
    max_C1 = logits_CV.amax(-1, keepdim=True)
    exp_CV = logits_CV.sub_(max_C1).exp_()  # in place from here on: one pass of exp serves the loss and the gradient
    sum_C1 = exp_CV.sum(-1, keepdim=True)
    lse_C = (max_C1 + sum_C1.log())[:, 0]
    cross_C = mass_C * lse_C - (probs_CK * targets_CK).sum(-1)
    loss = (kl_C * cross_C + ce_C * (lse_C - label_C1[:, 0])).double().sum()
    grad_CV = exp_CV.mul_((kl_C * mass_C + ce_C)[:, None] / sum_C1)
    grad_CV.scatter_add_(1, ids_CK, -kl_C[:, None] * probs_CK)
    grad_CV.scatter_add_(1, labels_C[:, None], -ce_C[:, None])
    return loss, grad_CV


def head_loss(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, mask_N: Tensor, *, ids_NK: Tensor | None = None,
              probs_NK: Tensor | None = None, entropy_N: Tensor | None = None, kl_weight: float = 0.0,
              ce_weight: float = 1.0, chunk: int = CHUNK_TOKENS) -> Tensor:  # fmt: skip
    """Sum over the masked tokens of kl_weight * KL(teacher || student) + ce_weight * cross-entropy, in nats.

    hidden (N, H) after the final norm, weight (V, H), labels (N,) int64, mask (N,) bool; ids (N, K) int64, probs (N, K) and
    entropy (N,) describe the teacher and are needed when kl_weight > 0. Logits are computed in the autocast type when
    autocast is on, else in the weight's type; softmax and sums are fp32 (fp64 for fp64 input).
    """
    real = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    counted_N = mask_N.to(real)
    if ids_NK is None or probs_NK is None or entropy_N is None:
        assert kl_weight == 0.0, "a KL term needs the teacher's signal"
        ids_NK, probs_NK = labels_N[:, None], counted_N.new_zeros(len(labels_N), 1)
        entropy_N = counted_N.new_zeros(len(labels_N))
    loss = _FusedHead.apply(hidden_NH, weight_VH, ids_NK, probs_NK.to(real), labels_N, kl_weight * counted_N, ce_weight * counted_N, chunk)
    return loss - kl_weight * (entropy_N.to(real) * counted_N).sum()


def hidden_mse(student_NH: Tensor, teacher_NH: Tensor, mask_N: Tensor) -> Tensor:
    """Sum over masked tokens of the mean squared difference of last hidden states, each scaled to unit RMS (arXiv 1910.01108, section 2)."""

    def unit(x: Tensor) -> Tensor:
        return x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()

    return ((unit(student_NH.float()) - unit(teacher_NH.float())).pow(2).mean(-1) * mask_N).sum()
