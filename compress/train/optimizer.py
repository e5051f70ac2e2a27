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
master copy's 4; the moments stay fp32 unless less is asked for (`train/moments.py`), and so do the
sums of gradients over several micro-batches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compress.train import parallel
from compress.train.moments import (
    MOMENTS,
    empty_moments,
    read_moment,
    rows_at_once,
    write_moment,
)

# Of the peak: the usual end of a cosine schedule in distillation (Minitron, arXiv 2407.14679,
# table 9).
LR_FLOOR = 0.1
BETAS = (0.9, 0.95)
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
    """AdamW without weight decay on bf16 or fp32 weights, sharded or not; moments under torch's own
    names, kept as `moments` says (`train/moments.py`), the step a plain number. What is fp32
    beside bf16 weights (scales that are learned) stays so.
    """

    def __init__(
        self, parameters: list[torch.nn.Parameter], lr: float, moments: str = "fp32"
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": BETAS, "eps": 1e-8})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            (b1, b2), lr, eps = group["betas"], group["lr"], group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue

                # Moments begin at zero, sharded like the weight.
                state = self.state[p]
                if not state:
                    state |= {"step": 0.0, **empty_moments(p, self.moments)}
                state["step"] += 1
                t = state["step"]

                # This rank's part, so many rows at once.
                whole_weight, whole_gradient = parallel.local(p), parallel.local(p.grad)
                rows = rows_at_once(whole_weight)
                count = whole_weight.numel()
                first = 0
                for weight, part in zip(
                    _rows(whole_weight, rows), _rows(whole_gradient, rows), strict=True
                ):
                    gradient = part.float()
                    mean, square = (
                        read_moment(m, state[m], first, count, gradient) for m in MOMENTS
                    )
                    mean.lerp_(gradient, 1 - b1)
                    square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)

                    # Both moments without their bias to zero, then up or down at random to bf16.
                    root = (square / (1 - b2**t)).sqrt_().add_(eps)
                    moved = weight.float().addcdiv_(mean, root, value=-lr / (1 - b1**t))
                    is_short = weight.dtype == torch.bfloat16
                    weight.copy_(stochastic_bf16(moved) if is_short else moved)
                    for name, moment in zip(MOMENTS, (mean, square), strict=True):
                        write_moment(name, state[name], first, count, moment)
                    first += rows


def _rows(tensor: Tensor, rows: int) -> tuple[Tensor, ...]:
    return tensor.split(rows) if tensor.dim() else (tensor,)


def to_bf16(model: nn.Module) -> None:
    """Cast what a checkpoint holds, as loading in bf16 does; other buffers stay: bf16 rotary
    frequencies would be off by up to 0.4%. So do scales and what else fake quantization has added.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not name.rpartition(".")[2].startswith(ADDED):
            tensor.data = tensor.data.to(torch.bfloat16)
