"""On-policy distillation: in a share of the steps the student learns on what it writes itself (GKD, arXiv 2306.13649, algorithm 1).

A row's first `prompt_tokens` are the prompt; the student samples the rest at temperature 1 up to its EOS, and the teacher is asked
what it would have said at each of those places. Only they are labels. Which steps are on-policy, and the samples, are functions of
(seed, step, weights), so that a resumed run writes the same. Divergences for it: reverse_kl or jsd, which the paper finds better than forward
KL on text the student chose.

Legend: R rows, L positions, P prompt tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.distill.steps import Batch, OnlineTeacher
from compress.train import parallel
from compress.train.forward import hidden_states


def with_rollouts(batches: Callable[[int, int], list[Batch]], model: Any, teacher: OnlineTeacher, *, share: float, prompt_tokens: int, eos: int,
                  seed: int) -> Callable[[int, int], list[Batch]]:  # fmt: skip
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
    labels_RL = ids[:, 1:].clone()
    ended_RL = ((ids[:, :-1] == eos) & (torch.arange(length, device=device) >= prompt_tokens)).cumsum(-1) > 0
    mask_RL = (torch.arange(length, device=device) >= prompt_tokens - 1) & ~ended_RL
    hidden_NH = hidden_states(teacher.model, ids[:, :-1])
    return {"inputs": ids[:, :-1], "labels": labels_RL, "mask": mask_RL, "teacher_hidden": hidden_NH}
