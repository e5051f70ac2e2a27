"""Balance: one factor a channel moves between what a group of linear layers multiplies and what
made it; logits stay what they are.

Whoever makes channel j of the inputs X divides by s_j, whoever reads it multiplies column j of W by
s_j. It is exact where nothing non-linear lies between: a norm's weight before q, k, v and before
gate, up; v's rows before o (attention only averages values; heads that share a v share its
factors); up's rows before down (gate * up). Where none of these made X, as behind a gelu, a group
is rounded as it is. Rows keep no trace of it on a grid with a scale in every row, columns do:

    AWQ  s = mean|X|^a, a from 0 to 1 by the least output error of the rounded group
         (arXiv 2306.00978, section 3.2, eq. 4, 5)

The error comes from the inputs' Gram matrix, tr((Q(W s) / s - W) G (...)^T), which is the error
summed over tokens. Left out: AWQ's clipping, which a search of scales does on the grid itself.

Letters: C channels of the inputs, R rows, N tokens, K channels of the maker.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.blocks import Part, Row, inputs_of, outputs_of, qkv_of
from compress.quant.grids import Grid

STEPS = 20  # exponents tried, as in AWQ's own code


class Inputs:
    """What is kept of a group's inputs on calibration text: the sum of x x^T (C, C) and of |x|
    (C,).
    """

    def __init__(self) -> None:
        self.gram_CC = self.total_C = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Count inputs (..., C)."""
        x_NC = x.detach().flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            self.gram_CC = self.gram_CC + x_NC.T @ x_NC
        self.total_C = self.total_C + x_NC.abs().sum(0)


@dataclass
class Group:
    """Linear layers that read the same inputs, by name below their block, and the module that
    makes those inputs.
    """

    readers: dict[str, nn.Linear]
    maker: Any  # None: nothing that a factor could be taken out of
    repeats: int = 1  # readers' channels for each of the maker's: heads that share a value head
    width: int = 1  # channels of one head, where `repeats` is more than 1
    rows_K: Tensor | None = None  # of a maker that makes other things too

    def matrix(self) -> Tensor:
        """All readers' weights, stacked (R, C)."""
        return torch.cat([reader.weight.detach() for reader in self.readers.values()])


def groups_of(row: Row, block: Any, width: int) -> list[Group]:
    """The four groups of a decoder block with heads of this width, in the order in which text
    reaches them; of a mixture the first two, its experts being no linear layers
    (`compress/quant/experts.py`).
    """

    def named(*names: str) -> dict[str, nn.Linear]:
        return {name: block.get_submodule(name) for name in names}

    def norm(name: str) -> Any:
        return block.get_submodule(name) if name else None

    # Heads that share a value head share its factors.
    value = qkv_of(row, block, width)[2]
    repeats = inputs_of(block.get_submodule(row.o)) // len(value.rows_K)

    attention = [
        Group(named(*row.qkv), norm(row.attention_norm)),
        Group(named(row.o), value.linear, repeats, width, _rows(value)),
    ]
    if row.router:
        return attention

    # Ups are the last of the two matrices, or the second half of the one.
    maker = block.get_submodule(row.gate_up[-1])
    channels = torch.arange(outputs_of(maker))
    ups = Part(maker, channels[-inputs_of(block.get_submodule(row.down)) :])
    return [
        *attention,
        Group(named(*row.gate_up), norm(row.ffn_norm)),
        Group(named(row.down), maker if row.gated else None, rows_K=_rows(ups)),
    ]


def _rows(part: Part) -> Tensor | None:
    """None for all of them."""
    return None if len(part.rows_K) == outputs_of(part.linear) else part.rows_K


def gain(norm: Any) -> Tensor:
    """(C,): what a norm multiplies each channel by. Gemma's norms store it less one."""
    if isinstance(norm, nn.LayerNorm):
        return norm.weight
    plain = (norm(torch.ones_like(norm.weight)[None])[0] - norm.weight).abs().mean() < 0.5
    return norm.weight if plain else norm.weight + 1


@torch.no_grad()
def fold(group: Group, s_C: Tensor) -> None:
    """Divide the maker's channels by s and multiply the readers' columns by it, in place: the
    function stays the same. The group must have a maker.
    """
    maker = group.maker

    # The maker: a linear layer's rows, or a norm's weight, which may be stored less one.
    if isinstance(maker, nn.Linear):
        s_K = s_C.view(-1, group.repeats, group.width)[:, 0].flatten()
        rows = slice(None) if group.rows_K is None else group.rows_K.to(s_K.device)
        maker.weight[rows] /= s_K[:, None]
        if maker.bias is not None:
            maker.bias[rows] /= s_K
    else:
        gain_C = gain(maker)
        maker.weight.add_(gain_C / s_C - gain_C)
        if getattr(maker, "bias", None) is not None:
            maker.bias.div_(s_C)

    for reader in group.readers.values():
        reader.weight.mul_(s_C)


def share(size_C: Tensor, group: Group) -> Tensor:
    """(C,): the largest among channels that one channel of the maker feeds, so that they can have
    one factor.
    """
    heads = size_C.view(-1, group.repeats, group.width)
    return heads.amax(1, keepdim=True).expand_as(heads).flatten()


def awq_scales(group: Group, inputs: Inputs, grid: Grid, name: str = "weight") -> Tensor:
    """(C,): by the best of `STEPS` exponents for the group's output error;
    exponent 0 is all ones.
    """
    w_RC = group.matrix()

    def error(s_C: Tensor) -> float:
        # The group's output error on the calibration text.
        gap_RC = grid.trial(w_RC * s_C, name).div_(s_C).sub_(w_RC)
        return ((gap_RC @ inputs.gram_CC) * gap_RC).sum().item()

    return best_scales(share(inputs.total_C, group), error)


def best_scales(total_C: Tensor, error: Callable[[Tensor], float]) -> Tensor:
    """(C,): powers of the inputs' sizes (C,), with the exponent whose factors have least error."""
    size_C = total_C.clamp(min=1e-30)
    least_error, best_C = torch.inf, torch.ones_like(size_C)
    for step in range(STEPS):
        # As AWQ's code: over sqrt(min * max).
        s_C = size_C.log().mul_(step / STEPS)
        s_C = s_C.sub_(s_C.aminmax()[0].add(s_C.max()) / 2).exp_().clamp_(1e-4, 1e4)

        error_now = error(s_C)
        if error_now < least_error:
            least_error, best_C = error_now, s_C
    return best_C
