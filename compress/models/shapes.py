"""Types, shapes and places of tensors from the headers of safetensors files: no tensor is loaded.

A header that claims more bytes than its file has is refused before memory is taken.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from compress.doors import HALVES, parse_json, refuse_pointer

AGAIN = "copy it again, or convert it to safetensors"
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
    header, data_start = _header(path)

    # What the header says of each tensor.
    places: dict[str, TensorPlace] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape, (start, end) = _entry(path, name, entry)
        places[name] = TensorPlace(dtype, shape, data_start + start)
        spans.append((start, end))

    # Together they fill the file: no byte belongs to two, or to none.
    position = 0
    for start, end in sorted(spans):
        if start != position or end < start:
            raise ValueError(f"{path}: tensors overlap or leave holes at byte {start:,}; {AGAIN}")
        position = end
    data_bytes = path.stat().st_size - data_start
    if position != data_bytes:
        raise ValueError(
            f"{path} has {data_bytes:,} bytes of tensors where its header claims {position:,};"
            f" {AGAIN}"
        )
    return places


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Name -> entry of every tensor, unchecked, and the byte that tensors begin at. ValueError."""
    refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            raise ValueError(
                f"{path} is no whole safetensors file ({size:,} bytes, its header claims"
                f" {length:,}); {AGAIN}"
            )
        raw = file.read(length)

    # A table of tensors, and beside them texts for whoever wants them.
    try:
        header = parse_json(raw.decode(), f"{path}: the header")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no safetensors file (its header is not UTF-8); {AGAIN}"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file (its header is no JSON object); {AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
        raise ValueError(f"{path}: the header's __metadata__ is no table of texts; {AGAIN}")
    return header, 8 + length


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """A tensor's dtype, shape and bytes (from, up to), counted behind the header.

    ValueError where they are no such things, or the shape takes other bytes than the span has.
    """
    # Whatever the header holds in their place, no more than these operations can fail.
    try:
        dtype = entry["dtype"]
        shape = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        counts_only = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        fits = (
            not HALVES.search(name)
            and counts_only
            and (dtype not in ITEM_BYTES or math.prod(shape) * ITEM_BYTES[dtype] == end - start)
        )
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{path}: the header's entry for {name!r} makes no sense; {AGAIN}")
    return dtype, shape, (start, end)


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
