"""The header of a GGUF file, read within bounds before any other reader sees the file.

The `gguf` package and llama.cpp believe the counts that a header gives and allocate by them. Here
every count is held against the bytes that the file has, so that a damaged or hostile file is
refused in one sentence, in little memory.
Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
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
# number of a metadata type -> its struct format; 8 is a string, 9 an array
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

    def refuse(self, what: str) -> ValueError:
        return ValueError(
            f"{self.file} is no whole GGUF ({what} at byte {self.place:,} of {len(self.data):,}); "
            f"{AGAIN}"
        )

    def skip(self, count: int, what: str) -> int:
        """Go on by so many bytes; where they began."""
        start = self.place
        if count > len(self.data) - start:
            raise self.refuse(f"{what} claims {count:,} bytes")
        self.place += count
        return start

    def number(self, kind: str, what: str) -> Any:
        start = self.skip(struct.calcsize(f"<{kind}"), what)
        return struct.unpack_from(f"<{kind}", self.data, start)[0]

    def text(self, what: str, most: int | None = None) -> str:
        length = self.number("Q", what)
        if most is not None and length > most:
            raise self.refuse(f"{what} claims {length:,} bytes")
        start = self.skip(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.refuse(f"{what} is not UTF-8") from error

    def value(self, what: str) -> Any:
        """A metadata value; of an array what it holds."""
        kind = self.number("I", what)
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            raise self.refuse(f"{what} is of type {kind}, which is unknown")
        of, count = self.number("I", what), self.number("Q", what)
        self.elements += count
        if self.elements > ELEMENTS:
            raise self.refuse(f"{what} claims {count:,} elements; at most {ELEMENTS:,} are read")
        if of in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[of]}"), what)
        elif of == STRING:
            for _ in range(count):
                self.text(what)
        else:
            raise self.refuse(f"{what} is an array of type {of}; arrays of arrays are not read")
        return Items(of, count)


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
    cursor.skip(4, "the magic number")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise cursor.refuse(f"version {version} where 2 or 3 is read, in little-endian order")
    count, keys = (
        cursor.number("Q", "the count of tensors"),
        cursor.number("Q", "the count of keys"),
    )
    if max(count, keys) > ENTRIES:
        raise cursor.refuse(
            f"{count:,} tensors and {keys:,} keys are claimed, at most {ENTRIES:,} are read"
        )
    fields: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text("a key", NAME_BYTES)
        if key in fields:
            raise cursor.refuse(f"key {key!r} is there twice")
        fields[key] = cursor.value(f"key {key!r}")
    return Header(fields, _tensors(cursor, count, fields.get("general.alignment", 32)))


def _tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of every tensor.

    ValueError: data that leave the file or overlap, a type that is not known.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise cursor.refuse(f"general.alignment is {alignment!r}")
    tensors: dict[str, tuple[int, ...]] = {}
    spans = []
    for _ in range(count):
        name = cursor.text("a tensor's name", NAME_BYTES)
        rank = cursor.number("I", f"tensor {name!r}")
        if name in tensors or not 1 <= rank <= 4:
            raise cursor.refuse(
                f"tensor {name!r} has {rank} dimensions"
                if name not in tensors
                else f"tensor {name!r} is there twice"
            )
        shape = tuple(cursor.number("Q", f"tensor {name!r}") for _ in range(rank))
        kind, start = cursor.number("I", f"tensor {name!r}"), cursor.number("Q", f"tensor {name!r}")
        sizes = (
            GGML_QUANT_SIZES.get(GGMLQuantizationType(kind))
            if kind in {one.value for one in GGMLQuantizationType}
            else None
        )
        if sizes is None:
            raise cursor.refuse(f"tensor {name!r} is of type {kind}, which is unknown")
        if min(shape) < 1 or shape[0] % sizes[0] or start % alignment:
            raise cursor.refuse(f"tensor {name!r} of shape {shape} can't begin at {start:,}")
        tensors[name] = shape
        spans.append((start, math.prod(shape) // sizes[0] * sizes[1], name))
    first, end = -(-cursor.place // alignment) * alignment, 0
    for start, size, name in sorted(spans):
        if start < end:
            raise cursor.refuse(f"tensor {name!r} overlaps another")
        end = start + size
        if first + end > len(cursor.data):
            raise cursor.refuse(f"tensor {name!r} ends at byte {first + end:,}")
    return tensors


def check_file(file: Path) -> Header:
    """The header of a GGUF that is a whole model.

    ValueError: damaged, one part of several, or without the tensors that its metadata name.
    """
    header = read_header(file)
    fields, tensors = header
    parts = fields.get("split.count", 1)
    if parts != 1:
        number = fields.get("split.no", 0)
        first = (
            f"part {number + 1} of {parts}" if isinstance(number, int) else f"one of {parts} parts"
        )
        raise ValueError(
            f"{file} is {first} of a model; join them with `llama-gguf-split --merge` on the first "
            "part and give the file it writes"
        )
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
    dense = family in ("llama", "qwen2") and not fields.get(f"{family}.expert_count")
    wanted = ["token_embd.weight", "output_norm.weight"] if dense else []
    wanted += [f"blk.{i}.{name}.weight" for i in range(blocks) for name in BLOCK if dense]
    lacking = [name for name in wanted if name not in tensors]
    present = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    lacking += [f"blk.{i}" for i in range(blocks) if str(i) not in present and not dense]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ValueError(
            f"{file} has {blocks} blocks by its metadata and lacks {', '.join(lacking[:3])}{more}; "
            f"{AGAIN}, or join its parts"
        )
    return header


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
