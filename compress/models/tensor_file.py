"""safetensors files written one tensor after the other, so that no second copy of a model is held.

The bytes are those of safetensors' own `save_file`: eight bytes of the header's length, the header
as compact JSON filled up with spaces to a multiple of eight, then tensors, those of longer items
first and by name within a type. A tensor is made when its turn comes, and let go of behind it.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Types as the format calls them, in the order in which it writes their tensors.
NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Entry(NamedTuple):
    """A tensor to be written: its type and shape, and what makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_tensors(file: Path, entries: Mapping[str, Entry], metadata: dict[str, str]) -> None:
    """Write them all. ValueError naming a tensor of a type that the format is not written with."""
    for name, entry in entries.items():
        if entry.dtype not in NAMES:
            raise ValueError(f"{name} is of type {entry.dtype}, which no safetensors file is given")
    ranks = list(NAMES)
    order = sorted(entries, key=lambda name: (ranks.index(entries[name].dtype), name))

    # Where each begins and ends, behind the header.
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for name in order:
        dtype, shape, _ = entries[name]
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = entries[name].make().detach().to("cpu").contiguous()
            assert tensor.shape == entries[name].shape and tensor.dtype == entries[name].dtype
            if tensor.numel():
                opened.write(tensor.flatten().view(torch.uint8).numpy().data)
