"""Types, shapes and places of tensors from the headers of safetensors files: no tensor is loaded.

A header that claims more bytes than its file has is refused before memory is taken.
"""

import math
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from compress.doors import HALVES, parse_json, refuse_pointer

HEADER_BYTES = 100_000_000  # the most that safetensors itself reads of a header
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class TensorPlace(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str  # as the format calls it: F32, BF16, I8, ...
    shape: tuple[int, ...]
    start: int  # byte of the file that its values begin at


# Name of a tensor -> the file that holds it, and its place.
Table = dict[str, tuple[Path, TensorPlace]]


def tensor_places(path: Path) -> dict[str, TensorPlace]:
    """Name -> dtype and shape of a safetensors file, from its header alone.

    ValueError naming the file: no safetensors, cut short, or a header that does not fit the file's
    bytes.
    """
    refuse_pointer(path)
    again = "copy it again, or convert it to safetensors"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            raise ValueError(
                f"{path} is no whole safetensors file ({size:,} bytes, its header claims"
                f" {length:,}); {again}"
            )
        raw = file.read(length)
    try:
        header = parse_json(raw.decode(), f"{path}: the header")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no safetensors file (its header is not UTF-8); {again}"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file (its header is no JSON object); {again}")
    told = header.pop("__metadata__", {})
    if not isinstance(told, dict) or not all(isinstance(one, str) for one in told.values()):
        raise ValueError(f"{path}: the header's __metadata__ is no table of texts; {again}")
    places, spans = {}, []
    for name, about in header.items():
        try:
            dtype, shape, (start, end) = (
                about["dtype"],
                tuple(about["shape"]),
                about["data_offsets"],
            )
            whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
            fits = (
                not HALVES.search(name)
                and whole
                and (dtype not in ITEM_BYTES or math.prod(shape) * ITEM_BYTES[dtype] == end - start)
            )
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"{path}: the header's entry for {name!r} makes no sense; {again}")
        places[name] = TensorPlace(dtype, shape, 8 + length + start)
        spans.append((start, end))
    position = 0
    for start, end in sorted(spans):
        if start != position or end < start:
            raise ValueError(f"{path}: tensors overlap or leave holes at byte {start:,}; {again}")
        position = end
    if position != size - 8 - length:
        raise ValueError(
            f"{path} has {size - 8 - length:,} bytes of tensors where its header claims"
            f" {position:,}; {again}"
        )
    return places


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's floating-point tensors, and of what compressed-tensors
    packed. ValueError when it is damaged.
    """
    places = tensor_places(file)
    plain = {
        name: place.shape
        for name, place in places.items()
        if "F" in place.dtype and not name.endswith(".weight_scale")
    }
    # Of a packed matrix the shape is a tensor by itself, and scales are no parameters.
    packed: dict[str, tuple[int, ...]] = {}
    if shapes := [name for name in places if name.endswith(".weight_shape")]:
        with safe_open(file, "pt") as tensors:
            packed = {name: tuple(tensors.get_tensor(name).tolist()) for name in shapes}
    return packed | plain
