"""Where AdamW's two moments lie, and in how many bits.

    fp32   on the device: 8 bytes a weight
    int8   a byte a number, with an fp32 scale for every BLOCK of them (arXiv 2110.02861, section
           2): 2.03 bytes a weight. The codes are bitsandbytes' dynamic ones, signed for the mean
           and unsigned for the square, by its own kernels; vectors and small matrices stay fp32,
           as in its AdamW8bit. Codes and scales are one tensor of bytes.
    host   fp32 in host memory: none on the device, and 16 bytes a weight through the bus at every
           step

An update is the same for all: in fp32, one parameter at a time, and only then rounded. Left out:
bitsandbytes' optimizer itself, which rounds bf16 weights to nearest, where small updates vanish
(`train/optimizer.py`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from compress.train import parallel

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names
BLOCK = 256  # numbers with a scale of their own
UPDATED = 1 << 24  # numbers that are moved at once: their fp32 copies are 64 MB each
SMALLEST = 4096  # numbers of a parameter whose moments take 8 bits


@lru_cache
def _code(name: str, device: torch.device) -> Tensor:
    """fp32 (256,): what the codes of a moment stand for, of a largest number 1."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == MOMENTS[0]).to(device)


def in_bytes(count: int, kind: str) -> bool:
    """Whether the moments of so many weights are kept in 8 bits."""
    return kind == "int8" and count >= SMALLEST


def empty_moments(p: Tensor, kind: str) -> dict[str, Tensor]:
    """Both moments of a parameter, zero, as they are kept."""
    if in_bytes(p.numel(), kind):
        packed = {}
        for name in MOMENTS:
            zeros = torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
            packed[name] = _packed(name, zeros)
        return packed
    place = torch.device("cpu") if kind == "host" else p.device
    return {
        name: torch.zeros_like(p.detach(), dtype=torch.float32, device=place) for name in MOMENTS
    }


def rows_at_once(p: Tensor) -> int:
    """Rows of a parameter that are moved at once: UPDATED numbers, whole BLOCKs of them."""
    width = p.numel() // max(1, len(p)) if p.dim() else 1
    return max(BLOCK, UPDATED // max(1, width) // BLOCK * BLOCK)


def read_moment(name: str, kept: Tensor, first: int, count: int, like: Tensor) -> Tensor:
    """Rows of this rank's part of a moment in fp32, in the shape and on the device of `like`: from
    the row `first` on, of a parameter of `count` numbers. What is kept so is given as it is.
    """
    if kept.dtype != torch.uint8:
        part = parallel.local(kept)
        return (part.narrow(0, first, len(like)) if part.dim() else part).to(like.device)

    from bitsandbytes.functional import dequantize_blockwise

    codes, scales = _places(kept, first, count, like)
    code = _code(name, kept.device)
    return dequantize_blockwise(codes, absmax=scales, code=code, blocksize=BLOCK).view(like.shape)


def write_moment(name: str, kept: Tensor, first: int, count: int, moment: Tensor) -> None:
    """Keep rows that `read_moment` gave, changed."""
    if kept.dtype != torch.uint8:
        part = parallel.local(kept)
        part = part.narrow(0, first, len(moment)) if part.dim() else part
        if part.data_ptr() != moment.data_ptr():
            part.copy_(moment)
        return
    codes, scales = _places(kept, first, count, moment)
    packed = _packed(name, moment.flatten())
    codes.copy_(packed[: len(codes)])
    scales.copy_(packed[len(codes) + -len(codes) % 4 :].view(torch.float32))


def _places(kept: Tensor, first: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where codes and scales of these rows lie."""
    start = first * (like.numel() // len(like))
    scales = kept[count + -count % 4 :].view(torch.float32)
    blocks = slice(start // BLOCK, -(-(start + like.numel()) // BLOCK))
    return kept[start : start + like.numel()], scales[blocks]


def _packed(name: str, moment_N: Tensor) -> Tensor:
    """uint8: a byte a number, filled up to whole scales of 4 bytes, then the scales' bytes."""
    from bitsandbytes.functional import quantize_blockwise

    codes, state = quantize_blockwise(
        moment_N.contiguous(), code=_code(name, moment_N.device), blocksize=BLOCK
    )
    filling = codes.new_zeros(-len(moment_N) % 4)
    return torch.cat([codes.flatten(), filling, state.absmax.float().view(torch.uint8)])
