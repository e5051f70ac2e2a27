"""llama.cpp's formats of 32 weights a block: Q4_0, Q4_1, Q5_0, Q8_0, bit for bit.

Source: ggml/src/ggml-quants.c, `quantize_row_q*_ref`, `dequantize_row_q*`. A block holds d, an fp16
scale, then codes:

    Q4_0, 18 bytes, 4.5 bits:  d | 16 bytes, byte j = code[j] | code[j + 16] << 4
        value = d * (code - 8), code 0..15
        m = the first element of largest magnitude, with its sign;  d = m / -8
        code = min(15, trunc(x / d + 8.5))
    Q4_1, 20 bytes, 5 bits:    d | fp16 minimum m | 16 bytes as in Q4_0
        value = d * code + m, code 0..15
        m = min x;  d = (max x - m) / 15;  code = min(15, trunc((x - m) / d + 0.5))
    Q5_0, 22 bytes, 5.5 bits:  d | 4 bytes, bit j = code[j] >> 4 | low halves as in Q4_0
        value = d * (code - 16), code 0..31
        as Q4_0 with d = m / -16, code = min(31, trunc(x / d + 16.5))
    Q8_0, 34 bytes, 8.5 bits:  d | 32 int8
        value = d * code, code -127..127
        d = max |x| / 127;  code = roundf(x / d), half away from zero

x / d is x * (1 / d) with d (and m) still in fp32; only what is stored is rounded to fp16. So these
codes are not always the nearest ones to the stored d, and a block whose d underflows fp16 stores d
= 0. Where 1 / d is not finite (d = 0, or below 2.9e-39, where C's conversion is undefined) codes
are those of 0; such a block decodes to a constant either way.

`search`, on the grids of one scale, looks for a scale with less squared error, after llama.cpp's
`make_qx_quants`: map m to each of a few targets t (scale m / t, both signs), round to codes q,
refit in closed form s = sum(h x q) / sum(h q^2), keep the largest gain sum(h x q)^2 / sum(h q^2).
Then round s to fp16, refit once more, and keep whichever stored scale, the plain rule's included,
has the least sum(h (x - s q)^2) with its own nearest codes: never worse than the rule. The sign of
d is free: a negative d turns the grid -8..7 into -7..8.
"""

import torch
from torch import Tensor

from compress.quant.grids.grid import Grid, inverse


def as_bytes(x: Tensor) -> Tensor:
    """fp16 or int8 (N, K) -> their bytes, uint8 (N, any)."""
    return x.contiguous().view(torch.uint8)


def halves(codes: Tensor) -> Tensor:
    """(..., 2, K) codes below 16 -> (..., K): the first in the low half of a byte, the second in
    the high half.
    """
    return codes[..., 0, :] | (codes[..., 1, :] << 4)


class OneScale(Grid):
    """Symmetric: one fp16 scale a block, value = scale * q."""

    searches = learns = True
    targets: tuple[float, ...]

    def rule(self, x: Tensor) -> Tensor:
        """(N, block) -> (N, 1): the fp32 scale of plain rounding."""
        # Plus 0, so that there is no -0: the C code begins with 0.
        peak = x.gather(1, x.abs().argmax(1, keepdim=True)) + 0.0
        return peak / self.low

    def nearest(self, x: Tensor) -> Tensor:
        """(N, 32) weights over scale -> (N, 32) stored codes of llama.cpp's plain rounding;
        overwrites x.
        """
        return x.add_(self.offset + 0.5).trunc_().clamp_(max=self.high + self.offset)

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        d = self.rule(x)
        return self.nearest(x * inverse(d)), d

    def search(self, w: Tensor, importance: Tensor | None = None, name: str = "weight") -> Tensor:
        """fp32 (R, C) -> fp16 scales (R, C / block) of least squared error; `importance` >= 0,
        (C,) or (R, C), weights.
        """
        self.check(w, name)
        length = self.length(w.shape[1])
        scales = w.new_empty(len(w), w.shape[1] // length, dtype=torch.float16)

        # Importance block by block, of one row for all or of every row.
        h = w.new_ones(w.shape[1]) if importance is None else importance.detach().float()
        h = h.reshape(-1, length)

        def work(x: Tensor, number: Tensor, out: Tensor) -> None:
            out[:, 0] = self._search(x, h[number[:, 0] % len(h)].t().contiguous())

        self._each(work, w.detach().float(), torch.arange(scales.numel(), device=w.device), scales)
        return scales

    def _search(self, rows: Tensor, h: Tensor) -> Tensor:
        """(N, block), (block, N) -> (N,) fp16. Works on columns: sums over a block are then sums
        of vectors.
        """
        x = rows.t().contiguous()
        hx = h * x
        peak = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]

        # The target of largest gain.
        top = torch.zeros_like(peak)
        best = torch.zeros_like(peak)
        for target in self.targets:
            gain, scale = self._fit(x, hx, h, inverse(peak / target))
            better = gain > top
            top = torch.where(better, gain, top)
            best = torch.where(better, scale, best)

        # As it is stored, refitted to that, or the rule's: whichever errs least.
        first = best.clamp(-65504.0, 65504.0).half()
        again = self._fit(x, hx, h, inverse(first.float()))[1].clamp(-65504.0, 65504.0).half()
        options = torch.stack([self.rule(rows)[:, 0].half(), first, again])
        errors = torch.stack([self._error(x, h, option.float()) for option in options])
        return options.gather(0, errors.argmin(0, keepdim=True))[0]

    def _fit(self, x: Tensor, hx: Tensor, h: Tensor, inv: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and least-squares scale of the codes that `inv` gives, each (N,)."""
        q = self.rounded(x * inv)
        xq = (hx * q).sum(0)
        scale = (xq / q.square_().mul_(h).sum(0)).nan_to_num_(0.0, 0.0, 0.0)
        return xq * scale, scale

    def _error(self, x: Tensor, h: Tensor, scale: Tensor) -> Tensor:
        """(N,): the squared error of a stored scale with its own nearest codes."""
        return self.rounded(x * inverse(scale)).mul_(scale).sub_(x).square_().mul_(h).sum(0)


class Q4_0(OneScale):
    """4 bits and an fp16 scale for 32 weights."""

    name, bits_per_weight, largest = "q4_0", 4.5, 65504.0 * 7
    low, high, offset = -8, 7, 8
    targets = tuple(t + k / 5 for t in (-8.0, 7.0) for k in range(-4, 5))

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        return [as_bytes(scales), halves(codes.view(-1, 2, 16))]


class Q4_1(Grid):
    """4 bits, an fp16 scale and an fp16 minimum for 32 weights: scales (R, C / 32 * 2) holds d, m,
    d, m, ...
    """

    name, bits_per_weight, largest = "q4_1", 5.0, 65504.0
    low, high, stored = 0, 15, 2

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        least, most = x.aminmax(dim=1, keepdim=True)
        d = (most - least) / 15
        return (x - least).mul_(inverse(d)).add_(0.5).trunc_().clamp_(max=15), torch.cat(
            [d, least], dim=1
        )

    def levels(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        step, floor = stored.float()[:, :, None].split(1, dim=1)
        return step, floor

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        return [as_bytes(scales), halves(codes.view(-1, 2, 16))]


class Q5_0(OneScale):
    """5 bits and an fp16 scale for 32 weights."""

    name, bits_per_weight, largest = "q5_0", 5.5, 65504.0 * 15
    low, high, offset = -16, 15, 16
    targets = tuple(t + k / 5 for t in (-16.0, 15.0) for k in range(-4, 5))

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        q = codes.view(-1, 4, 8)
        fifth = ((q >> 4) << torch.arange(8, dtype=torch.uint8, device=q.device)).sum(
            -1, dtype=torch.uint8
        )
        return [as_bytes(scales), fifth, halves((q & 15).view(-1, 2, 16))]


class Q8_0(OneScale):
    """8 bits and an fp16 scale for 32 weights. The code -128 is never written, as in llama.cpp."""

    name, bits_per_weight, largest = "q8_0", 8.5, 65504.0 * 127
    low, high, dtype = -127, 127, torch.int8
    targets = (125.0, 126.0, 126.5, 127.0, 127.25, 127.5)

    def rule(self, x: Tensor) -> Tensor:
        return x.abs().amax(1, keepdim=True) / 127

    def nearest(self, x: Tensor) -> Tensor:
        # The fraction is exact, so this is C's roundf.
        integer = x.trunc()
        return integer.add_(x.sub_(integer).mul_(2).trunc_())

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        return [as_bytes(scales), as_bytes(codes)]
