"""Removing columns of a linear layer so that the remaining ones make up for them. Pure torch, in
float64.

Group OBS (Optimal Brain Surgeon; structured as in ZipLM, arXiv 2302.04089, section 3). With X (N,
F) the inputs of a layer W (H, F) and G = X^T X, damped to A = G + damping * mean(diag G) * I,
removing the columns of a group g costs, in squared error of the output that the others can't make
up,

    cost_g = tr(W_g [A^-1_gg]^-1 W_g^T)
    then W <- W - W_g [A^-1_gg]^-1 A^-1_g:  and  A^-1 <- A^-1 - A^-1_:g [A^-1_gg]^-1 A^-1_g:

The cheapest group goes, all others are weighed again, and so on. A group is one FFN channel of a
down projection (there 16 go between two updates), a query head of an output projection, or all
query heads of one key-value head. What remains is the least-squares answer, pulled by the damping
towards the old weights: W A[:, keep] A[keep, keep]^-1, solved once at the end, free of drift. Left
out: interactions inside one block of removals, and undoing the errors of earlier layers, which
overfits (KL 1.82 against 1.44 on the embedded teacher's FFNs, 1536 -> 896).

Letters: N tokens, H outputs, F inputs (columns), M groups, G columns of a group, D columns going
together, K kept columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compress.prune.shape import HELD_OUT

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # tried where none is given


def damp(gram_FF: Tensor, damping: float) -> Tensor:
    """G + damping * mean(diag G) * I in float64. A dead layer (G = 0) becomes the identity, which
    can be solved.
    """
    damped_FF = gram_FF.to(torch.float64, copy=True)
    ridge = damping * damped_FF.diagonal().mean().item()
    damped_FF.diagonal().add_(ridge if ridge > 0 else 1.0)
    return damped_FF


def solved(matrix_FF: Tensor, right_FH: Tensor) -> Tensor:
    """X (F, H) of matrix X = right, of a symmetric positive definite matrix.

    By Cholesky: torch 2.13's LU fails on several threads, "Parameter 6 was incorrect on entry to
    DLASWP", where a batch of matrices meets a wide right side.
    """
    return torch.cholesky_solve(right_FH, torch.linalg.cholesky(matrix_FF))


class Remaining:
    """What remains of a layer while columns go: weights (H, F) that make up for them, and the
    inverse (F, F) of the damped Gram matrix. Columns that went are 0 in both.
    """

    def __init__(self, weight_HF: Tensor, gram_FF: Tensor, damping: float) -> None:
        damped_FF = damp(gram_FF, damping)
        self.weight_HF = weight_HF.to(torch.float64, copy=True)
        self.inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(damped_FF))

    def costs(self, groups_MG: Tensor) -> Tensor:
        """Squared output error (M,) of removing each group alone, the others compensating. None of
        their columns may have gone.
        """
        weight_MGH = self.weight_HF.T[groups_MG]
        if groups_MG.shape[1] == 1:
            return weight_MGH.square().sum((1, 2)) / self.inverse_FF.diagonal()[groups_MG[:, 0]]
        inverse_MGG = self.inverse_FF[groups_MG[:, :, None], groups_MG[:, None, :]]
        lower_MGG = torch.linalg.cholesky(inverse_MGG)
        whitened_MGH = torch.linalg.solve_triangular(lower_MGG, weight_MGH, upper=False)
        return whitened_MGH.square().sum((1, 2))

    def remove(self, columns_D: Tensor) -> None:
        """Bring weights and inverse up to date without those columns."""
        inverse_FF = self.inverse_FF
        across_DD = inverse_FF[columns_D][:, columns_D]
        solved_DF = solved(across_DD, inverse_FF[columns_D])
        self.weight_HF.addmm_(self.weight_HF[:, columns_D], solved_DF, alpha=-1)
        inverse_FF.addmm_(inverse_FF[:, columns_D], solved_DF, alpha=-1)

    def removed(
        self,
        groups_MG: Tensor,
        count: int,
        block: int = 1,
        may_go: Callable[[list[int]], Tensor] | None = None,
    ) -> list[int]:
        """The `count` groups that go, in the order in which they do; `block` of them between two
        updates.

        `may_go` says, given those that went, which groups (M,) bool are free to follow.
        """
        gone: list[int] = []
        while len(gone) < count:
            # Those that are still there and free to go.
            free_M = torch.ones(len(groups_MG), dtype=torch.bool)
            if may_go is not None:
                free_M &= may_go(gone)
            free_M[gone] = False
            free = free_M.nonzero().flatten().to(groups_MG.device)

            # The cheapest of them.
            order = self.costs(groups_MG[free]).argsort(stable=True)
            next_ones = free[order[: min(block, count - len(gone))]]
            self.remove(groups_MG[next_ones].flatten())
            gone += next_ones.tolist()
        return gone


def keep_channels(
    weight_HF: Tensor, gram_FF: Tensor, keep: int, damping: float, block: int = 16
) -> Tensor:
    """Indices (keep,), ascending, of the channels to keep; `block` channels go between two updates
    of the inverse.

    On the embedded teacher (1536 -> 896) blocks of 16 lose 0.1% more than one by one, in a sixth of
    the time.
    """
    channels_F = torch.arange(len(gram_FF), device=gram_FF.device)
    remaining = Remaining(weight_HF, gram_FF, damping)
    gone = remaining.removed(channels_F[:, None], len(gram_FF) - keep, block)

    stays_F = torch.ones_like(channels_F, dtype=torch.bool)
    stays_F[gone] = False
    return channels_F[stays_F]


def keep_heads(
    weight_HF: Tensor,
    gram_FF: Tensor,
    groups: tuple[int, int],
    keep: tuple[int, int],
    damping: float,
) -> Tensor:
    """Indices (K,), ascending, of the query heads to keep, of key-value heads times query heads a
    group as in `groups`, as many as in `keep`.

    Columns of an output projection are ordered by key-value head, query head, channel. Groups go
    first, then heads inside those that are left, every group as many.
    """
    kv_heads, share = groups
    keep_groups, keep_share = keep
    columns = torch.arange(len(gram_FF), device=gram_FF.device)
    remaining = Remaining(weight_HF, gram_FF, damping)

    # Whole groups.
    gone_groups = remaining.removed(columns.view(kv_heads, -1), kv_heads - keep_groups)
    group_of_M = torch.arange(kv_heads).repeat_interleave(share)
    stays_M = torch.ones(kv_heads * share, dtype=torch.bool)
    for group in gone_groups:
        stays_M[group_of_M == group] = False

    def in_turn(gone: list[int]) -> Tensor:
        went = torch.bincount(group_of_M[gone], minlength=kv_heads)
        return stays_M & (went < share - keep_share)[group_of_M]

    # Then heads of the groups that stay.
    gone = remaining.removed(
        columns.view(kv_heads * share, -1), keep_groups * (share - keep_share), may_go=in_turn
    )
    stays_M[gone] = False
    return stays_M.nonzero().flatten()


def reconstruct(weight_HF: Tensor, gram_FF: Tensor, keep_K: Tensor, damping: float) -> Tensor:
    """(H, K): the kept columns which come closest to the whole projection, min ||X W^T - X[:,
    keep] V^T||^2 + ridge.

    The ridge pulls towards the old columns, not towards zero. Result in the dtype of `weight_HF`.
    """
    rows_KF = damp(gram_FF, damping)[keep_K]
    solved_KH = solved(rows_KF[:, keep_K], rows_KF @ weight_HF.double().T)
    return solved_KH.T.to(weight_HF.dtype).contiguous()


def error_fraction(weight_HF: Tensor, gram_FF: Tensor, keep_K: Tensor, weight_HK: Tensor) -> float:
    """||X W^T - X[:, keep] V^T||^2 / ||X W^T||^2 on the calibration tokens: 0 nothing lost, 1 as
    bad as no output.
    """
    delta_HF = weight_HF.clone()
    delta_HF[:, keep_K] -= weight_HK
    total, lost = (((w @ gram_FF) * w).sum().item() for w in (weight_HF, delta_HF))
    return max(0.0, lost) / max(total, 1e-30)


class Inputs:
    """Second moments (F, F) in float64 of a layer's inputs: of the rows that it is fitted to, and
    of every HELD_OUT-th row, which chooses the damping.
    """

    def __init__(self) -> None:
        self.fit_FF = torch.zeros((), dtype=torch.float64)
        self.held_out_FF = torch.zeros((), dtype=torch.float64)
        self.rows = 0

    def add(self, x_BLF: Tensor) -> None:
        """Count rows of inputs (B, L, F)."""
        for x_LF in x_BLF.detach():
            self.rows += 1
            with torch.autocast(x_LF.device.type, enabled=False):
                gram_FF = (x_LF.float().T @ x_LF.float()).double()
            if self.rows % HELD_OUT:
                self.fit_FF = self.fit_FF + gram_FF
            else:
                self.held_out_FF = self.held_out_FF + gram_FF


class Cut(NamedTuple):
    """Columns (K,) that stay, their weights (H, K), the damping, and the share of the output on all
    rows that is lost.
    """

    keep_K: Tensor
    weight_HK: Tensor
    damping: float
    error: float


def cut_columns(
    weight_HF: Tensor,
    inputs: Inputs,
    choose: Callable[[Tensor, float], Tensor],
    damping: float | None,
) -> Cut:
    """The columns which `choose` keeps by second moments and damping, fitted.

    Without a damping the one of DAMPINGS whose fit loses least on held-out rows; then everything is
    done again with all rows.
    """

    def fitted(gram_FF: Tensor, chosen: float, judge_FF: Tensor) -> Cut:
        keep_K = choose(gram_FF, chosen)
        weight_HK = reconstruct(weight_HF, gram_FF, keep_K, chosen)
        error = error_fraction(weight_HF.double(), judge_FF, keep_K, weight_HK.double())
        return Cut(keep_K, weight_HK, chosen, error)

    if damping is None:
        assert inputs.held_out_FF.dim() == 2, "no row was held out"
        tried = [fitted(inputs.fit_FF, one, inputs.held_out_FF) for one in DAMPINGS]
        damping = min(tried, key=lambda cut: cut.error).damping
    whole_FF = inputs.fit_FF + inputs.held_out_FF
    return fitted(whole_FF, damping, whole_FF)
