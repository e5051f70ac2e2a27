"""What a training is asked to do, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Batch = dict[str, Tensor]
LossFunction = Callable[[Any, Batch], tuple[Tensor, Tensor]]


class Plan(NamedTuple):
    """How `train` optimizes; fields as in `stages/training.py` and `config.Trainer`."""

    steps: int
    lr: float
    micro: int = 4
    warmup_fraction: float = 0.0
    schedule: str = "cosine"
    decay_fraction: float = 0.2
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "fp32"  # or bf16, bf16_stochastic
    activation_checkpointing: bool = False
    moments: str = "fp32"  # or int8, host
    parallel: str = "none"  # or ddp, fsdp2
    validations: int = 0  # measurements over the stage, besides the first
    patience: int = 0  # measurements without a better one that end training; 0: never


class Result(NamedTuple):
    """What training says of itself."""

    # A row {"step", "loss", "lr", "grad_norm", "tokens_per_sec", "seconds"} a step.
    curve: list[dict[str, float]]
    # A row {"step", "tokens", "seconds", "validation_kl"} a measurement; all of the steps before
    # it.
    measured: list[dict[str, float]]
    outcome: dict[str, float]  # the best step and what it brought
