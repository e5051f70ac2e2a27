"""The header of a GGUF file, read within bounds before any other reader sees the file.

The `gguf` package and llama.cpp believe the counts that a header gives and allocate by them. Here
every count is held against the bytes that the file has, so that a damaged or hostile file is
refused in one sentence, in little memory.
Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress.doors import refuse_pointer

ENTRIES = 100_000  # keys, and tensors; the largest known files have 2,000
# Elements of all arrays together: readers make an object of each. A large vocabulary has 1.3
# million.
ELEMENTS = 4_000_000
LAYERS = 1_000  # blocks; the deepest known has 126
NAME_BYTES = 65_535
# Number of a metadata type -> its struct format; 8 is a string, 9 an array.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
AGAIN = "copy it again"
# What every block of a dense Llama has; Qwen 2 has biases besides.
BLOCK = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


class Items(NamedTuple):
    """An array that was stepped over."""

    kind: int  # number of its elements' type
    length: int


class Header(NamedTuple):
    """What a GGUF says of itself."""

    fields: dict[str, Any]  # scalars and strings as they are, arrays as `Items`
    tensors: dict[str, tuple[int, ...]]  # name -> dimensions, the fastest first


class _Cursor:
    """A place in the file that never leaves it. ValueError, naming the file, where it would."""

    def __init__(self, data: mmap.mmap, file: Path) -> None:
        self.data, self.file, self.place, self.elements = data, file, 0, 0

    def refuse(self, part: str) -> ValueError:
        return ValueError(
            f"{self.file} is no whole GGUF ({part} at byte {self.place:,} of {len(self.data):,}); "
            f"{AGAIN}"
        )

    def skip(self, count: int, part: str) -> int:
        """Go on by so many bytes; where they began."""
        start = self.place
        if count > len(self.data) - start:
            raise self.refuse(f"{part} claims {count:,} bytes")
        self.place += count
        return start

    def number(self, kind: str, part: str) -> Any:
        start = self.skip(struct.calcsize(f"<{kind}"), part)
        return struct.unpack_from(f"<{kind}", self.data, start)[0]

    def text(self, part: str, most: int | None = None) -> str:
        length = self.number("Q", part)
        if most is not None and length > most:
            raise self.refuse(f"{part} claims {length:,} bytes")
        start = self.skip(length, part)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.refuse(f"{part} is not UTF-8") from error

    def value(self, part: str) -> Any:
        """A metadata value; of an array what it holds."""
        kind = self.number("I", part)
        if kind in SCALARS:
            return self.number(SCALARS[kind], part)
        if kind == STRING:
            return self.text(part)
        if kind != ARRAY:
            raise self.refuse(f"{part} is of type {kind}, which is unknown")

        # An array is stepped over: its length is held against the bytes that are there.
        element_kind = self.number("I", part)
        count = self.number("Q", part)
        self.elements += count
        if self.elements > ELEMENTS:
            raise self.refuse(f"{part} claims {count:,} elements; at most {ELEMENTS:,} are read")

        if element_kind in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[element_kind]}"), part)
        elif element_kind == STRING:
            for _ in range(count):
                self.text(part)
        else:
            raise self.refuse(
                f"{part} is an array of type {element_kind}; arrays of arrays are not read"
            )
        return Items(element_kind, count)


def read_header(file: Path) -> Header:
    """Metadata and tensors of a GGUF file.

    ValueError naming the file: no GGUF, damaged, cut short, or counts beyond its bytes.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such GGUF file; check the path")
    refuse_pointer(file)
    with file.open("rb") as opened:
        if file.stat().st_size < 24 or opened.read(4) != b"GGUF":
            raise ValueError(
                f"{file} is no GGUF file; give a .gguf file, a checkpoint directory or a hub id"
            )
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(_Cursor(data, file))


def _header(cursor: _Cursor) -> Header:
    # Version, and counts that a reader would allocate by.
    cursor.skip(4, "the magic number")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise cursor.refuse(f"version {version} where 2 or 3 is read, in little-endian order")
    tensor_count = cursor.number("Q", "the count of tensors")
    key_count = cursor.number("Q", "the count of keys")
    if max(tensor_count, key_count) > ENTRIES:
        raise cursor.refuse(
            f"{tensor_count:,} tensors and {key_count:,} keys are claimed, at most {ENTRIES:,} are"
            " read"
        )

    # Keys and their values; then the tensors.
    fields: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("a key", NAME_BYTES)
        if key in fields:
            raise cursor.refuse(f"key {key!r} is there twice")
        fields[key] = cursor.value(f"key {key!r}")
    return Header(fields, _tensors(cursor, tensor_count, fields.get("general.alignment", 32)))


def _tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of every tensor.

    ValueError: data that leave the file or overlap, a type that is not known.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise cursor.refuse(f"general.alignment is {alignment!r}")

    # What each is called, its shape, its type and where it begins behind the header.
    tensors: dict[str, tuple[int, ...]] = {}
    spans = []
    for _ in range(count):
        name = cursor.text("a tensor's name", NAME_BYTES)
        part = f"tensor {name!r}"
        rank = cursor.number("I", part)
        if name in tensors:
            raise cursor.refuse(f"{part} is there twice")
        if not 1 <= rank <= 4:
            raise cursor.refuse(f"{part} has {rank} dimensions")
        shape = tuple(cursor.number("Q", part) for _ in range(rank))
        kind = cursor.number("I", part)
        start = cursor.number("Q", part)

        # A type's block: so many elements take so many bytes.
        if kind not in {one.value for one in GGMLQuantizationType}:
            sizes = None
        else:
            sizes = GGML_QUANT_SIZES.get(GGMLQuantizationType(kind))
        if sizes is None:
            raise cursor.refuse(f"{part} is of type {kind}, which is unknown")
        block_elements, block_bytes = sizes
        if min(shape) < 1 or shape[0] % block_elements or start % alignment:
            raise cursor.refuse(f"{part} of shape {shape} can't begin at {start:,}")
        tensors[name] = shape
        spans.append((start, math.prod(shape) // block_elements * block_bytes, name))

    _check_spans(cursor, spans, alignment)
    return tensors


def _check_spans(cursor: _Cursor, spans: list[tuple[int, int, str]], alignment: int) -> None:
    """Of (start, bytes, name) of every tensor: ValueError where two overlap or one leaves the file.

    They count from the first multiple of `alignment` behind the header.
    """
    data_start = -(-cursor.place // alignment) * alignment
    end = 0
    for start, size, name in sorted(spans):
        if start < end:
            raise cursor.refuse(f"tensor {name!r} overlaps another")
        end = start + size
        if data_start + end > len(cursor.data):
            raise cursor.refuse(f"tensor {name!r} ends at byte {data_start + end:,}")


def check_file(file: Path) -> Header:
    """The header of a GGUF that is a whole model.

    ValueError: damaged, one part of several, or without the tensors that its metadata name.
    """
    header = read_header(file)
    fields, tensors = header
    parts = fields.get("split.count", 1)

    # One part of several.
    if parts != 1:
        number = fields.get("split.no", 0)
        first = (
            f"part {number + 1} of {parts}" if isinstance(number, int) else f"one of {parts} parts"
        )
        raise ValueError(
            f"{file} is {first} of a model; join them with `llama-gguf-split --merge` on the first "
            "part and give the file it writes"
        )

    # Family and depth, by which everything else is looked up.
    family = fields.get("general.architecture")
    if not isinstance(family, str):
        raise ValueError(
            f"{file} names no general.architecture; it was not written by llama.cpp's converter: "
            "give another file"
        )
    blocks = fields.get(f"{family}.block_count")
    if type(blocks) is not int or not 1 <= blocks <= LAYERS:
        raise ValueError(
            f"{file}: {family}.block_count is {blocks!r}; needed is a whole number from 1 to "
            f"{LAYERS:,}: {AGAIN}"
        )

    # A dense Llama's or Qwen's tensors are known by name; of others each block must have one.
    dense = family in ("llama", "qwen2") and not fields.get(f"{family}.expert_count")
    names = ["token_embd.weight", "output_norm.weight"] if dense else []
    names += [f"blk.{i}.{name}.weight" for i in range(blocks) for name in BLOCK if dense]
    lacking = [name for name in names if name not in tensors]
    present = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    lacking += [f"blk.{i}" for i in range(blocks) if str(i) not in present and not dense]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ValueError(
            f"{file} has {blocks} blocks by its metadata and lacks {', '.join(lacking[:3])}{more}; "
            f"{AGAIN}, or join its parts"
        )
    return header


def read_metadata(file: Path) -> dict[str, Any]:
    """Metadata of a GGUF as `read_fields` gives them, arrays whole, kept of the two files read
    last: a large vocabulary takes a second. ValueError as `read_header`.
    """
    if not file.is_file():
        read_header(file)  # refuses it
    stat = file.stat()
    return dict(_metadata(file.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=2)
def _metadata(file: Path, *written: int) -> dict[str, Any]:
    """Of a file as it was written."""
    return read_fields(file)[0]


def read_fields(file: Path) -> tuple[dict[str, Any], list[Any]]:
    """Metadata of a GGUF as plain Python values, and its tensors as `gguf.ReaderTensor`.
    ValueError as `gguf_header.read_header`.
    """
    import gguf

    read_header(file)  # the reader below allocates what a header claims

    class Reader(gguf.GGUFReader):
        """Reads through a plain array: slicing a memmap object 1.5 million times takes 2 s, a view
        of it 0.5 s.
        """

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    try:
        reader = Reader(file)
        return {key: field.contents() for key, field in reader.fields.items()}, list(reader.tensors)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} can't be read as a GGUF ({error}); copy it again") from error
