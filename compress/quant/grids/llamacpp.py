"""llama.cpp's Q4_0 and Q8_0, bit for bit.

Source: ggml/src/ggml-quants.c, `quantize_row_q4_0_ref`, `quantize_row_q8_0_ref`, `dequantize_row_*`. A row is cut
into blocks of 32. A block holds one fp16 scale d and 32 codes; its values are d * code in fp32.

    Q4_0, 18 bytes, 4.5 bits:  d | 16 bytes, byte j = code[j] | code[j + 16] << 4     value = d * (code - 8), code 0..15
        m = the first element of largest magnitude, with its sign;  d = m / -8;  code = min(15, trunc(x / d + 8.5))
    Q8_0, 34 bytes, 8.5 bits:  d | 32 int8                                            value = d * code, code -127..127
        d = max |x| / 127;  code = roundf(x / d), half away from zero

x / d is x * (1 / d) with d still in fp32; only the stored d is rounded to fp16. So these codes are not always the
nearest ones to the stored d, and a block whose d underflows fp16 stores d = 0. Where 1 / d is not finite (d = 0, or
below 2.9e-39, where C's conversion is undefined) codes are those of 0; such a block decodes to zeros either way.

`search` looks for a scale with less squared error, after llama.cpp's `make_qx_quants`: map m to each of a few targets t
(scale m / t, both signs), round to codes q, refit in closed form s = sum(h x q) / sum(h q^2), keep the largest gain
sum(h x q)^2 / sum(h q^2). Then round s to fp16, refit once more, and keep whichever stored scale, the plain rule's
included, has the least sum(h (x - s q)^2) with its own nearest codes: never worse than the rule. The sign of d is free:
a negative d turns the grid -8..7 into -7..8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant.chunks import each_chunk

BLOCK = 32


def inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where that is not finite."""
    return (1.0 / d).nan_to_num_(0.0, 0.0, 0.0)


def _fp16(scale: Tensor) -> Tensor:
    return scale.clamp(-65504.0, 65504.0).half()


class Grid:
    """A block format. Weights and codes (R, C), C a multiple of 32; scales fp16 (R, C / 32). `name` is for messages."""

    name: str
    block = BLOCK
    bits_per_weight: float
    low: int  # value = scale * q with integer low <= q <= high; the stored code is q + offset
    high: int
    offset: int
    dtype: torch.dtype
    targets: tuple[float, ...]

    def check(self, w: Tensor, name: str = "weight") -> None:
        """ValueError naming the tensor when the grid can't hold it: shape, NaN, infinity, a scale beyond fp16."""
        columns = w.shape[-1] if w.dim() == 2 else 0
        if columns == 0 or columns % BLOCK:
            near = max(BLOCK, round(columns / BLOCK) * BLOCK)
            raise ValueError(
                f"{name} has shape {tuple(w.shape)}: {self.name} needs a matrix whose rows are multiples of {BLOCK} "
                f"long; the nearest legal row length is {near}"
            )
        least, most = w.aminmax()
        if not (torch.isfinite(least) and torch.isfinite(most)):
            raise ValueError(f"{name} holds NaN or infinity: {self.name} takes finite values; repair the checkpoint it came from")
        limit = 65504.0 * min(-self.low, self.high)
        if max(-least.item(), most.item()) > limit:
            raise ValueError(f"{name} holds a value beyond {limit:g}: {self.name} stores its scale as fp16; rescale the weights")

    def rule(self, x: Tensor) -> Tensor:
        """(N, 32) -> (N, 1): the fp32 scale of llama.cpp's plain rounding."""
        raise NotImplementedError

    def nearest(self, x: Tensor) -> Tensor:
        """(N, 32) weights over scale -> (N, 32) stored codes of llama.cpp's plain rounding; overwrites x."""
        raise NotImplementedError

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(R, C), (R, C / 32) -> (R, C / 32 * bytes per block) uint8: the rows of the file."""
        raise NotImplementedError

    def encode(self, w: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
        """fp32 (R, C) -> codes (R, C), scales (R, C / 32): what llama.cpp's own quantizer writes, bit for bit."""
        self.check(w, name)
        x = w.detach().float().reshape(-1, BLOCK)
        codes = torch.empty(x.shape, dtype=self.dtype, device=w.device)
        scales = torch.empty((len(x), 1), dtype=torch.float16, device=w.device)

        def work(s: slice) -> None:
            d = self.rule(x[s])
            scales[s] = d
            codes[s] = self.nearest(x[s] * inverse(d))

        each_chunk(len(x), w.device, work)
        return codes.view(w.shape), scales.view(w.shape[0], -1)

    def search(self, w: Tensor, importance: Tensor | None = None, name: str = "weight") -> Tensor:
        """fp32 (R, C) -> fp16 scales (R, C / 32) of least squared error; `importance` >= 0, (C,) or (R, C), weights."""
        self.check(w, name)
        x = w.detach().float().reshape(-1, BLOCK)
        h = None if importance is None else importance.detach().float().reshape(-1, BLOCK)
        scales = torch.empty((len(x),), dtype=torch.float16, device=w.device)

        def work(s: slice) -> None:
            part = None if h is None else h[torch.arange(s.start, s.stop, device=w.device) % len(h)].t().contiguous()
            scales[s] = self._search(x[s], part)

        each_chunk(len(x), w.device, work)
        return scales.view(w.shape[0], -1)

    def _search(self, rows: Tensor, h: Tensor | None) -> Tensor:
        """(N, 32), (32, N) -> (N,) fp16. Works on columns: sums over a block are then sums of vectors."""
        x = rows.t().contiguous()
        hx = x if h is None else h * x
        peak = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
        top = torch.zeros_like(peak)
        best = torch.zeros_like(peak)
        for target in self.targets:
            gain, scale = self._fit(x, hx, h, inverse(peak / target))
            better = gain > top
            top = torch.where(better, gain, top)
            best = torch.where(better, scale, best)
        first = _fp16(best)
        again = _fp16(self._fit(x, hx, h, inverse(first.float()))[1])
        options = torch.stack([self.rule(rows)[:, 0].half(), first, again])
        errors = torch.stack([self._error(x, h, option.float()) for option in options])
        return options.gather(0, errors.argmin(0, keepdim=True))[0]

    def _fit(self, x: Tensor, hx: Tensor, h: Tensor | None, inv: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and least-squares scale of the codes that `inv` gives, each (N,)."""
        q = (x * inv).round_().clamp_(self.low, self.high)
        xq = (hx * q).sum(0)
        qq = q.square_().sum(0) if h is None else q.square_().mul_(h).sum(0)
        scale = (xq / qq).nan_to_num_(0.0, 0.0, 0.0)
        return xq * scale, scale

    def _error(self, x: Tensor, h: Tensor | None, scale: Tensor) -> Tensor:
        """(N,): the squared error of a stored scale with its own nearest codes."""
        gap = (x * inverse(scale)).round_().clamp_(self.low, self.high).mul_(scale).sub_(x).square_()
        return gap.sum(0) if h is None else gap.mul_(h).sum(0)

    def codes(self, w: Tensor, scales: Tensor) -> Tensor:
        """(R, C), fp16 (R, C / 32) of either sign -> (R, C) stored codes, the nearest on that grid."""
        x = w.detach().float().reshape(-1, BLOCK)
        d = scales.reshape(-1, 1)
        codes = torch.empty(x.shape, dtype=self.dtype, device=w.device)

        def work(s: slice) -> None:
            q = (x[s] * inverse(d[s].float())).round_().clamp_(self.low, self.high)
            codes[s] = q.add_(self.offset) if self.offset else q

        each_chunk(len(x), w.device, work)
        return codes.view(w.shape)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(R, C), (R, C / 32) -> fp32 (R, C): what every reader of the file computes."""
        q = codes.reshape(-1, BLOCK)
        d = scales.reshape(-1, 1)
        out = torch.empty(q.shape, dtype=torch.float32, device=codes.device)

        def work(s: slice) -> None:
            out[s] = q[s]
            out[s].sub_(self.offset).mul_(d[s].float())

        each_chunk(len(q), codes.device, work)
        return out.view(codes.shape)

    def snap(self, w: Tensor, scales: Tensor, out: Tensor) -> None:
        """decode(codes(w, scales), scales) into `out` fp32 (R, C), in one pass over memory."""
        x, d, y = w.detach().view(-1, BLOCK), scales.view(-1, 1), out.view(-1, BLOCK)

        def work(s: slice) -> None:
            scale = d[s].float()
            torch.mul(x[s], inverse(scale), out=y[s])
            y[s].round_().clamp_(self.low, self.high).mul_(scale)

        each_chunk(len(x), w.device, work)

    def unclipped(self, w: Tensor, scales: Tensor, grad: Tensor) -> Tensor:
        """`grad` (R, C) where rounding w / scales stays inside the range of codes, 0 elsewhere."""
        x, d, g = w.detach().view(-1, BLOCK), scales.view(-1, 1), grad.reshape(-1, BLOCK)
        out = torch.empty_like(x)

        def work(s: slice) -> None:
            q = (x[s] * inverse(d[s].float())).round_()
            inside = q.clamp(self.low, self.high).eq_(q)  # 1.0 or 0.0: several times faster than a mask of bools
            torch.mul(g[s], inside, out=out[s])

        each_chunk(len(x), w.device, work)
        return out.view(w.shape)


class Q4_0(Grid):
    """4 bits and an fp16 scale for 32 weights."""

    name, bits_per_weight = "q4_0", 4.5
    low, high, offset, dtype = -8, 7, 8, torch.uint8
    targets = tuple(t + k / 5 for t in (-8.0, 7.0) for k in range(-4, 5))

    def rule(self, x: Tensor) -> Tensor:
        return x.gather(1, x.abs().argmax(1, keepdim=True)) / -8

    def nearest(self, x: Tensor) -> Tensor:
        return x.add_(8.5).trunc_().clamp_(max=15)

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        q = codes.reshape(-1, 2, BLOCK // 2)
        blocks = torch.cat([scales.reshape(-1, 1).view(torch.uint8), q[:, 0] | (q[:, 1] << 4)], dim=1)
        return blocks.view(codes.shape[0], -1)


class Q8_0(Grid):
    """8 bits and an fp16 scale for 32 weights. The code -128 is never written, as in llama.cpp."""

    name, bits_per_weight = "q8_0", 8.5
    low, high, offset, dtype = -127, 127, 0, torch.int8
    targets = (125.0, 126.0, 126.5, 127.0, 127.25, 127.5)

    def rule(self, x: Tensor) -> Tensor:
        return x.abs().amax(1, keepdim=True) / 127

    def nearest(self, x: Tensor) -> Tensor:
        whole = x.trunc()
        return whole.add_(x.sub_(whole).mul_(2).trunc_())  # the fraction is exact, so this is C's roundf

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        blocks = torch.cat([scales.reshape(-1, 1).view(torch.uint8), codes.reshape(-1, BLOCK).view(torch.uint8)], dim=1)
        return blocks.view(codes.shape[0], -1)
