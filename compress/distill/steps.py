"""What distillation, LoRA and QAT feed to the training loop: batches of packed text, with a teacher when there is one.

On-policy distillation (`with_rollouts`): in a share of the steps the student learns on what it writes itself (GKD, arXiv 2306.13649,
algorithm 1). A row's first `prompt_tokens` are the prompt; the student samples the rest at temperature 1 up to its EOS, and the teacher is
asked what it would have said there. Only those places are labels. Which steps are on-policy, and the samples, are functions of (seed, step,
weights), so that a resumed run writes the same. Divergences for it: reverse_kl or jsd, which the paper finds better than forward KL there.

Legend: R rows (sequences), L positions, P prompt tokens, N = R * L tokens, K teacher ids a token.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from compress.checkpoint import best_device, load_tokenizer, read_config, tokenizer_digest
from compress.distill.features import tapped
from compress.distill.losses import Mix, head_loss, hidden_mse
from compress.distill.signal import Signals, as_target
from compress.train import parallel
from compress.train.cpu import use_cpu_kernels
from compress.train.data import Packed
from compress.train.forward import Head, head_of, hidden_states
from compress.train.loop import Batch, LossFunction

Batches = Callable[[int, int], list[Batch]]  # (step, micro) -> this rank's micro-batches


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
            hidden_NH = hidden_states(self.model, **send_to_device(self.data.inputs(rows), self.model.device))
        return {"teacher_hidden": hidden_NH} | {f"teacher/{name}": state for name, state in seen.items()}


TeacherSource = Signals | OnlineTeacher  # `read(rows)` gives tensors that `as_target` understands, `teacher_head` goes with hidden states


def make_batches(data: Packed, source: TeacherSource | None, *, seed: int, sequences: int, batch: int) -> Batches:
    """Micro-batches of `Packed.batch` and, with a source, the teacher's tensors.

    Of the step's `batch` rows every rank takes its own; kept signals of the next step are fetched while this one computes.
    """

    def mine(step: int) -> list[int]:
        return data.rows(seed, step * batch, batch, sequences)[parallel.rank() :: parallel.world()]

    def batches(step: int, micro: int) -> list[Batch]:
        rows = mine(step)
        made = [one_batch(data, source, rows[i : i + micro]) for i in range(0, len(rows), micro)]
        if isinstance(source, Signals):  # the next batch's online teacher would compete with this batch's student
            source.prefetch(mine(step + 1))
        return made

    return batches


def one_batch(data: Packed, source: TeacherSource | None, rows: list[int]) -> Batch:
    """Rows as the loss takes them."""
    return data.batch(rows) | (source.read(rows) if source else {})


def with_rollouts(batches: Batches, model: Any, teacher: OnlineTeacher, *, share: float, prompt_tokens: int, eos: int, seed: int) -> Batches:
    """`batches`, in a `share` of the steps with the student's own text behind each row's prompt."""

    def mixed(step: int, micro: int) -> list[Batch]:
        made = batches(step, micro)
        if random.Random(f"{seed} {step}").random() >= share:
            return made
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + parallel.rank())
        return [_own_text(model, teacher, batch["inputs"], prompt_tokens, eos) for batch in made]

    return mixed


@torch.no_grad()
def _own_text(model: Any, teacher: OnlineTeacher, inputs_RL: Tensor, prompt_tokens: int, eos: int) -> Batch:
    length, device = inputs_RL.shape[1], next(model.parameters()).device
    prompt_RP = inputs_RL[:, :prompt_tokens].to(device)
    training, cached = model.training, model.config.use_cache
    model.eval()
    ids = model.generate(
        input_ids=prompt_RP, attention_mask=torch.ones_like(prompt_RP), max_new_tokens=length + 1 - prompt_tokens, do_sample=True, top_k=0,
        top_p=1.0, temperature=1.0, eos_token_id=eos, pad_token_id=eos, use_cache=True,
    )  # fmt: skip
    model.train(training)
    model.config.use_cache = cached
    ids = torch.nn.functional.pad(ids, (0, length + 1 - ids.shape[1]), value=eos)  # all rows may have ended early
    inputs_RL, place_L = ids[:, :-1], torch.arange(length, device=device)
    ended_RL = ((inputs_RL == eos) & (place_L >= prompt_tokens)).cumsum(-1) > 0
    mask_RL = (place_L >= prompt_tokens - 1) & ~ended_RL
    return {"inputs": inputs_RL, "labels": ids[:, 1:], "mask": mask_RL, "teacher_hidden": hidden_states(teacher.model, inputs_RL)}


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


def make_loss(mix: Mix, teacher_head: Head | None = None, hidden_weight: float = 0.0, vocabulary: int | None = None) -> LossFunction:
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
