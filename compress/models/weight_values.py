"""The values in safetensors files, read piece by piece: no tensor is held whole."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from compress.models.shapes import Table, TensorPlace

TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
WHOLE = [name for name, dtype in TYPES.items() if not dtype.is_floating_point]


def pieces(file: Path, place: TensorPlace, size: int = 1 << 24) -> Iterator[bytes]:
    """The bytes of a tensor, so many at once."""
    bytes_left = math.prod(place.shape) * torch.empty((), dtype=TYPES[place.dtype]).element_size()

    with file.open("rb") as opened:
        opened.seek(place.start)
        while bytes_left:
            piece = opened.read(min(size, bytes_left))
            bytes_left -= len(piece)
            yield piece


def check_finite(path: Path, table: Table) -> None:
    """ValueError naming a tensor with NaN or infinity in it, or of a type that torch does not have.

    16 MB are held at once.
    """
    for name, (file, place) in table.items():
        if place.dtype not in TYPES:
            raise ValueError(
                f"{path}: tensor {name} is of type {place.dtype}; give the checkpoint in fp32, "
                "bf16 or fp16"
            )

        dtype = TYPES[place.dtype]
        if not dtype.is_floating_point:
            continue

        # torch has no test of its own for numbers of one byte.
        for piece in pieces(file, place):
            values = torch.frombuffer(bytearray(piece), dtype=dtype)
            if not (values.float() if dtype.itemsize == 1 else values).isfinite().all():
                raise ValueError(
                    f"{path}: tensor {name} in {file.name} holds NaN or infinity; copy the "
                    "checkpoint again, or train it again"
                )
