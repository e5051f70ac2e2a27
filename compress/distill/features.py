"""Learning from the teacher's inner states: hidden states layer by layer, attention relations, and block by block.

Pairs (s, t) say that student block s should give what teacher block t gives; by default t = round((s + 1) T / S) - 1 for S and T blocks.

    layers      mean over pairs of |u(W h_s) - u(h_t)|^2 / H, u scaling to unit RMS, W learned where the widths differ (arXiv 1909.10351, section 3)
    relations   at the last pair, KL(softmax(X_t X_t^T / sqrt(d)) || softmax(X_s X_s^T / sqrt(d))), mean over X = Q, K, V and over heads of d
                columns, which need not be attention's own heads; causal, so widths and head counts may differ (arXiv 2012.15828, section 3)
    blocks      instead of the whole loss: the blocks up to s, from the pair before on, take the teacher's states from the pair before as
                input and learn its states at t; no gradient crosses from one pair to the next, and no head is computed

Legend: R sequences, L positions, H hidden, D width of Q, K or V, A relation heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from compress.distill.losses import hidden_mse
from compress.train.forward import hidden_states

Pairs = list[tuple[int, int]]


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a causal language model. ValueError when it has no list of that many modules."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in base.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == base.config.num_hidden_layers:
            return module
    raise ValueError(f"{type(base).__name__} has no list of {base.config.num_hidden_layers} blocks: features can't be matched; set them to 0")


def layer_pairs(student: int, teacher: int, wanted: int) -> Pairs:
    """`wanted` evenly spaced student blocks, the last one included, with the teacher blocks at the same share of the depth."""
    chosen = sorted({round((i + 1) * student / min(wanted, student)) - 1 for i in range(min(wanted, student))})
    return [(s, round((s + 1) * teacher / student) - 1) for s in chosen]


def check_pairs(pairs: Sequence[Sequence[int]], student: int, teacher: int) -> Pairs:
    """The pairs as tuples. ValueError unless both numbers rise and exist."""
    made = [(int(pair[0]), int(pair[1])) for pair in pairs if len(pair) == 2]
    rising = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(made))
    if len(made) != len(pairs) or not rising or not all(0 <= s < student and 0 <= t < teacher for s, t in made):
        raise ValueError(
            f"features.pairs={list(pairs)}: each is [student block, teacher block], both rising, below {student} and {teacher};"
            " leave it empty for evenly spaced ones"
        )
    return made


@contextmanager
def tapped(model: Any, layers: Sequence[int], projections: Sequence[int] = (),
           inputs: dict[int, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """Collect, while `model` runs, outputs (R, L, H) of `layers` as "layer<i>", -1 being the embeddings, and Q, K, V of `projections` as "q<i>".

    `inputs`: what blocks get instead of their predecessor's output. ValueError when a block has no q_proj, k_proj, v_proj.
    """
    seen: dict[str, Tensor] = {}
    blocks = blocks_of(model)

    def keep(name: str) -> Any:
        return lambda module, arguments, out: seen.update({name: out[0] if isinstance(out, tuple) else out})

    with ExitStack() as hooks:
        for i in layers:
            if i < 0:
                hooks.enter_context(blocks[0].register_forward_pre_hook(lambda module, arguments: seen.update({"layer-1": arguments[0]})))
            else:
                hooks.enter_context(blocks[i].register_forward_hook(keep(f"layer{i}")))
        for i in projections:
            for name in "qkv":
                projection = getattr(getattr(blocks[i], "self_attn", None), f"{name}_proj", None)
                if projection is None:
                    raise ValueError(f"{type(blocks[i]).__name__} has no self_attn.{name}_proj: set features.relations=0")
                hooks.enter_context(projection.register_forward_hook(keep(f"{name}{i}")))
        for i, given in (inputs or {}).items():
            hooks.enter_context(blocks[i].register_forward_pre_hook(lambda module, arguments, given=given: (given, *arguments[1:])))
        yield seen


def relation_kl(student_RLD: Tensor, teacher_RLD: Tensor, mask_N: Tensor, heads: int) -> Tensor:
    """Sum over masked tokens of the mean over `heads` of KL(teacher || student) between relations to the positions so far, in nats."""

    def relations(x_RLD: Tensor) -> Tensor:
        x_RALd = x_RLD.to(torch.promote_types(x_RLD.dtype, torch.float32)).unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = x_RALd @ x_RALd.transpose(2, 3) * x_RALd.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        return scores.masked_fill(future, torch.finfo(scores.dtype).min).log_softmax(-1)

    with torch.autocast(student_RLD.device.type, enabled=False):
        log_p, log_q = relations(teacher_RLD), relations(student_RLD)
        return (torch.linalg.vecdot(log_p.exp(), log_p - log_q).mean(1).flatten() * mask_N).sum()


class FeatureLoss(nn.Module):
    """`loss_fn` plus the weighted terms, or with `blocks` that term alone; its projections train with the student and end with the stage."""

    def __init__(self, loss_fn: Any, student: Any, teacher: Any, pairs: Pairs, *, layers: float = 0.0, relations: float = 0.0,
                 blocks: float = 0.0, seed: int = 0) -> None:  # fmt: skip
        """`seed` is that of the projections. ValueError when the widths allow no such term."""
        super().__init__()
        self.loss_fn, self.pairs, self.weights = loss_fn, pairs, (layers, relations, blocks)
        config, width, wide = student.config, student.config.hidden_size, teacher.config.hidden_size
        if blocks and width != wide:
            raise ValueError(f"features.blocks={blocks} needs a student of the teacher's hidden size {wide}, got {width}; use features.layers")
        self.heads = int(getattr(teacher.config, "num_key_value_heads", 1))
        if relations:
            head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
            columns = head_dim * getattr(config, "num_key_value_heads", config.num_attention_heads)  # Q's is a multiple of it
            if columns % self.heads:
                raise ValueError(f"features.relations needs K and V of a multiple of {self.heads} columns, the student's have {columns}; set it to 0")
        self.projections = nn.ModuleList(nn.Linear(width, wide, bias=False) if width != wide and layers else nn.Identity() for _ in pairs)
        generator = torch.Generator().manual_seed(seed)
        for projection in self.projections:
            if isinstance(projection, nn.Linear):
                nn.init.orthogonal_(projection.weight, generator=generator)

    def taps(self) -> tuple[list[int], list[int]]:
        """The teacher's blocks whose states, and whose Q, K and V, `forward` needs in the batch, under "teacher/"."""
        return [-1, *(t for _, t in self.pairs)] if self.weights[0] or self.weights[2] else [], [self.pairs[-1][1]] if self.weights[1] else []

    def forward(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        layers, relations, blocks = self.weights
        (last_s, last_t), mask_N = self.pairs[-1], batch["mask"].flatten()
        if blocks:
            before = [(-1, -1), *self.pairs[:-1]]
            given = {s + 1: batch[f"teacher/layer{t}"].to(next(model.parameters()).dtype) for s, t in before}
            with tapped(model, [s for s, _ in self.pairs], inputs=given) as seen:
                hidden_states(model, batch["inputs"], batch.get("positions"))
            return blocks * self._distance(seen, batch, mask_N), torch.count_nonzero(mask_N)
        with tapped(model, [s for s, _ in self.pairs] if layers else [], [last_s] if relations else []) as seen:
            loss, count = self.loss_fn(model, batch)
        if layers:
            loss = loss + layers * self._distance(seen, batch, mask_N)
        if relations:
            terms = [relation_kl(seen[f"{x}{last_s}"], batch[f"teacher/{x}{last_t}"], mask_N, self.heads) for x in "qkv"]
            loss = loss + relations * sum(terms) / 3
        return loss, count

    def _distance(self, seen: dict[str, Tensor], batch: dict[str, Tensor], mask_N: Tensor) -> Tensor:
        """Mean over the pairs of `hidden_mse`, the student's states projected where widths differ."""
        terms = [
            hidden_mse(projection(seen[f"layer{s}"]).flatten(0, 1), batch[f"teacher/layer{t}"].flatten(0, 1), mask_N)
            for projection, (s, t) in zip(self.projections, self.pairs, strict=True)
        ]
        return torch.stack(terms).mean()
