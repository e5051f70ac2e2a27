"""llama.cpp's K-quants Q4_K and Q6_K: 256 weights a block, scales in two levels, bit for bit.

Source: ggml/src/ggml-quants.c, `quantize_row_q4_K_ref`, `quantize_row_q6_K_ref` (what is run
without an importance matrix), `make_qkx2_quants`, `make_qx_quants`, `dequantize_row_*`. A block is
cut into groups with integer scales of their own; only the fp16 unit of those integers is stored for
the whole block.

    Q4_K, 144 bytes, 4.5 bits:
        fp16 d, fp16 dmin | 12 bytes, 8 scales sc and 8 minima mn of 6 bits | 128 bytes of codes
        value = (d * sc) * code - dmin * mn, code 0..15, groups of 32
        12 bytes: 0-3 low 6 bits sc[0..3], 4-7 low 6 bits mn[0..3], their high 2 bits those of
        sc[4..7], mn[4..7]; 8-11 the low 4 bits of sc[4..7] and, in the high half, of mn[4..7]
        codes: byte j of 32, for groups 2k and 2k + 1, = code[2k][j] | code[2k + 1][j] << 4
    Q6_K, 210 bytes, 6.5625 bits:
        128 bytes low halves | 64 bytes high pairs | 16 int8 scales sc | fp16 d
        value = (d * sc) * (code - 32), code 0..63, groups of 16
        each 128 codes, as 4 runs a, b, c, e of 32: bytes a | c << 4, then b | e << 4 (low 4 bits),
        and a | b << 2 | c << 4 | e << 6 (high 2 bits)

Q4_K fits a line to every group: 21 times, cut the range into 14 + k / 10 steps from the best floor
so far, round, refit step and floor by weighted least squares (weights: the group's root mean square
+ |x|), keep the least error. Q6_K fits a scale to every group: of 19 first scales, keep the
refitted one with the largest gain, weights x^2. Then scales are rounded to integers of the largest
(63 and -128), and codes taken again as the nearest to what is stored.

Which fit is kept hangs on the last bit of a sum, so sums run in C's order, one row of many groups
at a time, and nothing is contracted to a fused multiply-add: this equals llama.cpp as built for
x86-64. A build for a machine whose compiler contracts (gcc on arm64) may write other bytes. A
group's codes stay those of its fit where its scale, rounded to an integer, is 0: they decode to one
value anyway, but the bytes of the file show them.
"""

import torch
from torch import Tensor

from compress.quant.grids.grid import Grid, ratio
from compress.quant.grids.llamacpp import as_bytes, halves

EPS = 1e-15  # llama.cpp's GROUP_MAXEPS
LINES = 21  # through the codes of a group of Q4_K


def in_order(terms: Tensor) -> Tensor:
    """(K, ...) -> (...): the fp32 sum of a C loop over K."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


class Q4_K(Grid):
    """4 bits, 6-bit scales and minima for 32, their fp16 units for 256. A row of scales: d, dmin,
    8 sc, 8 mn.
    """

    name, bits_per_weight, largest = "q4_k", 4.5, 65504.0 * 63
    block, stored, low, high = 256, 18, 0, 15

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._encoded(x, LINES)

    def trial(self, w: Tensor, name: str = "weight") -> Tensor:
        """By the range of each 32, in place of the lines that plain rounding tries."""
        self.check(w, name)
        values = torch.empty_like(w, dtype=torch.float32)

        def work(x: Tensor, out: Tensor) -> None:
            codes, stored = self._encoded(x, 0)
            step, floor = self.levels(stored.half())
            self._grouped(out).copy_(self._grouped(codes).mul_(step).add_(floor))

        self._each(work, w.detach().float(), values)
        return values

    def _encoded(self, x: Tensor, lines: int) -> tuple[Tensor, Tensor]:
        """Codes and what is stored of the scales, after so many lines through every 32."""
        groups = x.view(-1, self.group)
        codes, scale, least = (
            part.t().reshape(len(x), 8, -1) for part in self._fit(groups.t().contiguous(), lines)
        )

        # Scales and minima as integers of 6 bits.
        unit, integers = self._in_63ths(scale)
        least_unit, least_integers = self._in_63ths(least)
        stored = torch.cat([unit, least_unit, integers, least_integers], dim=1)

        # Codes once more, nearest to what is stored.
        step, floor = self.levels(stored.half())
        again = (groups.view(codes.shape) - floor).div_(step).round_().clamp_(0, 15)
        return torch.where(step == 0, codes, again).flatten(1), stored

    def _in_63ths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 8, 1) -> a 63th of the largest (N, 1), and in integers of it (N, 8)."""
        top = x.amax(1, keepdim=True).clamp(min=0.0) + 0.0
        return top[..., 0] / 63, (x * ratio(63.0, top)).round_().clamp_(0, 63).add_(0.0)[..., 0]

    def _fit(self, x: Tensor, lines: int) -> tuple[Tensor, Tensor, Tensor]:
        """(32, G) -> codes (32, G), scales (1, G), minima (1, G), those with their sign turned; by
        the range, or one of so many lines through the codes, each from another range.
        """
        # The weight of each error; torch's fp32 root can be a bit off.
        w = (in_order(x * x) / 32).double().sqrt().float() + x.abs()
        sum_w, sum_x = in_order(torch.stack([w, w * x], dim=1))

        # The first fit is the range itself.
        least = x.amin(0).clamp(max=0.0)
        most = x.amax(0)
        constant = most == least
        over = ratio(15.0, most - least)
        codes = self._codes(x, least, over)
        scale = ratio(1.0, over)
        error = self._error(x, w, codes, scale, least)

        starts = torch.arange(lines, dtype=torch.float32).mul_(0.1).sub_(1.0).add_(15.0)
        for start in starts.tolist():
            # Codes from the best floor so far, and the sums that a line through them needs.
            q = self._codes(x, least, ratio(start, most - least))
            wq = w * q
            sum_q, sum_qq, sum_xq = in_order(torch.stack([wq, wq * q, wq * x], dim=1))

            # The line of least squares, or one through 0 where its floor would lie above.
            det = sum_w * sum_qq - sum_q * sum_q
            line = (sum_w * sum_xq - sum_x * sum_q) / det
            floor = (sum_qq * sum_x - sum_q * sum_xq) / det
            line = torch.where(floor > 0, sum_xq / sum_qq, line)
            floor = floor.clamp_(max=0.0)

            # Kept where it is closer.
            line_error = self._error(x, w, q, line, floor)
            better = (det > 0) & (line_error < error) & ~constant
            codes = torch.where(better, q, codes)
            scale = torch.where(better, line, scale)
            least = torch.where(better, floor, least)
            error = torch.where(better, line_error, error)
        return codes, scale[None], -least[None]

    def _codes(self, x: Tensor, least: Tensor, over: Tensor) -> Tensor:
        return (x - least).mul_(over).round_().clamp_(0, 15)

    def _error(self, x: Tensor, w: Tensor, q: Tensor, scale: Tensor, least: Tensor) -> Tensor:
        return in_order((scale * q).add_(least).sub_(x).square_().mul_(w))

    def levels(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        unit, scale, least = stored.float()[..., None].split([2, 8, 8], dim=1)
        return unit[:, :1] * scale, -unit[:, 1:] * least

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        units, sc, mn = scales.split([2, 8, 8], dim=1)
        small = torch.stack([sc, mn], dim=1).to(torch.uint8)
        first, last = small[..., :4], small[..., 4:]
        body = halves(codes.view(-1, 4, 2, 32)).flatten(1)
        return [as_bytes(units), (first | (last >> 4 << 6)).flatten(1), halves(last & 15), body]


class Q6_K(Grid):
    """6 bits, int8 scales for 16, their fp16 unit for 256. A row of scales: d, 16 sc."""

    name, bits_per_weight, largest = "q6_k", 6.5625, 65504.0 * 127 * 31
    block, group, stored, low, high, offset = 256, 16, 17, -32, 31, 32

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.view(-1, self.group)
        codes, scale = (
            part.t().reshape(len(x), 16, -1) for part in self._fit(groups.t().contiguous())
        )

        # Scales as integers of 8 bits, which have no -0.
        top = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        over = torch.where(top.abs() < EPS, 0.0, ratio(-128.0, top))
        small = (scale * over).round_().clamp_(max=127).add_(0.0)
        stored = torch.cat([ratio(1.0, over), small], dim=1)[..., 0]

        # Codes once more, nearest to what is stored.
        step, _ = self.levels(stored.half())
        quotient = groups.view(codes.shape) / step
        again = quotient.round_().clamp_(self.low, self.high).add_(self.offset)
        codes = torch.where(over == 0, 0.0, torch.where(step == 0, codes, again))
        return codes.flatten(1), stored

    def _fit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(16, G) -> stored codes (16, G), scales (1, G)."""
        peak = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
        w = x * x
        codes = torch.zeros_like(x)
        scale = torch.zeros_like(peak)
        gain = torch.full_like(peak, -1.0)

        for k in (0, *range(-9, 0), *range(1, 10)):
            # Codes of a first scale, and what a refitted one gains.
            over = ratio(-(torch.tensor(0.1) * k + 32.0).item(), peak)
            q = (x * over).round_().clamp_(self.low, self.high)
            xq, qq = in_order(torch.stack([w * x * q, w * q * q], dim=1))

            # Kept where it gains more.
            better = (qq > 0) & (xq * xq > gain * qq)
            codes = torch.where(better, q + self.offset, codes)
            scale = torch.where(better, xq / qq, scale)
            gain = torch.where(better, scale * xq, gain)

        zero = peak.abs() < EPS
        return torch.where(zero, 0.0, codes), torch.where(zero, 0.0, scale)[None]

    def levels(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        values = stored.float()[..., None]
        return values[:, :1] * values[:, 1:], None

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        runs = codes.view(-1, 2, 4, 32)
        low, high = runs & 15, runs >> 4
        pairs = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
        nibbles = low[:, :, :2] | (low[:, :, 2:] << 4)
        return [
            nibbles.flatten(1),
            pairs.flatten(1),
            as_bytes(scales[:, 1:].to(torch.int8)),
            as_bytes(scales[:, :1]),
        ]
