"""Rounding the experts of a mixture by calibration text: each by what the router sends to it.

A block gives sum over e of g_e(x) f_e(x), so an error dW of an expert's matrix, whose inputs are z,
costs the block ||g_e(x) dW z||^2 for each token that is sent there, and the second moments by which
GPTQ and AWQ weigh it are

    G_e = sum over X_e of g_e(x)^2 z z^T

which is MoEQuant's guidance by affinity (arXiv 2505.03804), taken from the error itself.
Few tokens may reach an expert, and rounding it by those is rounding it to them. Others therefore
let every expert see every token, or write text that reaches all alike (the same paper); the first
is wrong for experts that had enough, the second is other text than the user's. Here an expert is
filled up to a floor of tokens with what it has not seen: those that are lacking count as the mean
token of the block, at the mean gate,

    G_e <- G_e + max(0, floor - |X_e|) mean(g^2) / N sum over all N tokens of z z^T

so that one without any token is rounded by all of them, and one above the floor by its own alone.
The floor is FLOOR_A_COLUMN tokens for each of the C columns of its matrix unless a number is given:
fewer leave G_e near to singular, and GPTQ then makes up for errors along what few tokens happened
to have in common. On a random mixture (C = 64, int4_g32) whose experts saw 96 tokens each, the
block's error on other text was 0.030 by their own tokens alone, 0.029 filled up to 64, 0.019 up to
256, and 0.023 rounded without data.

Balance (`balance.py`) folds one factor a column into the norm in front of router, gates and ups,
chosen by the error of all experts together, and one a channel of each expert from its ups to its
down projection. The router is on no grid and takes its factor exactly. Memory: a moment of each
expert, E C^2 numbers in fp32 of one block at a time.

Letters: E experts, N tokens, C columns (inputs) of a matrix, R rows, F FFN channels, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.models.blocks import Row
from compress.models.experts import Mixture, below, ffn_path
from compress.models.walk import Walk
from compress.quant.balance import Group, best_scales, fold
from compress.quant.codes import Matrix
from compress.quant.grids import Grid
from compress.quant.settings import FLOOR_A_COLUMN


class ExpertInputs:
    """What the experts of a block receive: in front of gates and ups, or with `inner` in front of
    their down projections. `rare` are the experts that see every token besides.
    """

    def __init__(self, mixture: Mixture, *, inner: bool, rare: frozenset[int]) -> None:
        self.mixture = mixture
        self.inner = inner
        self.rare = rare
        columns = (mixture.downs if inner else mixture.makers).shape[-1]
        device = mixture.downs.device
        experts = mixture.size

        # Of the tokens that are sent to each: how many, their gates squared, moments and sizes.
        self.tokens_E = torch.zeros(experts, dtype=torch.long, device=device)
        self.gates = torch.zeros((), dtype=torch.float64, device=device)
        self.gram_ECC = torch.zeros(experts, columns, columns, device=device)
        self.total_EC = torch.zeros(experts, columns, device=device)

        # Of all tokens, those that gates and ups receive being the same for all experts.
        self.count = 0
        self.all_gram = {e: torch.zeros(columns, columns, device=device) for e in self._fillers}
        self.all_total = {e: torch.zeros(columns, device=device) for e in self._fillers}

    @property
    def _fillers(self) -> frozenset[int]:
        return self.rare if self.inner else frozenset({0})

    def add(self, x_BLH: Tensor) -> None:
        """Count what the FFN receives."""
        x_NH = x_BLH.detach().flatten(0, -2)
        routed = self.mixture.routed(x_NH)
        self.count += len(x_NH)
        for expert in range(self.mixture.size):
            tokens, gates_N = routed.of(expert)
            z_NC = self._received(expert, x_NH[tokens])
            self.tokens_E[expert] += len(tokens)
            self.gates += gates_N.double().square().sum()
            self.gram_ECC[expert] += _gram(z_NC * gates_N[:, None].float())
            self.total_EC[expert] += z_NC.abs().sum(0)

        for expert in self._fillers:
            z_NC = self._received(expert, x_NH)
            self.all_gram[expert] += _gram(z_NC)
            self.all_total[expert] += z_NC.abs().sum(0)

    def _received(self, expert: int, x_NH: Tensor) -> Tensor:
        return (self.mixture.inner(expert, x_NH) if self.inner else x_NH).float()

    def filled(self, floor_tokens: int) -> ExpertInputs:
        """Itself, with every expert filled up to so many tokens; once."""
        gate = float(self.gates / self.tokens_E.sum().clamp(min=1))
        for expert in self.rare:
            filler = expert if self.inner else 0
            lacking = (floor_tokens - int(self.tokens_E[expert])) / self.count
            self.gram_ECC[expert] += lacking * gate * self.all_gram[filler]
            self.total_EC[expert] += lacking * self.all_total[filler]
        return self


def _gram(z_NC: Tensor) -> Tensor:
    with torch.autocast(z_NC.device.type, enabled=False):
        return z_NC.T @ z_NC


class Tokens:
    """How many tokens are sent to each expert."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.tokens_E = torch.zeros(mixture.size, dtype=torch.long)

    def add(self, x_BLH: Tensor) -> None:
        """Count what the FFN receives."""
        chosen_NA = self.mixture.routed(x_BLH.flatten(0, -2)).chosen_NA
        self.tokens_E += torch.bincount(chosen_NA.flatten(), minlength=len(self.tokens_E)).cpu()


class Stacks:
    """The experts of one block on their way to a grid, behind what is rounded before them: text is
    sent to the FFN again for each thing that is asked, since weights change in between.
    """

    def __init__(
        self, walk: Walk, index: int, row: Row, mixture: Mixture, floor_tokens: int | None
    ) -> None:
        self.walk = walk
        self.index = index
        self.path = ffn_path(row)
        self.mixture = mixture
        self.floor_tokens = floor_tokens

        # How many tokens reach each expert, for good: nothing in front of the router changes.
        counted = Tokens(mixture)
        walk.inputs(index, {self.path: counted.add})
        self.tokens_E = counted.tokens_E

    def inputs(self, *, inner: bool) -> ExpertInputs:
        """What all experts receive now, filled up to the floor."""
        columns = (self.mixture.downs if inner else self.mixture.makers).shape[-1]
        floor = self.floor_tokens or FLOOR_A_COLUMN * columns
        received = ExpertInputs(
            self.mixture, inner=inner, rare=frozenset(below(self.tokens_E, floor))
        )
        self.walk.inputs(self.index, {self.path: received.add})
        return received.filled(floor)

    @torch.no_grad()
    def balance(self, norm: Any, grids: tuple[Grid, Grid], names: tuple[str, str]) -> None:
        """AWQ's factors, first in front of router, gates and ups, where a norm is there to take
        them, then between ups and downs; `grids` and `names` are those of the two tensors.
        """
        mixture = self.mixture
        if norm is not None:
            makers = Matrix(mixture.experts, mixture.makers_name)
            readers: dict[str, Any] = {"router": mixture.router, "makers": makers}
            received = self.inputs(inner=False)
            s_C = _common(mixture.makers, received, grids[0], names[0])
            fold(Group(readers, norm), s_C)

        received = self.inputs(inner=True)
        ups = slice(mixture.downs.shape[-1], None)
        for expert in range(mixture.size):
            down_HF = mixture.downs[expert]
            gram_FF, size_F = received.gram_ECC[expert], received.total_EC[expert]
            name = f"{names[1]}[{expert}]"
            s_F = best_scales(size_F, _Error(down_HF, gram_FF, grids[1], name))
            mixture.makers[expert, ups] /= s_F[:, None]
            down_HF *= s_F


class _Error:
    """Squared error, over tokens, of a matrix (R, C) rounded with factors, by second moments."""

    def __init__(self, w_RC: Tensor, gram_CC: Tensor, grid: Grid, name: str) -> None:
        self.w_RC = w_RC
        self.gram_CC = gram_CC
        self.grid = grid
        self.name = name

    def __call__(self, s_C: Tensor) -> float:
        gap_RC = self.grid.trial(self.w_RC * s_C, self.name).div_(s_C).sub_(self.w_RC)
        return float(((gap_RC @ self.gram_CC) * gap_RC).sum())


def _common(makers: Tensor, received: ExpertInputs, grid: Grid, name: str) -> Tensor:
    """(C,): one factor for all experts."""
    errors = [
        _Error(makers[e], received.gram_ECC[e], grid, f"{name}[{e}]") for e in range(len(makers))
    ]
    size_C = received.all_total[0]
    return best_scales(size_C, lambda s_C: sum(error(s_C) for error in errors))
