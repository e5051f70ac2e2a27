"""What distillation, LoRA and QAT feed to the training loop: batches of packed text, with a teacher when there is one.

Legend: R rows (sequences), L positions, N = R * L tokens, K teacher ids a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.checkpoint import best_device, load_tokenizer, read_config, tokenizer_digest
from compress.distill.features import tapped
from compress.distill.losses import Mix, head_loss, hidden_mse
from compress.distill.schemes import as_target
from compress.train import parallel
from compress.train.cpu import use_cpu_kernels
from compress.train.data import Packed
from compress.train.forward import Head, head_of, hidden_states, to_device

Batch = dict[str, Tensor]


class TeacherSource(Protocol):
    """Where a batch's teacher comes from: kept signals, or the teacher itself."""

    @property
    def teacher_head(self) -> Head | None:
        """The head for hidden states; None when the batch needs none."""

    def read(self, rows: list[int]) -> Batch:
        """Tensors of these rows that `schemes.as_target` understands."""

    def prefetch(self, rows: list[int]) -> None:
        """Start fetching what `read` will need."""


class OnlineTeacher:
    """The teacher itself, run for every batch: exact, nothing on disk, and as slow as the teacher is large.

    `sharded` spreads its blocks over the processes (fsdp2); each keeps a whole head, which the loss needs chunk by chunk.
    """

    def __init__(self, model: Any, data: Packed, *, sharded: bool = False) -> None:
        self.model, self.data = model.to(best_device()), data
        self.taps: tuple[list[int], list[int]] = ([], [])  # blocks whose states, and whose Q, K and V, `read` gives too
        use_cpu_kernels(self.model)
        head = head_of(model).detach()
        self.teacher_head: Head | None = replace(head, weight_VH=head.weight_VH.clone()) if sharded else head
        if sharded:
            parallel.shard(model.base_model, model, "as it is")

    @torch.no_grad()
    def read(self, rows: list[int]) -> Batch:
        """{"teacher_hidden": (N, H)} and what `taps` name, as "teacher/layer3" (R, L, H)."""
        with tapped(self.model, *self.taps) as seen:
            hidden_NH = hidden_states(self.model, **to_device(self.data.inputs(rows), self.model.device))
        return {"teacher_hidden": hidden_NH} | {f"teacher/{name}": state for name, state in seen.items()}

    def prefetch(self, rows: list[int]) -> None:
        """Nothing: the next batch's teacher would compete with this batch's student."""


def make_batches(data: Packed, source: TeacherSource | None, *, seed: int, sequences: int, batch: int) -> Callable[[int, int], list[Batch]]:
    """`batches(step, micro)` -> this rank's micro-batches of `Packed.batch` and, with a source, the teacher's tensors.

    Of the step's `batch` rows every rank takes its own; kept signals of the next step are fetched while this one computes.
    """

    def mine(step: int) -> list[int]:
        return data.rows(seed, step * batch, batch, sequences)[parallel.rank() :: parallel.world()]

    def batches(step: int, micro: int) -> list[Batch]:
        rows = mine(step)
        made = [one_batch(data, source, rows[i : i + micro]) for i in range(0, len(rows), micro)]
        if source is not None:
            source.prefetch(mine(step + 1))
        return made

    return batches


def one_batch(data: Packed, source: TeacherSource | None, rows: list[int]) -> Batch:
    """Rows as the loss takes them."""
    return data.batch(rows) | (source.read(rows) if source else {})


def common_vocabulary(student: Path, teacher: Path) -> int:
    """Ids of the tokenizer that both models share; heads may be padded, and padded differently, behind them.

    ValueError when the tokenizers differ, or when a head has fewer rows than the tokenizer has ids.
    """
    sizes = [int(read_config(path)["vocab_size"]) for path in (student, teacher)]
    ids = len(load_tokenizer(teacher))
    if tokenizer_digest(student) != tokenizer_digest(teacher) and load_tokenizer(student).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise ValueError(f"{student} and {teacher} have different tokenizers; distillation compares probabilities of the same ids")
    if min(sizes) < ids:
        raise ValueError(f"{student} and {teacher} have heads of {sizes[0]} and {sizes[1]} rows, their tokenizer has {ids} ids; both need as many")
    return ids


def make_loss(
    mix: Mix, teacher_head: Head | None = None, hidden_weight: float = 0.0, vocabulary: int | None = None
) -> Callable[[Any, Batch], tuple[Tensor, Tensor]]:
    """`loss_fn(model, batch)` -> (loss sum in nats, labels counted).

    `vocabulary`: ids of the tokenizer; rows of either head behind them are padding and take no part.
    """

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden_NH, mask_N = hidden_states(model, batch["inputs"], batch.get("positions")), batch["mask"].flatten()
        head = head_of(model)
        rows = min(len(head.weight_VH), vocabulary or len(head.weight_VH))
        head, target = head.first(rows), as_target(batch, teacher_head.first(rows) if teacher_head else None)
        whole = torch.is_grad_enabled() and parallel.world() == 1 and head.weight_VH.is_leaf  # elsewhere autograd's hooks must see the gradient
        loss = head_loss(hidden_NH, head, batch["labels"].flatten(), mask_N, target, mix, into_VH=head.weight_VH.grad if whole else None)
        if hidden_weight:
            loss = loss + hidden_weight * hidden_mse(hidden_NH, batch["teacher_hidden"], mask_N)
        return loss, torch.count_nonzero(mask_N)

    return loss_fn
