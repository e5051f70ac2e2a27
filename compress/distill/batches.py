"""What distillation, LoRA and QAT feed to the training loop: batches of packed text, with a
teacher when there is one.

Legend: R rows (sequences), L positions, N = R * L tokens, H hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.distill.fused_head import head_loss
from compress.distill.losses import Mix, hidden_mse
from compress.distill.online import Batches, TeacherSource
from compress.distill.signals import Signals, as_target
from compress.models.checkpoint import read_config
from compress.models.head import Head, head_of, hidden_states
from compress.models.reading import reading
from compress.models.tokenizer import load_tokenizer, token_count
from compress.train import parallel
from compress.train.packed import Packed
from compress.train.plan import Batch, LossFunction


def make_batches(
    data: Packed, source: TeacherSource | None, *, seed: int, sequences: int, batch: int
) -> Batches:
    """Micro-batches of this rank's part of a step's `batch` rows. Kept signals of the next step
    are fetched while this one computes; more of them than memory holds are read in windows.
    """
    windows = source.windows(sequences) if isinstance(source, Signals) else None

    def batches(step: int, micro: int) -> list[Batch]:
        rows, following = (
            data.rows(seed, s * batch, batch, sequences, windows)[
                parallel.rank() :: parallel.world()
            ]
            for s in (step, step + 1)
        )
        micro_batches = [
            one_batch(data, source, rows[i : i + micro]) for i in range(0, len(rows), micro)
        ]

        # Kept signals only: an online teacher's next batch would compete with this one's student.
        if isinstance(source, Signals):
            source.prefetch(following)
        return micro_batches

    return batches


def one_batch(data: Packed, source: TeacherSource | None, rows: list[int]) -> Batch:
    """Rows as the loss takes them: `Packed.batch` and, with a source, the teacher's tensors."""
    return data.batch(rows) | (source.read(rows) if source else {})


def common_vocabulary(student: Path, teacher: Path) -> int:
    """Rows of the student's head that the ids of its tokenizer need; heads may be padded, and
    padded differently, behind them.

    ValueError when the tokenizers differ, but for tokens cut out of the student's
    (`compress/models/reading.py`), or when a head has fewer rows than its tokenizer has ids.
    """
    reading(student, teacher)
    students, teachers = (token_count(load_tokenizer(path)) for path in (student, teacher))
    for path, ids in ((student, students), (teacher, teachers)):
        rows = int(read_config(path)["vocab_size"])
        if rows < ids:
            raise ValueError(
                f"{path} has a head of {rows} rows, its tokenizer has {ids} ids; it needs as many"
            )
    return students


def make_loss(
    mix: Mix, teacher_head: Head | None = None, vocabulary: int | None = None
) -> LossFunction:
    """`loss_fn(model, batch)` -> (loss sum in nats, labels counted).

    Of the teacher's head the rows behind the tokenizer's `vocabulary` ids take no part; the
    student's are padding, whose mass is held down.
    """

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden_NH = hidden_states(model, batch["inputs"], batch.get("positions"))
        mask_N = batch["mask"].flatten()

        # What the two heads share.
        head = head_of(model)
        rows = min(len(head.weight_VH), vocabulary or len(head.weight_VH))
        target = as_target(batch, teacher_head.first(rows) if teacher_head else None)

        # Where autograd's hooks must see the head's gradient, it can't be added in place.
        in_place = torch.is_grad_enabled() and parallel.world() == 1 and head.weight_VH.is_leaf
        into_VH = head.weight_VH.grad if in_place else None

        loss = head_loss(
            hidden_NH,
            head,
            batch["labels"].flatten(),
            mask_N,
            target,
            mix,
            into_VH=into_VH,
            shared=rows,
        )
        if mix.hidden_weight:
            loss = loss + mix.hidden_weight * hidden_mse(hidden_NH, batch["teacher_hidden"], mask_N)
        return loss, torch.count_nonzero(mask_N)

    return loss_fn
