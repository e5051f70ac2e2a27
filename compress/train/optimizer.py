"""Learning rates, and AdamW on bf16 weights with stochastic rounding.

The optimizer is AdamW (arXiv 1711.05101) under a schedule, over fp32 masters (bf16: under bf16
autocast) or bf16 weights (bf16_stochastic):

    cosine   lr(t) = peak * warm(t) * (floor + (1 - floor) * (1 + cos(pi t / steps)) / 2)
             (arXiv 1608.03983)
    wsd      warm-up, then the peak, then over the last `decay_fraction` of the steps linearly to
             the floor (arXiv 2404.06395, section 4)

with warm(t) = min(1, (t + 1) / warmup). bf16 has 8 significant bits: an update below 1/512 of a
weight would vanish under rounding to nearest. Rounding up with probability (x - down) / (up - down)
keeps it in expectation (arXiv 2010.06192, section 3), so that weights need 2 bytes instead of a
master copy's 4; the moments stay fp32, and so do the sums of gradients over several micro-batches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compress.train import parallel

# Of the peak: the usual end of a cosine schedule in distillation (Minitron, arXiv 2407.14679,
# table 9).
LR_FLOOR = 0.1
BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names
ADDED = "quant_"  # how names of what `quant/fake.py` adds to a module begin


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    warmup_steps: int,
    schedule: str = "cosine",
    decay_fraction: float = 0.2,
) -> float:
    """The schedules of the module's docstring, steps counted from 0."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))

    # Both go from 1 to 0; the floor below is added to what is chosen.
    wsd = min(1.0, (steps - step) / max(1, round(decay_fraction * steps)))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    share = cosine if schedule == "cosine" else wsd
    return peak * warm * (LR_FLOOR + (1 - LR_FLOOR) * share)


def stochastic_bf16(x: Tensor) -> Tensor:
    """fp32 to bf16, up or down at random so that the expectation is x; draws from torch's global
    generator.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW without weight decay on bf16 weights, sharded or not; fp32 moments under torch's own
    names, the step a plain number. What is fp32 among them (scales that are learned) stays so.
    """

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

                # Moments begin at zero, placed and sharded like the weight.
                state = self.state[p]
                if not state:
                    moments = {m: torch.zeros_like(p, dtype=torch.float32) for m in MOMENTS}
                    state |= {"step": 0.0, **moments}
                state["step"] += 1
                t = state["step"]

                # All that follows is of this rank's part.
                weight, gradient = parallel.local(p), parallel.local(p.grad).float()
                mean, square = (parallel.local(state[m]) for m in MOMENTS)
                mean.lerp_(gradient, 1 - b1)
                square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)

                # Both moments without their bias to zero, then up or down at random to bf16.
                root = (square / (1 - b2**t)).sqrt_().add_(eps)
                moved = weight.float().addcdiv_(mean, root, value=-lr / (1 - b1**t))
                if weight.dtype == torch.bfloat16:
                    weight.copy_(stochastic_bf16(moved))


def to_bf16(model: nn.Module) -> None:
    """Cast what a checkpoint holds, as loading in bf16 does; other buffers stay: bf16 rotary
    frequencies would be off by up to 0.4%. So do scales and what else fake quantization has added.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not name.rpartition(".")[2].startswith(ADDED):
            tensor.data = tensor.data.to(torch.bfloat16)
