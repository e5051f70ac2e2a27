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
from compress.models.blocks import tapped
from compress.models.checkpoint import head_dim

if TYPE_CHECKING:
    from compress.distill.settings import Features


PAIRS = 4  # of blocks whose states are compared, where features.pairs names none
Pairs = list[tuple[int, int]]


def layer_pairs(student: int, teacher: int, wanted: int) -> Pairs:
    """`wanted` evenly spaced student blocks, the last one included, with the teacher blocks at the
    same share of the depth.
    """
    chosen = sorted(
        {round((i + 1) * student / min(wanted, student)) - 1 for i in range(min(wanted, student))}
    )
    return [(s, round((s + 1) * teacher / student) - 1) for s in chosen]


def check_pairs(pairs: Sequence[Sequence[int]], student: int, teacher: int) -> Pairs:
    """The pairs as tuples. ValueError unless both numbers rise and exist."""
    made = [(int(pair[0]), int(pair[1])) for pair in pairs if len(pair) == 2]
    rising = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(made))
    if (
        len(made) != len(pairs)
        or not rising
        or not all(0 <= s < student and 0 <= t < teacher for s, t in made)
    ):
        wanted = (
            f"each is [student block, teacher block], both rising, below {student} and {teacher}"
        )
        raise ValueError(
            f"features.pairs={list(pairs)}: {wanted}; leave it empty for evenly spaced ones"
        )
    return made


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
        config, other = student.config, teacher.model.config
        width, wide, depths = (
            config.hidden_size,
            other.hidden_size,
            (config.num_hidden_layers, other.num_hidden_layers),
        )
        self.loss_fn, self.features, self.heads = (
            loss_fn,
            features,
            int(getattr(other, "num_key_value_heads", 1)),
        )
        self.pairs = (
            check_pairs(features.pairs, *depths) if features.pairs else layer_pairs(*depths, PAIRS)
        )
        if features.relations:
            columns = head_dim(config) * getattr(
                config, "num_key_value_heads", config.num_attention_heads
            )  # Q's is a multiple of it
            if columns % self.heads:
                raise ValueError(
                    f"features.relations needs K and V of a multiple of {self.heads} columns, the"
                    f" student's have {columns}; set it to 0"
                )
        projected = features.layers and width != wide
        self.projections = nn.ModuleList(
            nn.Linear(width, wide, bias=False) if projected else nn.Identity() for _ in self.pairs
        )
        generator = torch.Generator().manual_seed(seed)
        for weight in self.projections.parameters():
            nn.init.orthogonal_(weight, generator=generator)
        states = [t for _, t in self.pairs] if features.layers else []
        teacher.taps = states, [self.pairs[-1][1]] if features.relations else []

    def forward(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        weights, (last_s, last_t), mask_N = self.features, self.pairs[-1], batch["mask"].flatten()
        with tapped(
            model,
            [s for s, _ in self.pairs] if weights.layers else [],
            [last_s] if weights.relations else [],
        ) as seen:
            loss, count = self.loss_fn(model, batch)
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
        terms = [
            hidden_mse(
                projection(seen[f"layer{s}"]).flatten(0, 1),
                batch[f"teacher/layer{t}"].flatten(0, 1),
                mask_N,
            )
            for projection, (s, t) in zip(self.projections, self.pairs, strict=True)
        ]
        return torch.stack(terms).mean()
