"""What distillation, LoRA and QAT feed to the training loop: batches of packed text, with a teacher's signal when there is one.

Legend: R rows (sequences), L positions, N = R * L tokens, K teacher ids a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.distill.losses import head_loss, hidden_mse
from compress.distill.signal import Signals
from compress.train.data import Packed
from compress.train.forward import hidden_and_head

Batch = dict[str, Tensor]


def make_batches(data: Packed, signals: Signals | None, *, seed: int, sequences: int, batch: int, micro: int) -> Callable[[int], list[Batch]]:
    """`batches(step)` -> micro-batches of inputs (R, L), labels (R, L), mask (R, L) and, with signals, the teacher's tensors."""

    def batches(step: int) -> list[Batch]:
        rows = data.rows(seed, step * batch, batch, sequences)
        return [_one(rows[i : i + micro]) for i in range(0, batch, micro)]

    def _one(rows: list[int]) -> Batch:
        ids, mask = data.ids[rows].long(), data.mask[rows]
        plain = {"inputs": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "mask": mask[:, 1:].contiguous()}
        return plain | (signals.read(rows) if signals else {})

    return batches


def make_loss(*, kl_weight: float, ce_weight: float, hidden_weight: float = 0.0) -> Callable[[Any, Batch], tuple[Tensor, Tensor]]:
    """`loss_fn(model, batch)` -> (loss sum in nats, labels counted)."""

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden_NH, weight_VH = hidden_and_head(model, batch["inputs"])
        mask_N = batch["mask"].flatten()
        signal: dict[str, Any] = {}
        if "ids" in batch:
            signal = {"ids_NK": batch["ids"].flatten(0, 1), "probs_NK": batch["probs"].flatten(0, 1), "entropy_N": batch["entropy"].flatten()}
        loss = head_loss(hidden_NH, weight_VH, batch["labels"].flatten(), mask_N, kl_weight=kl_weight, ce_weight=ce_weight, **signal)
        if hidden_weight:
            loss = loss + hidden_weight * hidden_mse(hidden_NH, batch["hidden"].flatten(0, 1), mask_N)
        return loss, torch.count_nonzero(mask_N)

    return loss_fn
