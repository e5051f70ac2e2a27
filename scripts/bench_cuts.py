"""What bench_prune.py puts between stages: blocks merged instead of dropped, cuts as others make
them, and training on later text.

Merging neighbours' weights is what a plain config can say of several blocks as one:

    mean    (theta_i + theta_i+1) / 2, of two, as layers are merged on a manifold (MKA, arXiv
            2406.16330, with equal weights and without the manifold, which only chooses)
    laco    theta_i + sum_k (theta_i+k - theta_i), k = 1..m (LaCo, arXiv 2402.11187, section 3.1)

For two blocks the second is theta_i+1, whatever theta_i: the first is dropped. So three become one
here, and one is dropped where the number is odd. Places are chosen one after the other by the KL
of calibration text to the parent, which the paper does by the cosine of the last states.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.models.blocks import named
from compress.models.checkpoint import load_model, read_config, save_model
from compress.models.head import head_of
from compress.models.walk import Walk
from compress.prune.folding import fold_run
from compress.score.fidelity import States, closeness
from compress.stages.context import Context
from compress.stages.distill import Distill
from compress.stages.prune_depth import PruneDepth, cut_blocks
from compress.stages.prune_vocab import PruneVocab
from compress.stages.prune_width import PruneWidth

Weights = dict[str, Tensor]
Chain = tuple[Any, ...]  # stages, or what runs as they do
WEIGHED_ROWS, FOLD_ROWS = 4, 12
FITTED_ROWS = 32  # that a cut is fitted to
CHOICE_ROWS, CHOICE_TOKENS = 2, 192
CHOICE_STRIDE = 3  # one position of so many is compared


def merged(way: str, weights: list[Weights]) -> Weights:
    """One block's weights of several neighbours'."""
    first, *others = weights
    if way == "mean":
        return {key: torch.stack([each[key] for each in weights]).mean(0) for key in first}
    return {key: first[key] + sum(each[key] - first[key] for each in others) for key in first}


@dataclass
class Group:
    """Blocks of the parent that are one block now, the first of them, and its weights."""

    members: list[int]
    weights: Weights


@dataclass(frozen=True)
class Merged:
    """`blocks` fewer by merging, the down projection of what was merged then fitted to the stream
    behind it where `fold`.
    """

    way: str
    blocks: int
    fold: bool = False

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the shallower checkpoint."""
        groups = self.groups(parent, ctx)
        model: Any = load_model(parent)
        walk = Walk(model, ctx.calibration(FOLD_ROWS if self.fold else 1), precision=ctx.precision)
        dense, row = walk.branch(), named(read_config(parent))
        assert row is not None

        # The parent passes the blocks of a group before they become one.
        for group in groups:
            front, *others = group.members
            if self.fold:
                for index in group.members:
                    dense.advance(index)
            walk.blocks[front].load_state_dict(group.weights)
            if self.fold and others:
                fold_run(walk, dense, row, front, others)
            elif self.fold:
                walk.advance(front)

        cut_blocks(model, {index for group in groups for index in group.members[1:]})
        save_model(model, out, parent)
        return {}

    def groups(self, parent: Path, ctx: Context) -> list[Group]:
        """All blocks of the parent, merged."""
        key = (parent, self.way)
        if key not in CHOSEN:
            ids_BL = ctx.calibration(CHOICE_ROWS)[:, :CHOICE_TOKENS]
            CHOSEN[key] = Choice(load_model(parent), ids_BL, ctx)
        arity = 2 if self.way == "mean" else 3
        return CHOSEN[key].groups(self.way, arity, self.blocks)


class Choice:
    """Where to merge, one merge after the other; what fewer blocks need is chosen once."""

    def __init__(self, model: Any, ids_BL: Tensor, ctx: Context) -> None:
        self.model, self.ctx = model, ctx
        self.walk = Walk(model, ids_BL, precision=ctx.precision)
        start = self.walk.branch()
        for index in range(len(start.blocks)):
            start.advance(index)
        self.reference = self.view(start)
        each = enumerate(self.walk.blocks)
        self.odd: dict[int, list[Group]] = {}
        self.steps = [[Group([index], copy.deepcopy(one.state_dict())) for index, one in each]]

    def view(self, walk: Walk) -> States:
        """Last states (N, H), at every CHOICE_STRIDE-th position."""
        return States(walk.final_states()[::CHOICE_STRIDE], head_of(self.model))

    def groups(self, way: str, arity: int, blocks: int) -> list[Group]:
        """The blocks after so many have gone."""
        total = len(self.walk.blocks)
        while total - len(self.steps[-1]) + arity - 1 <= blocks:
            self.steps.append(self.merged_once(way, arity, self.steps[-1]))
        best = next(step for step in reversed(self.steps) if total - len(step) <= blocks)
        if total - len(best) < blocks and blocks not in self.odd:
            self.odd[blocks] = self.merged_once(way, 2, best)
        return self.odd.get(blocks, best)

    def merged_once(self, way: str, arity: int, groups: list[Group]) -> list[Group]:
        """The groups with those neighbours merged that cost least; neither first nor last."""
        costs = {}
        walk = self.walk.branch()
        for at, group in enumerate(groups):
            if 1 <= at < len(groups) - arity:
                costs[at] = self.cost(walk, self.joined(way, groups, at, arity), at)
            self.place(group)
            walk.advance(group.members[0])
        best = min(costs, key=costs.__getitem__)
        self.ctx.log(f"{way}: {len(groups)} blocks, merged at {best}, KL {costs[best]:.4f}")
        return self.joined(way, groups, best, arity)

    def joined(self, way: str, groups: list[Group], at: int, arity: int) -> list[Group]:
        """The groups with those from `at` as one."""
        parts = groups[at : at + arity]
        members = [index for part in parts for index in part.members]
        one = Group(members, merged(way, [part.weights for part in parts]))
        return [*groups[:at], one, *groups[at + arity :]]

    def cost(self, walk: Walk, groups: list[Group], at: int) -> float:
        """KL to the parent of what stands in front of block `at` after the groups from there."""
        trial = walk.branch()
        for group in groups[at:]:
            self.place(group)
            trial.advance(group.members[0])
        return float(closeness(self.reference, self.view(trial))["kl"])

    def place(self, group: Group) -> None:
        """A group's weights into the first of its blocks."""
        self.walk.blocks[group.members[0]].load_state_dict(group.weights)


CHOSEN: dict[tuple[Path, str], Choice] = {}  # by parent and way


@dataclass(frozen=True)
class Later:
    """A stage on the text behind the first `rows` rows."""

    stage: Distill
    rows: int

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write what the stage makes of it."""
        text, behind = ctx.text(), slice(self.rows, None)
        later = replace(
            text,
            ids=text.ids[behind],
            mask=text.mask[behind],
            digest=f"{text.digest}+{self.rows}" if self.rows else text.digest,
            first=None if text.first is None else text.first[behind],
        )
        return self.stage.run(parent, out, replace(ctx, text=lambda: later))


@dataclass(frozen=True)
class Peer:
    """FFN channels by a criterion that nothing makes up for, in one shot.

    `magnitude`: the L2 norm of a channel's weights in all three matrices (Torch-Pruning's example
    for language models); `activation`: the mean absolute input of the down projection (Minitron,
    arXiv 2407.14679, section 2.2); or `random`.
    """

    criterion: str
    ffn: int
    rows: int = 64

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the narrower checkpoint."""
        model: Any = load_model(parent)
        sums = self.sums(model, ctx) if self.criterion == "activation" else {}

        # The best channels stay as they are.
        for index, block in enumerate(model.model.layers):
            mlp = block.mlp
            keep = self.scores(mlp, sums.get(index)).topk(self.ffn).indices.sort().values
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight = torch.nn.Parameter(linear.weight.detach()[keep])
            mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach()[:, keep])
        model.config.intermediate_size = self.ffn
        save_model(model, out, parent)
        return {}

    def sums(self, model: Any, ctx: Context) -> dict[int, torch.Tensor]:
        """Of each block the summed absolute inputs (F,) of its down projection."""
        sums: dict[int, torch.Tensor] = {}
        walk = Walk(model, ctx.calibration(self.rows), precision=ctx.precision)
        for index in range(len(walk.blocks)):

            def add(x_BLF: torch.Tensor, index: int = index) -> None:
                sums[index] = sums.get(index, 0) + x_BLF.detach().abs().sum((0, 1))

            walk.inputs(index, {"mlp.down_proj": add})
            walk.advance(index)
        return sums

    def scores(self, mlp: Any, sum_F: torch.Tensor | None) -> torch.Tensor:
        """What each channel is worth."""
        if sum_F is not None:
            return sum_F
        down_HF = mlp.down_proj.weight.detach()
        if self.criterion == "random":
            return torch.rand(down_HF.shape[1], generator=torch.Generator().manual_seed(0))
        gate_FH, up_FH = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
        return (gate_FH.square() + up_FH.square() + down_HF.T.square()).sum(1).sqrt()


@dataclass(frozen=True)
class RandomBlocks:
    """Blocks that go by chance, neither the first nor the last."""

    blocks: int

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the shallower checkpoint."""
        model: Any = load_model(parent)
        inner = range(1, model.config.num_hidden_layers - 1)
        cut_blocks(model, set(random.Random(0).sample(inner, self.blocks)))
        save_model(model, out, parent)
        return {}


def depth(blocks: int, fold: bool = True) -> PruneDepth:
    """Blocks by influence."""
    return PruneDepth(blocks=blocks, fold=fold)


def dropped(blocks: int, fold: bool) -> PruneDepth:
    """Blocks by influence, weighed and folded on as few rows as merged ones."""
    rows = {"fold_sequences": FOLD_ROWS} if fold else {}
    return PruneDepth(blocks=blocks, fold=fold, calibration_sequences=WEIGHED_ROWS, **rows)


def quarter(blocks: int, ffn: int) -> Chain:
    """Tokens, blocks and channels, fitted to fewer rows than by default."""
    return (
        PruneVocab(ids=24576),
        PruneDepth(blocks=blocks, fold_sequences=FITTED_ROWS),
        PruneWidth(ffn=ffn, calibration_sequences=FITTED_ROWS),
    )


def healing(tokens: int, rate: float) -> Distill:
    """Distillation, a sequence a step, at a peak learning rate."""
    return Distill(
        tokens=tokens, lr=rate, batch_sequences=1, micro_batch_sequences=1, train_embeddings=False
    )
