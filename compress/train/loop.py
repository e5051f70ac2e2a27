"""The one training loop: distillation, LoRA and quantization-aware training all run through `train`.

Each step accumulates the gradient of a loss *sum* over its micro-batches, then divides once by the number of labels, clips to a
global norm and takes one fused AdamW step (arXiv 1711.05101) under a cosine schedule with linear warm-up (arXiv 1608.03983):

    lr(t) = lr * min(1, (t + 1) / warmup) * (floor + (1 - floor) * (1 + cos(pi t / steps)) / 2)

Master weights are fp32; with bf16 precision, accelerate runs forward passes under bf16 autocast. Ctrl-C and SIGTERM finish the
step, save the state and stop; after kill -9 at most SAVE_SECONDS of work is lost. Either way the same command goes on from
there and ends in the same bytes, because batches and seeds are pure functions of the step.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compress.errors import Interrupted
from compress.train.progress import Progress
from compress.train.state import load_state, save_state

Batch = dict[str, Tensor]
SAVE_SECONDS = 60.0
LR_FLOOR = 0.1  # of the peak: the usual end of a cosine schedule in distillation (Minitron, arXiv 2407.14679, table 9)
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Result:
    """What training says of itself: one row {"step", "loss", "lr", "grad_norm", "tokens_per_sec"} a step."""

    curve: list[dict[str, float]]


class LossModule(nn.Module):
    """A model and its loss as one module, so that autocast and data parallelism wrap the whole computation."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Batch], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.loss_fn(self.model, batch)


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """The schedule of the module's docstring."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return peak * warm * (LR_FLOOR + (1 - LR_FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))


@contextmanager
def _delayed_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of dying of it; a second one kills at once."""
    caught: list[int] = []
    old: dict[int, Any] = {}

    def catch(signum: int, frame: Any) -> None:
        caught.append(signum)
        for number, handler in old.items():
            signal.signal(number, handler)

    try:
        for caught_one in (signal.SIGINT, signal.SIGTERM):
            old[caught_one] = signal.signal(caught_one, catch)
    except ValueError:  # not the main thread: nothing to catch
        pass
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(model: nn.Module, loss_fn: Callable[[Any, Batch], tuple[Tensor, Tensor]], batches: Callable[[int], list[Batch]], *,
          steps: int, lr: float, warmup_fraction: float, grad_clip: float, seed: int, precision: str, work: Path,
          label: str, log: Callable[[str], None]) -> Result:  # fmt: skip
    """Train the parameters of `model` that require gradients, in place, resuming from `work` if it holds a state.

    `batches(step)` gives the micro-batches of a step; `loss_fn(model, batch)` a loss sum and its label count. `precision` is "bf16" or
    "fp32". FloatingPointError, naming step and tensor, when the loss or a gradient is not finite. Interrupted after a signal.
    """
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=not torch.cuda.is_available())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    module, optimizer = accelerator.prepare(LossModule(model, loss_fn), optimizer)
    plain, inner = accelerator.unwrap_model(module), getattr(optimizer, "optimizer", optimizer)
    state = load_state(work, plain, inner) or {"step": 0, "curve": []}
    if state["step"]:
        log(f"{label}: resuming at step {state['step']} of {steps}")
    module.train()
    warmup_steps, saved_at = round(warmup_fraction * steps), time.monotonic()
    with _delayed_signals() as caught, Progress(label, steps, state["step"], log) as progress:
        while state["step"] < steps:
            step, start = state["step"], time.monotonic()
            torch.manual_seed(seed * 1_000_003 + step)
            for group in inner.param_groups:
                group["lr"] = learning_rate(step, steps, lr, warmup_steps)
            loss, count, norm = _one_step(accelerator, module, optimizer, plain, parameters, batches(step), grad_clip, f"{label}, step {step}")
            rate = count / (time.monotonic() - start)
            row = {"step": step, "loss": loss, "lr": inner.param_groups[0]["lr"], "grad_norm": norm, "tokens_per_sec": rate}
            state = {"step": step + 1, "curve": [*state["curve"], row]}
            progress.update(step + 1, loss, rate)
            if caught or (time.monotonic() - saved_at > SAVE_SECONDS and step + 1 < steps):
                save_state(work, plain, inner, state)
                saved_at = time.monotonic()
            if caught:
                log(f"{label}: state saved after step {step + 1} of {steps}; repeat the command to go on")
                raise Interrupted(caught[0])
    model.eval()
    return Result(state["curve"])


def _one_step(accelerator: Accelerator, module: nn.Module, optimizer: Any, plain: nn.Module, parameters: list[nn.Parameter],
              batches: list[Batch], grad_clip: float, where: str) -> tuple[float, int, float]:  # fmt: skip
    """One optimizer step. Returns (mean loss, labels, gradient norm before clipping)."""
    total, count = 0.0, 0
    for batch in batches:
        loss_sum, labels = module({name: tensor.to(accelerator.device) for name, tensor in batch.items()})
        accelerator.backward(loss_sum)
        total += float(loss_sum.detach())
        count += int(labels)
    if count == 0:
        raise ValueError(f"{where}: the batch has no label to learn from; the answers are longer than data.seq_len or the data is empty")
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(grads)) / count
    if not math.isfinite(total) or not math.isfinite(norm):
        bad = next((n for n, p in plain.named_parameters() if p.grad is not None and not p.grad.isfinite().all()), "the loss")
        raise FloatingPointError(f"{where}: {bad} is not finite (loss {total / count}); lower the learning rate or use trainer.precision=fp32")
    torch._foreach_mul_(grads, min(1.0, grad_clip / (norm + 1e-6)) / count)  # the one division: from sums to means, and the clip
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / count, count, norm
