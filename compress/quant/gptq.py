"""GPTQ: columns are rounded one after another, and what is left of the row makes up for the error.
Pure torch.

A row w of a linear layer meets inputs X (N, C); its output error is (w - q) G (w - q)^T with G =
X^T X. With U the upper Cholesky factor of the damped G's inverse, G^-1 = U^T U, rounding column j
to q_j costs, all later columns compensating,

    ((w_j - q_j) / U_jj)^2      and leaves      w_k <- w_k - (w_j - q_j) / U_jj * U_jk,   k > j

(arXiv 2210.17323, section 3 and algorithm 1: the same order for all rows, updates of later blocks
in one product). The scales of a block are chosen from its updated weights when it is reached: the
grid's own rounding, or its search weighted by the costs 1 / U_jj^2. Left out: act-order. Blocks of
32 neighbours share a scale that ships, so columns in another order would need scales chosen before
any error is known.

Letters: R rows, C columns, K columns of one block. Working arrays are transposed, so that a column
is contiguous.
"""

import torch
from torch import Tensor

from compress.prune.importance import damp
from compress.quant.grids import Grid
from compress.quant.grids.grid import inverse


def factor(gram_CC: Tensor, damping: float, name: str) -> Tensor:
    """fp32 (C, C): U above, computed in float64. ValueError when the damped Gram matrix is not
    positive definite.
    """
    lower_CC, failed = torch.linalg.cholesky_ex(damp(gram_CC, damping))
    upper_CC, again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_CC), upper=True)
    if failed.item() or again.item():
        raise ValueError(
            f"{name}: the second moments of its inputs have no Cholesky factor with"
            f" ptq.damping={damping:g}; use 0.01 or more"
        )
    return upper_CC.float()


def gptq(
    w_RC: Tensor,
    gram_CC: Tensor,
    grid: Grid,
    damping: float,
    search: bool = False,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Codes (R, C) and scales of `grid`; `gram_CC` sums x x^T over inputs, `damping` is relative
    to mean(diag G).
    """
    grid.check(w_RC, name)
    upper_CC = factor(gram_CC, damping, name)
    cost_C = upper_CC.diagonal() ** -2
    work_CR = w_RC.detach().float().T.contiguous()  # weights, as the rounded ones have moved them
    codes_CR = torch.empty_like(work_CR, dtype=grid.dtype)
    scales = []
    length = grid.length(len(work_CR))
    group = grid.group or length

    for start in range(0, len(work_CR), length):
        # Scales of the block as it now is.
        stop = start + length
        block_KR = work_CR[start:stop]
        now_RK = block_KR.T.contiguous()
        scales.append(
            grid.search(now_RK, cost_C[start:stop], name)
            if search
            else grid.encode(now_RK, name)[1]
        )
        step, floor = grid.levels(scales[-1])  # (R, groups, 1)

        # Column by column, the rest of the block making up for each.
        error_KR = torch.empty_like(block_KR)  # (w - q) / U_jj
        for j, w_R in enumerate(block_KR):
            s_R = step[:, j // group, 0]
            f_R = 0.0 if floor is None else floor[:, j // group, 0]
            q_R = grid.rounded((w_R - f_R) * inverse(s_R))
            codes_CR[start + j] = grid.stored_codes(q_R.clone())
            torch.sub(w_R, q_R.mul_(s_R).add_(f_R), out=error_KR[j]).div_(
                upper_CC[start + j, start + j]
            )
            block_KR[j + 1 :].addr_(
                upper_CC[start + j, start + j + 1 : stop], error_KR[j], alpha=-1
            )

        # All later blocks in one product.
        work_CR[stop:].addmm_(upper_CC[start:stop, stop:].T, error_KR, alpha=-1)

    return codes_CR.T.contiguous(), torch.cat(scales, dim=1)
