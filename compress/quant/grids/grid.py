"""What every grid shares: a matrix cut into blocks, each block codes plus a few numbers, and from
those one value per code.

    value = step * q + floor      in fp32, in this order: the multiplication is rounded, then the
    addition

q is an integer in low..high and the stored code is q + offset, but on non-linear grids
(nonlinear.py), where a code names one of a few such integers. `group` neighbours share one step and
one floor (0 on symmetric grids). What the file keeps of a block besides its codes is one row of
`scales`, fp16: all of it is fp16 in the file too, or wider, or an integer of at most 8 bits, which
fp16 holds exactly. `levels` turns that row into steps and floors.

Rounding to the nearest code, decoding and the straight-through mask follow from the levels. A grid
adds `plain`, the codes and numbers that its format's own plain rounding picks, and for GGUF files
`parts`, the bytes. Where a step is 0 the code is that of q = 0.

A chain of k torch operations over a whole tensor moves it through memory k times, and pays for k
temporaries. Cut into pieces of at most torch's own grain (32,768 elements, below which it starts no
OpenMP region) the chain runs from cache; torch releases the interpreter lock inside operations, so
plain threads scale. The cuts, and so the results, do not depend on the number of threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

GRAIN = 32_768  # elements of one piece
HALVINGS = 10  # of the way from a code's value to a weight, to find where the code ends
FIRST_ROWS = 8  # of a matrix, which tell in no time that it does not lie on a grid
# Squared error beside the squares of a matrix that lies on a grid: stored as bf16 it has up to
# 8e-6 on llama.cpp's; one that lies nowhere loses 2.8e-5 on Q8_0.
UNMOVED = 1e-5
CELL_MARGIN = 0.2  # of that way a weight stays clear of the end, or a first step would cross it


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="chunks")


def ratio(x: Tensor | float, d: Tensor) -> Tensor:
    """x / d, rounded once (for a number x torch's `x / d` is x * (1 / d)), and 0 where that is not
    finite.
    """
    return torch.div(torch.as_tensor(x), d).nan_to_num_(0.0, 0.0, 0.0)


def inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where that is not finite."""
    return ratio(1.0, d)


def unmoved(before: Tensor, after: Tensor) -> bool:
    """Whether a rounded matrix is what it was but for the rounding of scales, or of a checkpoint
    to bf16: UNMOVED.
    """
    return bool((after - before).square().sum() <= UNMOVED * before.square().sum())


class Grid:
    """A block format. Weights and codes (R, C), C a multiple of `block`; scales fp16 (R, C / block
    * stored).
    """

    name: str  # for messages
    bits_per_weight: float
    block = 32  # 0: a whole row
    group = 32  # 0: the whole block
    row = 0  # what a file's rows are multiples of; 0: of a block
    stored = 1
    low: int
    high: int
    offset = 0
    dtype = torch.uint8
    largest: float  # magnitude of a weight beyond which a stored fp16 number may overflow
    searches = False
    learns = False  # whether its scales can be trained: steps of any size, one a block

    def length(self, columns: int) -> int:
        """Weights in a block of a matrix with that many columns."""
        return self.block or columns

    def check(self, w: Tensor, name: str = "weight") -> None:
        """ValueError naming the tensor when the grid can't hold it: shape, NaN, infinity, a scale
        beyond fp16.
        """
        # Rows of whole blocks, or one block, as GPTQ brings them.
        columns = w.shape[-1] if w.dim() == 2 else 0
        block = self.length(columns) or 1
        row = self.row or block
        if columns == 0 or (columns % row and columns != block):
            legal_columns = max(row, round(columns / row) * row)
            raise ValueError(
                f"{name} has shape {tuple(w.shape)}: {self.name} needs a matrix whose rows are"
                f" multiples of {row} long; the nearest legal row length is {legal_columns}"
            )

        # Values that a stored scale can reach.
        least, most = w.aminmax()
        if not (torch.isfinite(least) and torch.isfinite(most)):
            raise ValueError(
                f"{name} holds NaN or infinity: {self.name} takes finite values; repair the"
                " checkpoint it came from"
            )
        if max(-least.item(), most.item()) > self.largest:
            raise ValueError(
                f"{name} holds a value beyond {self.largest:g}: its scales on {self.name} do"
                " not reach it; rescale the weights"
            )

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, block) fp32 -> (N, block) codes, (N, stored) numbers of the format's own rounding
        without an importance matrix.
        """
        raise NotImplementedError

    def rounded(self, q: Tensor) -> Tensor:
        """(x - floor) / step -> the grid's nearest numbers q, in place."""
        return q.round_().clamp_(self.low, self.high)

    def inside(self, q: Tensor) -> Tensor:
        """(x - floor) / step -> 1.0 where rounding it stays in the range of codes, else 0.0;
        overwrites q.
        """
        # Several times faster than a mask of bools.
        return q.round_().clamp(self.low, self.high).eq_(q)

    def stored_codes(self, q: Tensor) -> Tensor:
        """Numbers q -> the codes that are stored, in place."""
        return q.add_(self.offset) if self.offset else q

    def numbers(self, codes: Tensor) -> Tensor:
        """Stored codes, fp32 -> numbers q, in place."""
        return codes.sub_(self.offset)

    def levels(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, stored) -> the steps and the floors of its groups, each fp32 (N, block / group, 1);
        None: no floor.
        """
        return stored.float().unsqueeze(-1), None

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(R, C), (R, C / block * stored) -> (R, C / block * bytes per block) uint8: the rows of a
        GGUF.
        """
        blocks = codes.reshape(-1, self.length(codes.shape[1]))
        return torch.cat(self.parts(blocks, scales.reshape(len(blocks), -1)), dim=1).view(
            len(codes), -1
        )

    def parts(self, codes: Tensor, scales: Tensor) -> list[Tensor]:
        """(N, block), (N, stored) -> the bytes of each block, uint8, in pieces (N, any)."""
        raise ValueError(
            f"grid {self.name} is not llama.cpp's and has no bytes in a GGUF; export"
            " compressed_tensors"
        )

    def search(self, w: Tensor, importance: Tensor | None = None, name: str = "weight") -> Tensor:
        """fp32 (R, C) -> scales of less squared error than `plain`'s, on grids that have such a
        search.
        """
        raise ValueError(f"{name}: grid {self.name} has no search of scales; use scales=round")

    def encode(self, w: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
        """fp32 (R, C) -> codes (R, C), scales of plain rounding; on llama.cpp's grids what its
        quantizer writes, bit for bit.
        """
        self.check(w, name)
        codes = w.new_empty(w.shape, dtype=self.dtype)
        scales = w.new_empty(
            len(w), w.shape[1] // self.length(w.shape[1]) * self.stored, dtype=torch.float16
        )

        def work(x: Tensor, q: Tensor, stored: Tensor) -> None:
            q[:], stored[:] = self.plain(x)

        self._each(work, w.detach().float(), codes, scales)
        return codes, scales

    def holds(self, w: Tensor, name: str = "weight") -> bool:
        """Whether a matrix (R, C) lies on this grid already, as one that was read from a file on it
        does: plain rounding moves it by no more than the rounding of its scales, or of a checkpoint
        to bf16. May be False on grids whose plain rounding does not find the scales again
        (iq4_nl, int4_asym).
        """
        w = w.detach().float()
        return all(
            unmoved(rows, self.decode(*self.encode(rows, name))) for rows in (w[:FIRST_ROWS], w)
        )

    def trial(self, w: Tensor, name: str = "weight") -> Tensor:
        """fp32 (R, C) -> what it decodes to after plain rounding, or on grids where that takes
        long after a quicker one: to compare weights by.
        """
        return self.decode(*self.encode(w, name))

    def codes(self, w: Tensor, scales: Tensor) -> Tensor:
        """(R, C), scales whose steps have either sign -> (R, C) stored codes, the nearest on that
        grid.
        """
        codes = w.new_empty(w.shape, dtype=self.dtype)

        def work(x: Tensor, stored: Tensor, out: Tensor) -> None:
            q = self.rounded(self._quotient(x, *self.levels(stored)))
            out[:] = self.stored_codes(q).flatten(1)

        self._each(work, w.detach().float(), scales, codes)
        return codes

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(R, C), scales -> fp32 (R, C): what every reader of the file computes."""
        values = codes.new_empty(codes.shape, dtype=torch.float32)

        def work(q: Tensor, stored: Tensor, out: Tensor) -> None:
            self._value(self.numbers(self._grouped(out.copy_(q))), *self.levels(stored))

        self._each(work, codes, scales, values)
        return values

    def snap(self, w: Tensor, scales: Tensor, values: Tensor) -> None:
        """decode(codes(w, scales), scales) into `values` fp32 (R, C), in one pass over memory."""

        def work(x: Tensor, stored: Tensor, out: Tensor) -> None:
            step, floor = self.levels(stored)
            self._value(
                self.rounded(self._quotient(x, step, floor, self._grouped(out))), step, floor
            )

        self._each(work, w.detach(), scales, values)

    def gradients(
        self, w: Tensor, scales: Tensor, grad: Tensor, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """From `grad`, of what `snap` gives, (R, C), to that of w: `grad` where rounding (w -
        floor) / step stays inside the range of codes, 0 elsewhere; and with those `values` to that
        of the log of each block's scale (R, C / block), in one pass over memory.

        A scale multiplies codes and divides weights: g . value of the block, less g . w where no
        code was clamped.
        """
        passed = w.new_empty(w.shape)
        moved = (
            None if values is None else w.new_empty(len(w), w.shape[1] // self.length(w.shape[1]))
        )

        def work(x: Tensor, stored: Tensor, g: Tensor, out: Tensor, *learned: Tensor) -> None:
            torch.mul(g, self.inside(self._quotient(x, *self.levels(stored))).flatten(1), out=out)
            if learned:
                value, shift = learned
                shift[:, 0] = torch.linalg.vecdot(g, value.float()) - torch.linalg.vecdot(out, x)

        learned = () if moved is None else (values, moved)
        self._each(work, w.detach(), scales, grad, passed, *learned)
        return passed, moved

    def within(self, w: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """fp32 (R, C): w where it rounds to `codes`, else the point on the way from the code's
        value to w where that code ends, less CELL_MARGIN of the way.
        """
        kept = torch.empty_like(w, dtype=torch.float32)
        values = self.decode(codes, scales)

        def work(x: Tensor, q: Tensor, stored: Tensor, value: Tensor, out: Tensor) -> None:
            levels = self.levels(stored)

            def is_code(point: Tensor) -> Tensor:
                found = self.stored_codes(self.rounded(self._quotient(point, *levels)))
                return found.flatten(1) == q

            # Cells are intervals around their values: how far x may be followed is halved in.
            way = x - value
            share, step = torch.zeros_like(x), 0.5
            for _ in range(HALVINGS):
                share += step * is_code(value + (share + step) * way)
                step /= 2
            out[:] = torch.where(is_code(x), x, value + (1 - CELL_MARGIN) * share * way)

        self._each(work, w.detach().float(), codes, scales, values, kept)
        return kept

    def _grouped(self, x: Tensor) -> Tensor:
        """(N, block) -> (N, block / group, group), the same memory."""
        return x.view(len(x), -1, self.group or x.shape[1])

    def _quotient(
        self, x: Tensor, step: Tensor, floor: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """(N, block) -> (x - floor) / step, not yet rounded, (N, block / group, group)."""
        over = inverse(step)
        if floor is None:
            return torch.mul(self._grouped(x), over, out=out)
        return torch.sub(self._grouped(x), floor, out=out).mul_(over)

    def _value(self, q: Tensor, step: Tensor, floor: Tensor | None) -> None:
        """q -> step * q + floor, in place."""
        q.mul_(step)
        if floor is not None:
            q.add_(floor)

    def _each(self, work: Callable[..., None], matrix: Tensor, *others: Tensor) -> None:
        """`work` without gradient on pieces (N, any) of the blocks of a matrix (R, C) and of what
        belongs to them, on all threads; on anything but a CPU on all blocks at once. What is
        written must be contiguous.
        """
        length = self.length(matrix.shape[1])
        blocks = matrix.numel() // length
        if not blocks:  # of a process that has no rows
            return
        tensors = [tensor.reshape(blocks, -1) for tensor in (matrix, *others)]

        # Blocks of one piece; no more threads than pieces.
        on_cpu = matrix.device.type == "cpu"
        size = max(1, GRAIN // length)
        threads = min(torch.get_num_threads(), -(-blocks // size))
        piece = size if on_cpu else max(blocks, 1)

        def span(start: int, stop: int) -> None:
            with torch.inference_mode(False), torch.no_grad():  # both are thread-local
                for at in range(start, stop, piece):
                    work(*(tensor[at : min(at + piece, stop)] for tensor in tensors))

        if threads <= 1 or not on_cpu:
            span(0, blocks)
            return

        # Each thread takes neighbouring pieces, cut where one thread would cut them.
        bounds = [
            min(blocks, -(-blocks // piece) * i // threads * piece) for i in range(threads + 1)
        ]
        list(_pool(threads).map(span, bounds[:-1], bounds[1:]))  # raises what a piece raised
