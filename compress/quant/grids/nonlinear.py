"""llama.cpp's grids of 4 bits that name one of sixteen uneven numbers, bit for bit: IQ4_NL, MXFP4,
NVFP4.

Source: ggml/src/ggml-quants.c, `quantize_iq4_nl`, `dequantize_row_iq4_nl`,
`quantize_row_mxfp4_ref`, `quantize_row_nvfp4_ref`. A block of 32 of IQ4_NL holds d, an fp16 scale,
then 16 bytes as in Q4_0: the bytes of Q4_0, 4.5 bits a weight, but

    value = d * NUMBERS[code]

The numbers lie closer where weights of a bell shape are more frequent.

    plain rounding, without an importance matrix: with m the first element of largest magnitude, the
    scales m / t for t = 127, -134, -133, ..., -120 are tried in this order; each gives codes and,
    refitted with the weights' squares as importance, s = sum(x^2 x q) / sum(x^2 q^2), of which the
    one of largest gain stays. Codes are those nearest to it in fp32, ties upwards; only then is it
    rounded to fp16. Sums run in C's order, without fused multiply-adds.

`search` tries both ends of the range, weighs by what it is given, and refits to the stored fp16
scale (llamacpp.py).

A block of MXFP4 (OCP Microscaling Formats 1.0, section 5.3) holds e, a byte, then 16 bytes as in
Q4_0: 17 bytes, 4.25 bits a weight, and

    value = 2^(e - 128) * E2M1[code]

    plain rounding: e = floor(log2(max |x|)) - 2 + 127; codes are the nearest, of two as near the
    one of smaller magnitude. What is above 12 steps, up to 16, becomes 12.

`search` also tries one step finer and one coarser. e is not below 0, where C's conversion is
undefined: such blocks decode to next to nothing either way.

64 weights of NVFP4 hold four bytes, each the step of a block of 16, then for each block 8 bytes as
in Q4_0: 36 bytes, 4.5 bits a weight, and

    value = UE4M3[byte] / 2 * E2M1[code]      UE4M3: 4 bits of exponent, 3 of mantissa, no sign
                                              (OCP 8-bit Floating Point 1.0, section 5.2)

    plain rounding: the byte of max |x| / 6, ties upwards, at most 448; codes as above.

`search` tries every byte from three finer to nine coarser: numbers up to 8 lie more evenly than
those up to 12 (arXiv 2512.02010). The second scale, one for a whole matrix, that NVIDIA's own
checkpoints have is not written: a step is at least 2^-10, and below 2^-7 a multiple of that.
"""

import torch
from torch import Tensor

from compress.quant.grids.grid import inverse, ratio
from compress.quant.grids.kquants import EPS, in_order
from compress.quant.grids.llamacpp import OneScale, as_bytes, halves

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled
EXPONENT = 128  # that of a step of 1
NUMBERS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _tables() -> tuple[Tensor, Tensor]:
    """Nearest number and its code, for every half from the first number to the last: no midpoint
    lies between two halves.
    """
    numbers = torch.tensor(NUMBERS, dtype=torch.float32)
    steps = torch.arange(2 * NUMBERS[0], 2 * NUMBERS[-1] + 1) / 2
    code = torch.bucketize(steps, (numbers[1:] + numbers[:-1]) / 2, right=True)
    return numbers[code], code.float()


class IQ4_NL(OneScale):
    """4 bits that name one of NUMBERS, and an fp16 scale for 32 weights. q is the number, not the
    code.
    """

    name, bits_per_weight, largest = "iq4_nl", 4.5, 65504.0 * 113
    low, high = NUMBERS[0], NUMBERS[-1]
    targets = tuple(float(end + k) for end in (low, high) for k in range(-27, 28, 9))
    nearest_number, nearest_code = _tables()

    def rule(self, x: Tensor) -> Tensor:
        return self.plain(x)[1]

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        columns = x.t().contiguous()
        peak = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
        weight = columns * columns
        scale = torch.zeros_like(peak)
        best = torch.zeros_like(peak)

        for attempt, target in enumerate((127.0, *range(self.low - 7, self.low + 8))):
            # Codes of a tried scale, and what a refitted one gains.
            over = ratio(1.0, -peak / self.low) if attempt == 0 else ratio(float(target), peak)
            q = self.rounded(columns * over)
            wq = weight * q
            xq, qq = in_order(torch.stack([wq * columns, wq * q], dim=1))

            # Kept where it gains more; the first one is kept in any case.
            better = (
                (qq > 0) & (xq * xq > best * qq)
                if attempt
                else torch.ones_like(peak, dtype=torch.bool)
            )
            scale = torch.where(better, ratio(xq, qq), scale)
            best = torch.where(better, scale * xq, best)

        # Codes nearest to the scale in fp32.
        scale = torch.where(peak.abs() < EPS, 0.0, scale)[:, None]
        return self.stored_codes(self.rounded(x * inverse(scale))), scale

    def trial(self, w: Tensor, name: str = "weight") -> Tensor:
        """One scale a block, that of the first number, in place of the sixteen that plain rounding
        tries.
        """
        self.check(w, name)
        values = torch.empty_like(w, dtype=torch.float32)

        def work(x: Tensor, out: Tensor) -> None:
            scale = super(IQ4_NL, self).rule(x)
            out.copy_(self.rounded(x * inverse(scale)).mul_(scale))

        self._each(work, w.detach().float(), values)
        return values

    def rounded(self, q: Tensor) -> Tensor:
        return self._looked_up(self.nearest_number, q)

    def inside(self, q: Tensor) -> Tensor:
        # Half a gap beyond the outermost numbers, as on even grids.
        ends = (self.low - 11.5, self.high + 12.0)
        return q.clamp(*ends).eq_(q)

    def stored_codes(self, q: Tensor) -> Tensor:
        return self._looked_up(self.nearest_code, q)

    def numbers(self, codes: Tensor) -> Tensor:
        return codes.copy_(
            torch.tensor(NUMBERS, dtype=torch.float32, device=codes.device)[codes.int()]
        )

    def _looked_up(self, table: Tensor, q: Tensor) -> Tensor:
        """The table's entry for every number of q, any shape, in place. Doubling and rounding down
        are exact.
        """
        index = q.mul_(2).floor_().clamp_(2 * self.low, 2 * self.high).sub_(2 * self.low).int()
        return q.copy_(table.to(q.device).index_select(0, index.flatten()).view(q.shape))

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        return [as_bytes(scales), halves(codes.view(-1, 2, 16))]


def _magnitudes() -> tuple[Tensor, Tensor]:
    """Nearest magnitude of E2M1 and its code, for every half up to the largest: no midpoint lies
    between two halves.
    """
    magnitudes = torch.tensor(E2M1[:8], dtype=torch.float32)
    steps = torch.arange(2 * E2M1[7] + 1) / 2
    code = torch.bucketize(steps, (magnitudes[1:] + magnitudes[:-1]) / 2)
    return magnitudes[code], code.float()


class FloatCodes(OneScale):
    """4 bits that name one of E2M1, and a byte that names the step of a block: `scales` hold that
    byte as a number. q is the number, not the code.
    """

    low, high, learns = -E2M1[7], E2M1[7], False
    nearest_magnitude, magnitude_code = _magnitudes()
    steps: Tensor  # (256,): of every byte
    most: int  # the byte of the largest step
    tried: range  # that `search` tries, from plain rounding's byte

    def plain_byte(self, peak: Tensor) -> Tensor:
        """(N, 1) largest magnitude of each block -> the byte of its step in plain rounding."""
        raise NotImplementedError

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        byte = self.plain_byte(x.abs().amax(1, keepdim=True))
        return self.stored_codes(self.rounded(x * inverse(self._steps(byte)))), byte

    def _search(self, rows: Tensor, h: Tensor) -> Tensor:
        x = rows.t().contiguous()
        byte = self.plain_byte(rows.abs().amax(1))
        # Plain rounding's own first: of two as good the first one stays.
        moves = sorted(self.tried, key=abs)
        options = torch.stack([(byte + move).clamp(0, self.most) for move in moves])
        errors = torch.stack([self._error(x, h, self._steps(option)) for option in options])
        return options.gather(0, errors.argmin(0, keepdim=True))[0].half()

    def _steps(self, bytes: Tensor) -> Tensor:
        table = self.steps.to(bytes.device)
        return table.index_select(0, bytes.flatten().int()).view(bytes.shape)

    def levels(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._steps(stored).unsqueeze(-1), None

    def rounded(self, q: Tensor) -> Tensor:
        return q.copy_(self._of(self.nearest_magnitude, q).copysign(q))

    def inside(self, q: Tensor) -> Tensor:
        # Half a gap beyond the outermost numbers, as on even grids.
        return q.clamp(self.low - 2.0, self.high + 2.0).eq_(q)

    def stored_codes(self, q: Tensor) -> Tensor:
        # There is no code for -0.
        return q.copy_(self._of(self.magnitude_code, q) + 8 * (q < 0))

    def numbers(self, codes: Tensor) -> Tensor:
        return codes.copy_(
            torch.tensor(E2M1, dtype=torch.float32, device=codes.device)[codes.int()]
        )

    def _of(self, table: Tensor, q: Tensor) -> Tensor:
        """The table's entry for every magnitude of q. Doubling and rounding up are exact."""
        index = q.abs().mul_(2).ceil_().clamp_(max=2 * self.high).int()
        return table.to(q.device).index_select(0, index.flatten()).view(q.shape)


class MXFP4(FloatCodes):
    """A power of two for 32 weights."""

    name, bits_per_weight, largest = "mxfp4", 4.25, 2.0**127
    steps = torch.ldexp(torch.ones(256), torch.arange(256) - EXPONENT)
    most, tried = 255, range(-1, 2)

    def plain_byte(self, peak: Tensor) -> Tensor:
        return torch.where(peak > 0, peak.log2().floor() + (EXPONENT - 3), 0.0).clamp_(min=0)

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        return [scales.to(torch.uint8), halves(codes.view(-1, 2, 16))]


def _halved_ue4m3() -> Tensor:
    """(256,): half of what every byte means; 0 for 127, which is no number, and what follows."""
    byte = torch.arange(256)
    exponent, mantissa = byte >> 3, byte & 7
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    return torch.where(byte < 127, torch.where(exponent > 0, normal, mantissa / 512) / 2, 0.0)


class NVFP4(FloatCodes):
    """A step of 8 bits for 16 weights, four of them side by side in the file."""

    name, bits_per_weight, largest = "nvfp4", 4.5, 448.0 * 6
    block, group, row = 16, 16, 64
    steps = _halved_ue4m3()
    most, tried = 126, range(-3, 10)
    middles = (torch.tensor(E2M1[1:8]) + torch.tensor(E2M1[:7])) / 2

    def plain_byte(self, peak: Tensor) -> Tensor:
        # Below 2^-6 multiples of 2^-9, at most 7 of them, as C counts them.
        target = (peak / 6).clamp(max=448.0)
        fine = (target * 512 + 0.5).trunc().clamp(max=7)

        # Else the bits of a float, but for those of the mantissa that are too fine; half way
        # upwards. What has the largest exponent becomes the largest number.
        bits = target.view(torch.int32)
        coarse = (((bits >> 19) + 1) >> 1) - (120 << 3)
        coarse = torch.where(coarse < 120, coarse, self.most)
        return torch.where(target < 2**-6, fine, coarse.float())

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        byte = self.plain_byte(x.abs().amax(1, keepdim=True))
        step = self._steps(byte)
        # Steps are no powers of two: a quotient would be rounded, these products are exact.
        magnitude = sum((x.abs() > step * middle).float() for middle in self.middles.tolist())
        magnitude = magnitude * (step > 0)
        return magnitude + 8 * ((x < 0) & (magnitude > 0)), byte

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        nibbles = halves(codes.reshape(-1, 4, 2, 8)).flatten(1)
        bytes = scales.to(torch.uint8)
        return torch.cat([bytes.view(-1, 4), nibbles], dim=1).view(len(codes), -1)
