"""Plain integers as the compressed-tensors package stores them and transformers and vLLM read
them, bit for bit.

Source: compressed_tensors/quantization/lifecycle/forward.py, `quantize`, `dequantize`. A group
shares a scale s and, when asymmetric, a zero point z, an integer:

    value = (q - z) * s       in the type of s, fp32 in our files;
                              q in -8..7 or -127..127, z in -8..7 or absent
    q     = round(clamp(x / s + z))       half to even, with s as it is stored

Here s is an fp16 number, though files hold it as fp32: both readers multiply in the type of the
stored scale, and an fp16 product of an 11-bit scale and a code would be rounded. In fp32 s * q, z *
s and their difference are exact, so this grid's step * q + floor, floor = -z * s, is that value. s
may be negative: integers 4 bits wide reach further down than up, and the weight of largest
magnitude takes the code -8 (llama.cpp's rule, so int4_g32 has the values of Q4_0).

    int4_gN       4 + 32 / N bits: s = m / -8, m the first of the largest magnitude, with its sign
    int4_asym_gN  4 + 36 / N bits: s = (max(x, 0) - min(x, 0)) / 15, z = round(-8 - min(x, 0) / s)
    int8_gN       8 + 32 / N bits: s = max |x| / 127, as Q8_0: -128 stays unused
    int8          8 + 32 / row length bits: the same with a scale for a whole row of any length
"""

import torch
from torch import Tensor

from compress.quant.grids.grid import Grid, ratio
from compress.quant.grids.llamacpp import OneScale


class Int(OneScale):
    """Symmetric, with the rule, range and search of `like`: a scale a group, or a row where
    `group` is 0; codes nearest to it as stored.
    """

    def __init__(self, like: OneScale, bits: int, group: int) -> None:
        # The arithmetic of `like`.
        self.like = like
        self.low = like.low
        self.high = like.high
        self.offset = like.offset
        self.dtype = like.dtype
        self.largest = like.largest
        self.targets = like.targets

        # In groups of another length.
        self.block = group
        self.group = group
        self.name = f"int{bits}_g{group}" if group else f"int{bits}"
        self.bits_per_weight = bits + (32 / group if group else 0)

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.like.rule(x).half().float()
        return ratio(x, s).clamp_(self.low, self.high).round_().add_(self.offset), s

    def rule(self, x: Tensor) -> Tensor:
        return self.like.rule(x)


class Int4Asym(Grid):
    """4 bits with a zero point: scales (R, C / group * 2) holds s, z, s, z, ..."""

    low, high, offset, stored = -8, 7, 8, 2
    largest = 65504.0 * 7.5  # (max - min) / 15 must fit fp16

    def __init__(self, group: int) -> None:
        self.block = self.group = group
        self.name = f"int4_asym_g{group}"
        self.bits_per_weight = 4 + 36 / group

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        least = x.amin(1, keepdim=True).clamp(max=0.0)
        most = x.amax(1, keepdim=True).clamp(min=0.0)
        s = ((most - least) / 15).half().float()
        z = torch.where(s > 0, (-8 - ratio(least, s)).round_().clamp_(-8, 7), 0.0)
        return ratio(x, s).add_(z).clamp_(-8, 7).round_().add_(8), torch.cat([s, z], dim=1)

    def levels(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        s, z = stored.float()[:, :, None].split(1, dim=1)
        return s, -z * s
