"""Distillation losses of a few tokens whose logits are at hand, and their gradients in closed form.

Pure functions of tensors; `compress/distill/fused_head.py` calls them chunk by chunk of tokens.

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
    Dense    its final hidden states and head: logits are made chunk by chunk (here they come as
             one tensor), every divergence is exact

Legend: N tokens, H hidden, V vocabulary, K teacher ids a token, C tokens of one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.models.head import Head

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

        # What this form of the teacher can't give.
        if self.kl_weight and target is None:
            raise ValueError(f"kl_weight={self.kl_weight} needs the teacher's signal; got none")
        if not isinstance(target, Dense | None) and self.divergence != "forward_kl":
            raise ValueError(
                f"{self.divergence} needs all of the teacher's probabilities: use"
                " signal.scheme=hidden or online, not sparse ids"
            )


def loss_and_gradient(
    logits_CV: Tensor, labels_C: Tensor, counted_C: Tensor, target: Any, mix: Mix, shared: int
) -> tuple[Tensor, Tensor]:
    """`_gradient` on the shared ids, and what the mass behind them costs. Overwrites its logits."""
    if shared == logits_CV.shape[1]:
        return _gradient(logits_CV, labels_C, counted_C, target, mix)

    # -log of the mass on shared ids; its gradient is q less q among the shared ids alone.
    weight_C = (mix.kl_weight + mix.ce_weight) * counted_C
    log_q_CV = logits_CV.log_softmax(-1)
    log_mass_C1 = log_q_CV[:, :shared].logsumexp(-1, keepdim=True)
    grad_CV = log_q_CV.exp()
    grad_CV[:, :shared] -= (log_q_CV[:, :shared] - log_mass_C1).exp()
    grad_CV *= weight_C[:, None]

    # All else as if the head ended behind the shared ids.
    loss, shared_grad_CV = _gradient(
        logits_CV[:, :shared].contiguous(), labels_C, counted_C, target, mix
    )
    grad_CV[:, :shared] += shared_grad_CV
    return loss - (weight_C * log_mass_C1[:, 0]).double().sum(), grad_CV


def _gradient(
    logits_CV: Tensor, labels_C: Tensor, counted_C: Tensor, target: Any, mix: Mix
) -> tuple[Tensor, Tensor]:
    """Weighted loss sum of some tokens and d loss / d logits (C, V). Overwrites its logits."""
    ce_C = mix.ce_weight * counted_C
    kl_C = mix.kl_weight * counted_C

    # Both terms of the same logits: one pass serves them.
    if not mix.kl_weight or (not isinstance(target, Tensor) and mix.temperature == 1.0):
        return _sparse(logits_CV, labels_C, kl_C, ce_C, target if mix.kl_weight else None)

    # The divergence alone, times T^2.
    if isinstance(target, Tensor):
        loss, grad_CV = _dense(logits_CV, target, kl_C, mix)
    else:
        # Ids whose weights are softmax(t / T)'s; the first stands for the label, of weight 0.
        loss, grad_CV = _sparse(
            logits_CV / mix.temperature, target.ids_NK[:, 0], kl_C, 0 * kl_C, target
        )
        loss, grad_CV = loss * mix.temperature**2, grad_CV.mul_(mix.temperature)

    # Cross-entropy, always at temperature 1.
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
    # What is asked of single logits, before they are overwritten.
    label_C1 = logits_CV.gather(1, labels_C[:, None])
    targets_CK = logits_CV.gather(1, labels_C[:, None] if target is None else target.ids_NK)

    # log sum exp, in place.
    max_C1 = logits_CV.amax(-1, keepdim=True)
    exp_CV = logits_CV.sub_(max_C1).exp_()
    sum_C1 = exp_CV.sum(-1, keepdim=True)
    lse_C = (max_C1 + sum_C1.log())[:, 0]

    # The losses, and the weight that softmax(z) has in the gradient at every id.
    loss_C = ce_C * (lse_C - label_C1[:, 0])
    everywhere_C = ce_C
    if target is not None:
        mass_C = target.probs_NK.sum(-1)
        loss_C = loss_C + kl_C * (
            mass_C * lse_C - (target.probs_NK * targets_CK).sum(-1) - target.entropy_N
        )
        everywhere_C = kl_C * mass_C + ce_C

    # The gradient: softmax everywhere, less the teacher's weights and the label.
    grad_CV = exp_CV.mul_(everywhere_C[:, None] / sum_C1)
    if target is not None:
        grad_CV.scatter_add_(1, target.ids_NK, -kl_C[:, None] * target.probs_NK)
    grad_CV.scatter_add_(1, labels_C[:, None], -ce_C[:, None])
    return loss_C.double().sum(), grad_CV


def _dense(logits_CV: Tensor, teacher_CV: Tensor, kl_C: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Any divergence from both models' logits (C, V), times T^2, and its gradient."""
    temperature = mix.temperature
    beta = mix.jsd_beta
    log_q_CV = (logits_CV / temperature).log_softmax(-1)
    log_p_CV = (teacher_CV / temperature if temperature != 1.0 else teacher_CV).log_softmax(-1)
    q_CV = log_q_CV.exp()

    # T dD/dz of each divergence; for forward KL it comes to q - p.
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


def hidden_mse(student_NH: Tensor, teacher_NH: Tensor, mask_N: Tensor) -> Tensor:
    """Sum over masked tokens of the mean squared difference of last hidden states, each scaled to
    unit RMS (arXiv 1910.01108, section 2).
    """

    def unit(x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()

    return ((unit(student_NH) - unit(teacher_NH)).pow(2).mean(-1) * mask_N).sum()
