"""What every grid shares: a matrix cut into blocks, each block codes plus a few numbers, and from those one value per code.

    value = step * q + floor      in fp32, in this order: the multiplication is rounded, then the addition

q is an integer in low..high and the stored code is q + offset. `group` neighbours share one step and one floor (0 on symmetric grids). What the
file keeps of a block besides its codes is one row of `scales`, fp16: all of it is fp16 in the file too, or wider, or an integer of at most 8
bits, which fp16 holds exactly. `levels` turns that row into steps and floors.

Rounding to the nearest code, decoding and the straight-through mask follow from the levels. A grid adds `plain`, the codes and numbers that its
format's own plain rounding picks, and for GGUF files `parts`, the bytes. Where a step is 0 the code is that of q = 0.

A chain of k torch operations over a whole tensor moves it through memory k times, and pays for k temporaries. Cut into pieces of at most torch's
own grain (32,768 elements, below which it starts no OpenMP region) the chain runs from cache; torch releases the interpreter lock inside
operations, so plain threads scale. The cuts, and so the results, do not depend on the number of threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

GRAIN = 32_768  # elements of one piece


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="chunks")


def ratio(x: Tensor | float, d: Tensor) -> Tensor:
    """x / d, rounded once (for a number x torch's `x / d` is x * (1 / d)), and 0 where that is not finite."""
    return torch.div(torch.as_tensor(x), d).nan_to_num_(0.0, 0.0, 0.0)


def inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where that is not finite."""
    return ratio(1.0, d)


class Grid:
    """A block format. Weights and codes (R, C), C a multiple of `block`; scales fp16 (R, C / block * stored)."""

    name: str  # for messages
    bits_per_weight: float
    block = 32  # 0: a whole row
    group = 32  # 0: the whole block
    stored = 1
    low: int
    high: int
    offset = 0
    dtype = torch.uint8
    largest: float  # magnitude of a weight beyond which a stored fp16 number may overflow
    searches = False

    def length(self, columns: int) -> int:
        """Weights in a block of a matrix with that many columns."""
        return self.block or columns

    def check(self, w: Tensor, name: str = "weight") -> None:
        """ValueError naming the tensor when the grid can't hold it: shape, NaN, infinity, a scale beyond fp16."""
        columns = w.shape[-1] if w.dim() == 2 else 0
        block = self.length(columns) or 1
        if columns == 0 or columns % block:
            near = max(block, round(columns / block) * block)
            raise ValueError(
                f"{name} has shape {tuple(w.shape)}: {self.name} needs a matrix whose rows are multiples of {block} "
                f"long; the nearest legal row length is {near}"
            )
        least, most = w.aminmax()
        if not (torch.isfinite(least) and torch.isfinite(most)):
            raise ValueError(f"{name} holds NaN or infinity: {self.name} takes finite values; repair the checkpoint it came from")
        if max(-least.item(), most.item()) > self.largest:
            raise ValueError(f"{name} holds a value beyond {self.largest:g}: {self.name} stores its scale as fp16; rescale the weights")

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, block) fp32 -> (N, block) codes, (N, stored) numbers of the format's own rounding without an importance matrix."""
        raise NotImplementedError

    def levels(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, stored) -> the steps and the floors of its groups, each fp32 (N, block / group, 1); None: no floor."""
        return stored.float().unsqueeze(-1), None

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(R, C), (R, C / block * stored) -> (R, C / block * bytes per block) uint8: the rows of a GGUF."""
        return torch.cat(self.parts(*self._blocks(codes, scales)), dim=1).view(len(codes), -1)

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        """(N, block), (N, stored) -> the bytes of each block, uint8, in pieces (N, any)."""
        raise NotImplementedError

    def search(self, w: Tensor, importance: Tensor | None = None, name: str = "weight") -> Tensor:
        """fp32 (R, C) -> scales of less squared error than `plain`'s, on grids that have such a search."""
        raise ValueError(f"{name}: grid {self.name} has no search of scales; use scales=round")

    def encode(self, w: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
        """fp32 (R, C) -> codes (R, C), scales of plain rounding; on llama.cpp's grids what its quantizer writes, bit for bit."""
        self.check(w, name)
        x = w.detach().float().reshape(-1, self.length(w.shape[1]))
        codes = torch.empty(x.shape, dtype=self.dtype, device=w.device)
        scales = torch.empty((len(x), self.stored), dtype=torch.float16, device=w.device)

        def work(s: slice) -> None:
            codes[s], scales[s] = self.plain(x[s])

        self._each(x, work)
        return codes.view(w.shape), scales.view(w.shape[0], -1)

    def codes(self, w: Tensor, scales: Tensor) -> Tensor:
        """(R, C), scales whose steps have either sign -> (R, C) stored codes, the nearest on that grid."""
        x, rows = self._blocks(w.detach().float(), scales)
        codes = torch.empty(x.shape, dtype=self.dtype, device=w.device)

        def work(s: slice) -> None:
            q = self._quotient(x[s], *self.levels(rows[s])).clamp_(self.low, self.high)
            codes[s] = (q.add_(self.offset) if self.offset else q).flatten(1)

        self._each(x, work)
        return codes.view(w.shape)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(R, C), scales -> fp32 (R, C): what every reader of the file computes."""
        q, rows = self._blocks(codes, scales)
        out = torch.empty(q.shape, dtype=torch.float32, device=codes.device)

        def work(s: slice) -> None:
            out[s] = q[s]
            self._value(self._grouped(out[s]).sub_(self.offset), *self.levels(rows[s]))

        self._each(q, work)
        return out.view(codes.shape)

    def snap(self, w: Tensor, scales: Tensor, out: Tensor) -> None:
        """decode(codes(w, scales), scales) into `out` fp32 (R, C), in one pass over memory."""
        x, rows = self._blocks(w.detach(), scales)
        y = out.view(x.shape)

        def work(s: slice) -> None:
            step, floor = self.levels(rows[s])
            q = self._quotient(x[s], step, floor, self._grouped(y[s]))
            self._value(q.clamp_(self.low, self.high), step, floor)

        self._each(x, work)

    def unclipped(self, w: Tensor, scales: Tensor, grad: Tensor) -> Tensor:
        """`grad` (R, C) where rounding (w - floor) / step stays inside the range of codes, 0 elsewhere."""
        x, rows = self._blocks(w.detach(), scales)
        g, out = grad.reshape(x.shape), torch.empty_like(x)

        def work(s: slice) -> None:
            q = self._quotient(x[s], *self.levels(rows[s])).flatten(1)
            inside = q.clamp(self.low, self.high).eq_(q)  # 1.0 or 0.0: several times faster than a mask of bools
            torch.mul(g[s], inside, out=out[s])

        self._each(x, work)
        return out.view(w.shape)

    def _blocks(self, x: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return x.reshape(-1, self.length(x.shape[1])), scales.reshape(-1, self.stored)

    def _grouped(self, x: Tensor) -> Tensor:
        """(N, block) -> (N, block / group, group), the same memory."""
        return x.view(len(x), -1, self.group or x.shape[1])

    def _quotient(self, x: Tensor, step: Tensor, floor: Tensor | None, out: Tensor | None = None) -> Tensor:
        """(N, block) -> round((x - floor) / step), not yet clamped, (N, block / group, group)."""
        over = inverse(step)
        if floor is None:
            return torch.mul(self._grouped(x), over, out=out).round_()
        return torch.sub(self._grouped(x), floor, out=out).mul_(over).round_()

    def _value(self, q: Tensor, step: Tensor, floor: Tensor | None) -> None:
        """q -> step * q + floor, in place."""
        q.mul_(step)
        if floor is not None:
            q.add_(floor)

    def _each(self, x: Tensor, work: Callable[[slice], None]) -> None:
        """`work` without gradient on pieces of the (N, block) rows of `x`, on all threads; on anything but a CPU on all rows at once."""
        rows, size = len(x), max(1, GRAIN // x.shape[1])
        on_cpu = x.device.type == "cpu"
        threads, piece = min(torch.get_num_threads(), -(-rows // size)), size if on_cpu else max(rows, 1)

        def span(start: int, stop: int) -> None:
            with torch.inference_mode(False), torch.no_grad():  # both are thread-local
                for at in range(start, stop, piece):
                    work(slice(at, min(at + piece, stop)))

        if threads <= 1 or not on_cpu:
            span(0, rows)
            return
        bounds = [min(rows, -(-rows // piece) * i // threads * piece) for i in range(threads + 1)]
        for done in [_pool(threads).submit(span, *pair) for pair in pairwise(bounds)]:
            done.result()
