"""Fewer experts a block: those that add least go, merged into others only where that is measured
to be closer.

Worth (REAP, arXiv 2510.13999). What expert e adds to a block's output for a token x is
g_e(x) f_e(x); over the tokens X_e that the router sends to it,

    S_e = 1/|X_e| sum over X_e of g_e(x) ||f_e(x)||_2

and the N of highest worth stay, with their rows of the router: among them it chooses as if logits
of the others were -inf. An expert that fewer than a floor of tokens reached has no mean to go by
and goes before all others.

Merging (M-SMoE, arXiv 2310.01334; REAM, arXiv 2604.04356, with REAP's experts as centres). An
expert that went is given to the one that stays whose router logits are most like its own, by their
cosine over tokens, less each token's mean, which no softmax sees: there most of its tokens go.
Channels of an FFN have no order, so its own are first put in the one in which both experts'
weights are nearest, an assignment problem; then

    theta_k <- sum a_e theta_e / sum a_e,    a_e = sum over X_e of g_e(x).

REAP proves that a merged expert can't be told apart by the router any more, and REAM measures
gains: so each block decides by the output of its FFN on every eighth row, which nothing else has
seen: nothing merged, or the most similar quarter, half, or all of what went. Left out: choosing
experts over all blocks together, since a config has one number for all; merging rows of the router.

Letters: B sequences, L tokens, N tokens, E experts, K kept ones, H hidden, F channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from compress.models.blocks import Row, row_of_block
from compress.models.experts import Mixture, below, ffn_path, mixture_of
from compress.models.walk import Walk
from compress.prune.shape import HELD_OUT

SHARES = (0.25, 0.5, 1.0)  # of the experts that went, merged for a trial


class ExpertCut(NamedTuple):
    """What was done to one block: of each expert the tokens that reached it and its worth, which
    stay, which were merged into which, and the error of the FFN's output on held-out rows, as a
    fraction of its square, without merging and as it now is.
    """

    block: int
    tokens_E: Tensor
    worth_E: Tensor
    kept: list[int]
    merged: dict[int, int]
    error_dropped: float
    error: float


class Census:
    """What calibration text tells of a mixture's experts; every eighth row is held out."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.rows = 0
        self.held_out: list[Tensor] = []  # (B, L, H) in front of the FFN
        experts = mixture.size
        self.tokens_E = torch.zeros(experts, dtype=torch.long)
        self.gates_E = torch.zeros(experts, dtype=torch.float64)
        self.added_E = torch.zeros(experts, dtype=torch.float64)  # sum of g ||f||
        self.like_EE = torch.zeros(experts, experts, dtype=torch.float64)

    def add(self, x_BLH: Tensor) -> None:
        """Count what the FFN receives."""
        number_B = self.rows + torch.arange(len(x_BLH), device=x_BLH.device)
        self.rows += len(x_BLH)
        counts_B = number_B % HELD_OUT > 0
        if not counts_B.all():
            self.held_out.append(x_BLH[~counts_B])
        if counts_B.any():
            self._count(x_BLH[counts_B].flatten(0, 1))

    def _count(self, x_NH: Tensor) -> None:
        routed = self.mixture.routed(x_NH)
        for expert in range(self.mixture.size):
            tokens, gates_N = routed.of(expert)
            if len(tokens):
                size_N = self.mixture.output(expert, x_NH[tokens]).double().norm(dim=-1)
                self.tokens_E[expert] += len(tokens)
                self.gates_E[expert] += gates_N.double().sum().cpu()
                self.added_E[expert] += (gates_N.double() * size_N).sum().cpu()

        logits_NE = routed.logits_NE.double()
        logits_NE = logits_NE - logits_NE.mean(-1, keepdim=True)
        self.like_EE += (logits_NE.T @ logits_NE).cpu()

    @property
    def worth_E(self) -> Tensor:
        """S of each expert, 0 where no token came."""
        return self.added_E / self.tokens_E.clamp(min=1)

    def likeness(self) -> Tensor:
        """Cosine of the experts' logits (E, E)."""
        size_E = self.like_EE.diagonal().sqrt().clamp(min=1e-30)
        return self.like_EE / size_E / size_E[:, None]


class Target(NamedTuple):
    """Experts that stay in each block, how many of them see a token, the tokens an expert must have
    been reached by, and whether those that go may be merged.
    """

    keep: int
    top_k: int
    floor_tokens: int
    merge: bool


def cut_experts(walk: Walk, row: Row, target: Target) -> list[ExpertCut]:
    """Cut every mixture in place as the text stands in front of its block. ValueError naming a
    block where the text reached fewer experts than are to stay.
    """
    cuts = []
    walk.task = "cut"
    for index, block in enumerate(walk.blocks):
        here = row_of_block(row, block)
        mixture = mixture_of(here, block)
        if mixture is not None:
            census = Census(mixture)
            top_k_before = mixture.router.top_k
            mixture.router.top_k = target.top_k
            walk.inputs(index, {ffn_path(here): census.add})
            with walk.arithmetic():
                cuts.append(_cut(index, census, target, top_k_before))
        walk.advance(index)
    if not cuts:
        raise ValueError(
            "no block of the model has experts: nothing to cut; leave prune_experts out"
        )
    return cuts


@torch.no_grad()
def _cut(index: int, census: Census, target: Target, top_k_before: int) -> ExpertCut:
    """Cut one mixture by its census, and merge where that is closer."""
    mixture = census.mixture
    kept = chosen(index, census, target)
    gone = [expert for expert in range(mixture.size) if expert not in set(kept)]

    # What it gave to held-out rows, and gives without those that go.
    x_BLH = torch.cat(census.held_out)
    mixture.router.top_k = top_k_before
    before_BLH = mixture(x_BLH)
    mixture.router.top_k = target.top_k
    makers, downs, router_EH = mixture.makers, mixture.downs, mixture.router.weight
    mixture.put(makers[kept], downs[kept], router_EH[kept])
    error_dropped = error = _error(mixture(x_BLH), before_BLH)

    # The most similar of them merged: more and more, and the closest is kept.
    best: dict[int, int] = {}
    pairs = likest(census, kept, gone) if target.merge else []
    for count in sorted({math.ceil(share * len(pairs)) for share in SHARES} - {0}):
        into = dict(pairs[:count])
        present = mixture.makers, mixture.downs
        mixture.put(*merged(makers, downs, census.gates_E, kept, into), router_EH[kept])
        error_merged = _error(mixture(x_BLH), before_BLH)
        if error_merged < error:
            error, best = error_merged, into
        else:
            mixture.put(*present, router_EH[kept])
    return ExpertCut(index, census.tokens_E, census.worth_E, kept, best, error_dropped, error)


def _error(out_BLH: Tensor, before_BLH: Tensor) -> float:
    """Squared error as a fraction of the square."""
    power = before_BLH.double().square().sum().clamp(min=1e-30)
    return float((out_BLH.double() - before_BLH.double()).square().sum() / power)


def chosen(index: int, census: Census, target: Target) -> list[int]:
    """The experts that stay, ascending. ValueError where the text reached too few."""
    experts = census.mixture.size
    if target.keep == experts:
        return list(range(experts))

    # Those that too few tokens reached can't be weighed.
    rare = below(census.tokens_E, target.floor_tokens)
    if experts - len(rare) < target.keep:
        reached = f"{experts - len(rare)} of {experts} experts were reached by"
        raise ValueError(
            f"block {index}: {reached} {target.floor_tokens} tokens of the calibration text or"
            f" more, and prune_experts.experts={target.keep} are to stay: raise"
            " prune_experts.calibration_sequences, calibrate on text of more kinds, keep fewer"
            " experts, or lower prune_experts.floor_tokens"
        )
    worth_E = census.worth_E.clone()
    worth_E[list(rare)] = -1.0
    return sorted(worth_E.argsort(descending=True, stable=True)[: target.keep].tolist())


def likest(census: Census, kept: list[int], gone: list[int]) -> list[tuple[int, int]]:
    """Each expert that went and that any token reached, with the one that stays and is likest; the
    likest pair first.
    """
    likeness_EE = census.likeness()
    pairs = []
    for expert in gone:
        if census.tokens_E[expert]:
            best = int(likeness_EE[expert, kept].argmax())
            pairs.append((float(likeness_EE[expert, kept[best]]), expert, kept[best]))
    return [(expert, other) for _, expert, other in sorted(pairs, key=lambda pair: -pair[0])]


def merged(
    makers: Tensor, downs: Tensor, weight_E: Tensor, kept: list[int], into: dict[int, int]
) -> tuple[Tensor, Tensor]:
    """Tensors of the experts that stay, (K, 2 F, H) and (K, H, F), each the mean of itself and
    those that go `into` it.
    """
    makers_K, downs_K = makers[kept].clone(), downs[kept].clone()
    for place, expert in enumerate(kept):
        group = [other for other, centre in into.items() if centre == expert]
        if not group:
            continue

        # Sums over the group, each in the channels of the expert that stays.
        total = weight_E[[expert, *group]].sum()
        makers_K[place] *= weight_E[expert] / total
        downs_K[place] *= weight_E[expert] / total
        for other in group:
            order_F = matched(makers[expert], downs[expert], makers[other], downs[other])
            share = weight_E[other] / total
            rows = torch.cat([order_F, order_F + len(order_F)])
            makers_K[place] += share * makers[other][rows]
            downs_K[place] += share * downs[other][:, order_F]
    return makers_K, downs_K


def matched(maker: Tensor, down_HF: Tensor, other_maker: Tensor, other_down_HF: Tensor) -> Tensor:
    """Channels (F,) of another expert in the order in which all of its weights are nearest to this
    one's.
    """
    from scipy.optimize import linear_sum_assignment

    # Least squares apart is most alike: sums of squares are the same in every order.
    channels = down_HF.shape[1]
    with torch.autocast(maker.device.type, enabled=False):
        alike_FF = down_HF.float().T @ other_down_HF.float()
        for half in (slice(channels), slice(channels, None)):
            alike_FF += maker[half].float() @ other_maker[half].float().T
    _, order = linear_sum_assignment(alike_FF.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(maker.device)
