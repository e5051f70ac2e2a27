"""What moves the weights: AdamW (arXiv 1711.05101) under a schedule, over fp32 masters or over bf16 weights with stochastic rounding.

    cosine   lr(t) = peak * warm(t) * (floor + (1 - floor) * (1 + cos(pi t / steps)) / 2)           (arXiv 1608.03983)
    wsd      warm-up, then the peak, then over the last `decay_fraction` of the steps linearly to the floor    (arXiv 2404.06395, section 4)

with warm(t) = min(1, (t + 1) / warmup). bf16 has 8 significant bits: an update below 1/512 of a weight would vanish under rounding to
nearest. Rounding up with probability (x - down) / (up - down) keeps it in expectation (arXiv 2010.06192, section 3), so that
weights need 2 bytes instead of a master copy's 4; the moments stay fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LR_FLOOR = 0.1  # of the peak: the usual end of a cosine schedule in distillation (Minitron, arXiv 2407.14679, table 9)
BETAS = (0.9, 0.95)
SCHEDULES = ("cosine", "wsd")


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, schedule: str = "cosine", decay_fraction: float = 0.2) -> float:
    """The schedules of the module's docstring."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    wsd, cosine = min(1.0, (steps - step) / max(1, round(decay_fraction * steps))), 0.5 * (1 + math.cos(math.pi * step / steps))
    share = cosine if schedule == "cosine" else wsd
    return peak * warm * (LR_FLOOR + (1 - LR_FLOOR) * share)


def stochastic_bf16(x: Tensor) -> Tensor:
    """fp32 to bf16, up or down at random so that the expectation is x; draws from torch's global generator."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW without weight decay on bf16 weights; fp32 moments under torch's own names."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": BETAS, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            (b1, b2), lr, eps = group["betas"], group["lr"], group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": torch.tensor(0.0), **{m: torch.zeros_like(p, dtype=torch.float32) for m in ("exp_avg", "exp_avg_sq")}}
                state["step"] += 1
                t, gradient = float(state["step"]), p.grad.float()
                state["exp_avg"].lerp_(gradient, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
                root = (state["exp_avg_sq"] / (1 - b2**t)).sqrt_().add_(eps)
                p.copy_(stochastic_bf16(p.float().addcdiv_(state["exp_avg"], root, value=-lr / (1 - b1**t))))


def make_optimizer(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Fused AdamW on fp32 weights, StochasticAdamW on bf16 ones."""
    if parameters[0].dtype == torch.bfloat16:
        return StochasticAdamW(parameters, lr)
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
