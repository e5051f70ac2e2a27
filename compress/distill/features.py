"""Learning from the teacher's inner states (`FeatureLoss`): layer by layer, and by attention
relations. Pairs (s, t) say that student block s should give what teacher block t gives; by default
t = round((s + 1) T / S) - 1 for S and T blocks.

    layers      mean over pairs of |u(W h_s) - u(h_t)|^2 / H, u scaling to unit RMS, W learned where
                the widths differ (arXiv 1909.10351, section 3)
    relations   at the last pair, KL(softmax(X_t X_t^T / sqrt(d)) || softmax(X_s X_s^T / sqrt(d))),
                mean over X = Q, K, V and over heads of d columns, which need not be attention's own
                heads; causal, so widths and head counts may differ (arXiv 2012.15828, section 3)

Legend: R rows (sequences), L positions, N = R * L tokens, H hidden, D width of Q, K or V, A
relation heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.distill.losses import hidden_mse
from compress.distill.online import OnlineTeacher
from compress.distill.taps import tapped
from compress.models.checkpoint import head_dim

if TYPE_CHECKING:
    from compress.distill.settings import Features


# Blocks whose states are compared where features.pairs names none.
PAIRS = 4
Pairs = list[tuple[int, int]]


def layer_pairs(student: int, teacher: int, count: int) -> Pairs:
    """`count` evenly spaced student blocks, the last one included, with the teacher blocks at the
    same share of the depth.
    """
    count = min(count, student)
    chosen = sorted({round((i + 1) * student / count) - 1 for i in range(count)})
    return [(s, round((s + 1) * teacher / student) - 1) for s in chosen]


def check_pairs(pairs: Sequence[Sequence[int]], student: int, teacher: int) -> Pairs:
    """The pairs as tuples. ValueError unless both numbers rise and exist."""
    checked = [(int(pair[0]), int(pair[1])) for pair in pairs if len(pair) == 2]
    all_pairs = len(checked) == len(pairs)
    rising = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(checked))
    existing = all(0 <= s < student and 0 <= t < teacher for s, t in checked)

    if not (all_pairs and rising and existing):
        rule = f"each is [student block, teacher block], both rising, below {student} and {teacher}"
        raise ValueError(
            f"features.pairs={list(pairs)}: {rule}; leave it empty for evenly spaced ones"
        )
    return checked


def relation_kl(student_RLD: Tensor, teacher_RLD: Tensor, mask_N: Tensor, heads: int) -> Tensor:
    """Sum over masked tokens of the mean over `heads` of KL(teacher || student) between relations
    to the positions so far, in nats.
    """

    def relations(x_RLD: Tensor) -> Tensor:
        x_RALd = (
            x_RLD.to(torch.promote_types(x_RLD.dtype, torch.float32))
            .unflatten(-1, (heads, -1))
            .transpose(1, 2)
        )
        scores = x_RALd @ x_RALd.transpose(2, 3) * x_RALd.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        return scores.masked_fill(future, torch.finfo(scores.dtype).min).log_softmax(-1)

    with torch.autocast(student_RLD.device.type, enabled=False):
        log_p, log_q = relations(teacher_RLD), relations(student_RLD)
        return (torch.linalg.vecdot(log_p.exp(), log_p - log_q).mean(1).flatten() * mask_N).sum()


class FeatureLoss(nn.Module):
    """`loss_fn` plus the weighted terms; its projections train with the student and end with the
    stage.
    """

    def __init__(
        self, loss_fn: Any, student: Any, teacher: OnlineTeacher, features: Features, seed: int = 0
    ) -> None:
        """Sets the teacher's taps; `seed` is that of the projections. ValueError when the models
        allow no such term.
        """
        super().__init__()
        config = student.config
        teacher_config = teacher.model.config
        self.loss_fn = loss_fn
        self.features = features
        self.heads = int(getattr(teacher_config, "num_key_value_heads", 1))

        # Which block learns from which.
        depths = (config.num_hidden_layers, teacher_config.num_hidden_layers)
        self.pairs = (
            check_pairs(features.pairs, *depths) if features.pairs else layer_pairs(*depths, PAIRS)
        )

        # Columns of K and V, of which those of Q are a multiple, divide into relation heads.
        if features.relations:
            columns = head_dim(config) * getattr(
                config, "num_key_value_heads", config.num_attention_heads
            )
            if columns % self.heads:
                raise ValueError(
                    f"features.relations needs K and V of a multiple of {self.heads} columns, the"
                    f" student's have {columns}; set it to 0"
                )

        # A projection for each pair whose widths differ.
        width = config.hidden_size
        teacher_width = teacher_config.hidden_size
        projected = features.layers and width != teacher_width
        self.projections = nn.ModuleList(
            nn.Linear(width, teacher_width, bias=False) if projected else nn.Identity()
            for _ in self.pairs
        )
        generator = torch.Generator().manual_seed(seed)
        for weight in self.projections.parameters():
            nn.init.orthogonal_(weight, generator=generator)

        # What the teacher has to give besides its final states.
        states = [t for _, t in self.pairs] if features.layers else []
        relations = [self.pairs[-1][1]] if features.relations else []
        teacher.taps = states, relations

    def forward(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        weights = self.features
        last_s, last_t = self.pairs[-1]
        mask_N = batch["mask"].flatten()

        # One forward gives the loss on the head and the inner states.
        states = [s for s, _ in self.pairs] if weights.layers else []
        relations = [last_s] if weights.relations else []
        with tapped(model, states, relations) as seen:
            loss, count = self.loss_fn(model, batch)

        # The weighted terms on top.
        if weights.layers:
            loss = loss + weights.layers * self._distance(seen, batch, mask_N)
        if weights.relations:
            terms = [
                relation_kl(seen[f"{x}{last_s}"], batch[f"teacher/{x}{last_t}"], mask_N, self.heads)
                for x in "qkv"
            ]
            loss = loss + weights.relations * sum(terms) / 3
        return loss, count

    def _distance(
        self, seen: dict[str, Tensor], batch: dict[str, Tensor], mask_N: Tensor
    ) -> Tensor:
        """Mean over the pairs of `hidden_mse`, the student's states projected
        where widths differ.
        """
        terms = []
        for projection, (s, t) in zip(self.projections, self.pairs, strict=True):
            student_NH = projection(seen[f"layer{s}"]).flatten(0, 1)
            teacher_NH = batch[f"teacher/layer{t}"].flatten(0, 1)
            terms.append(hidden_mse(student_NH, teacher_NH, mask_N))

        return torch.stack(terms).mean()
