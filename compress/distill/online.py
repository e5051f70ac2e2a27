"""The teacher run at every step, and the student's own text.

On-policy distillation (`with_rollouts`): in a share of the steps the student learns on what it
writes itself (GKD, arXiv 2306.13649, algorithm 1). A row's first `prompt_tokens` are the prompt;
the student samples the rest at temperature 1 up to its EOS, and the teacher is asked what it would
have said there. Only those places are labels. Which steps are on-policy, and the samples, are
functions of (seed, step, weights), so that a resumed run writes the same. Divergences for it:
reverse_kl or jsd, which the paper finds better than forward KL there.

Legend: R rows (sequences), L positions, P prompt tokens, N = R * L tokens, H hidden.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from compress.distill.signals import Signals
from compress.distill.taps import tapped
from compress.models.checkpoint import best_device
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.empty import fill_head, places_of
from compress.models.head import Fold, Head, hidden_states
from compress.models.reading import read_in
from compress.train import parallel
from compress.train.packed import Packed
from compress.train.plan import Batch

Batches = Callable[[int, int], list[Batch]]  # (step, micro) -> this rank's micro-batches


class OnlineTeacher:
    """The teacher itself, run for every batch: exact, nothing on disk, and as slow as the teacher
    is large.

    `sharded` spreads its blocks over the processes (fsdp2); each keeps a whole head, which the loss
    needs chunk by chunk.
    """

    def __init__(
        self, model: Any, data: Packed, *, sharded: bool = False, fold: Fold | None = None
    ) -> None:
        """`fold`: where `data` is in the tokens of a smaller vocabulary. A `sharded` model may be
        empty, without a fold: its weights are then read in shards.
        """
        device = best_device()
        self.model = model
        self.data = data
        # Blocks whose states, and whose Q, K and V, `read` gives too, under "teacher/".
        self.taps: tuple[list[int], list[int]] = ([], [])
        use_cpu_kernels(self.model)
        places = places_of(model)
        if places:
            fill_head(model, device)
        parallel.to_device(self.model, device)

        # The loss needs the head whole; a copy of it stays outside of what is sharded.
        head = read_in(self.model, fold).detach()
        self.teacher_head: Head | None = (
            replace(head, weight_VH=head.weight_VH.clone()) if sharded else head
        )
        if sharded:
            parallel.shard(model.base_model, model, "as it is")
        if places:
            parallel.fill(self.model, places, device)

    @torch.no_grad()
    def read(self, rows: list[int]) -> Batch:
        """{"teacher_hidden": (N, H)} and what `taps` name, as "teacher/layer3" (R, L, H)."""
        with tapped(self.model, *self.taps) as seen:
            hidden_NH = hidden_states(
                self.model, **send_to_device(self.data.inputs(rows), self.model.device)
            )
        return {"teacher_hidden": hidden_NH} | {
            f"teacher/{name}": state for name, state in seen.items()
        }


# `read(rows)` gives tensors that `as_target` understands, `teacher_head` goes with hidden states.
TeacherSource = Signals | OnlineTeacher


def with_rollouts(
    batches: Batches,
    model: Any,
    teacher: OnlineTeacher,
    *,
    share: float,
    prompt_tokens: int,
    ends: list[int],
    seed: int,
    vocabulary: int | None = None,
) -> Batches:
    """`batches`, in a `share` of the steps with the student's own text behind each row's prompt,
    until one of `ends`.

    It writes the first `vocabulary` ids only: the rows behind them are padding.
    """
    rows = int(model.config.vocab_size)
    padding = list(range(min(rows, vocabulary or rows), rows)) or None

    def mixed(step: int, micro: int) -> list[Batch]:
        given = batches(step, micro)
        if random.Random(f"{seed} {step}").random() >= share:
            return given

        # What is drawn behind, as stochastic rounding, is to be the same on every rank.
        with torch.random.fork_rng():
            torch.manual_seed((seed * 1_000_003 + step) * 1009 + parallel.rank())
            return [
                _own_text(model, teacher, batch["inputs"], prompt_tokens, ends, padding)
                for batch in given
            ]

    return mixed


@torch.no_grad()
def _own_text(
    model: Any,
    teacher: OnlineTeacher,
    inputs_RL: Tensor,
    prompt_tokens: int,
    ends: list[int],
    padding: list[int] | None,
) -> Batch:
    """The batch of what the student writes behind the first tokens of each row: `inputs`, `labels`
    and `mask` (R, L), and the teacher's states (N, H) there.
    """
    length = inputs_RL.shape[1]
    device = next(model.parameters()).device
    prompt_RP = inputs_RL[:, :prompt_tokens].to(device)

    # Sampled from the student's distribution as it is.
    training = model.training
    model.eval()
    ids = model.generate(
        input_ids=prompt_RP,
        attention_mask=torch.ones_like(prompt_RP),
        max_new_tokens=length + 1 - prompt_tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        eos_token_id=ends,
        pad_token_id=ends[0],
        suppress_tokens=padding,
        use_cache=True,
    )
    model.train(training)

    # All rows may have ended early.
    ids = torch.nn.functional.pad(ids, (0, length + 1 - ids.shape[1]), value=ends[0])
    inputs_RL = ids[:, :-1]

    # Labels are the student's tokens, up to the EOS and with it.
    place_L = torch.arange(length, device=device)
    ended_RL = (
        torch.isin(inputs_RL, torch.tensor(ends, device=device)) & (place_L >= prompt_tokens)
    ).cumsum(-1) > 0
    mask_RL = (place_L >= prompt_tokens - 1) & ~ended_RL

    return {
        "inputs": inputs_RL,
        "labels": ids[:, 1:],
        "mask": mask_RL,
        "teacher_hidden": hidden_states(teacher.model, inputs_RL),
    }
