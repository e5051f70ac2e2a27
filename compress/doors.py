"""One door per file format: whatever a parser raises becomes one sentence that names the file, the
line and what to do.

Every file of text that somebody else may have written is read here: plain text, JSON, JSON Lines
and YAML (headers of safetensors: `models/shapes.py`). A document nested too deep to be read and an
alias that multiplies itself are refused before memory is taken.
"""

import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import nearest

# What a packed file may unpack to: so many bytes, or so many times its own size.
UNPACKED_BYTES, UNPACKED_FACTOR = 100_000_000, 100
JSON_DEPTH = 100  # of values inside values in a row of data
POINTER = b"version https://git-lfs"  # what a file holds that Git LFS has not fetched
# how text begins that is not UTF-8, the longer marks first
MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
HALVES = re.compile("[\ud800-\udfff]")  # of surrogate pairs
YAML_NODES = 100_000  # values in one, aliases written out


class Kind(NamedTuple):
    """What a value that somebody else wrote must be."""

    means: str  # as in "needed: a whole number from 1 to 9"
    holds: Callable[[Any], bool]
    needed: bool = True


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked when it ends in .gz. ValueError when it is no file, or its packing
    is damaged or multiplies it.
    """
    if not path.is_file():
        problem = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}; check the path")
    refuse_pointer(path)

    if path.suffix.lower() != ".gz":
        return path.read_bytes()

    # No more is unpacked than a real file would have.
    try:
        most = unpacked_bytes(path)
        with gzip.open(path) as file:
            data = file.read(most + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is no whole gzip file ({error}); copy it again, or take .gz off the name of a"
            " file that is not packed"
        ) from error

    if len(data) > most:
        raise ValueError(
            f"{path} unpacks to more than {most:,} bytes, {UNPACKED_FACTOR} times its own; unpack"
            " it, and look at what it is"
        )
    return data


def refuse_pointer(path: Path) -> None:
    """ValueError for the pointer that stands where Git LFS has not fetched a file."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its"
                " repository, or download the file"
            )


def refuse_mark(path: Path) -> None:
    """ValueError for a file with a byte order mark, where others who read it take none."""
    with path.open("rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            raise ValueError(
                f"{path} begins with a byte order mark, which transformers does not read; save it"
                " as UTF-8 without one"
            )


def unpacked_bytes(path: Path) -> int:
    """The most bytes that a packed file may unpack to: text shrinks to a tenth,
    seldom to a twentieth.
    """
    return max(UNPACKED_BYTES, UNPACKED_FACTOR * path.stat().st_size)


def read_text(path: Path) -> str:
    """A UTF-8 file's text without its byte order mark. ValueError naming the file and the line
    that is not UTF-8, or that holds a NUL character, as UTF-16 without a mark does.
    """
    data = read_bytes(path)
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), "")
    place = data.find(b"\0")
    if not marked and place < 0:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            place = error.start

    # How it can be made UTF-8.
    unpacked = path.name.removesuffix(".gz")
    if data[place] or marked:
        encoding = marked or "latin1"
    else:
        # Of UTF-16 text nearly half of the bytes are NUL: those behind or before a letter.
        halves = data[:1000].count(b"\0") * 3 > len(data[:1000])
        encoding = ("utf-16-le" if place % 2 else "utf-16-be") if halves else ""
    way = f"iconv -f {encoding} -t utf-8 {unpacked}" if encoding else f"tr -d '\\000' < {unpacked}"
    problem = f"it begins as {marked.upper()}" if marked else f"byte 0x{data[place]:02x}"
    line = 1 if marked else data.count(b"\n", 0, place) + 1
    raise ValueError(
        f"{path}, line {line} is not UTF-8 text ({problem}); convert it, as in: {way} >"
        f" utf8-{unpacked}"
    )


def parse_json(text: str, where: object) -> Any:
    """A JSON value. ValueError that begins with `where` and says what is wrong with it."""
    # json raises three classes, the last for integers of thousands of digits.
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(
            f"{where} is not JSON ({error.msg}, {place}); mend it or copy it again"
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{where} is nested too deep to be read; flatten it or copy it again"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{where} can't be read as JSON ({error}); mend it or copy it again"
        ) from error


def read_json(path: Path, kind: type | tuple[type, ...] = dict) -> Any:
    """A JSON file's value, which must be of `kind`. ValueError naming the file otherwise."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        needed = " or ".join(one.__name__ for one in kinds)
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}, needed: {needed}; copy the file again"
        )
    return value


def json_lines(path: Path, text: str | None = None) -> Iterator[tuple[str, Any]]:
    """("FILE, line N", value) of every line that is not blank. Lines end at line feeds or carriage
    returns, which no JSON string holds as they are, and at nothing else: it may hold U+2028.

    `text`: the file's, where it was read before. ValueError naming the file and the line that is
    not JSON.
    """
    text = read_text(path) if text is None else text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


def without_halves(value: Any, depth: int = 0) -> Any:
    """A JSON value with U+FFFD for each half of a surrogate pair: JSON can escape it (\\ud83d),
    UTF-8 and tokenizers can't hold it.

    What has none comes back as it is, the very object. RecursionError for a value nested more than
    JSON_DEPTH deep.
    """
    if isinstance(value, str):
        return value if value.isascii() or not HALVES.search(value) else HALVES.sub("\ufffd", value)

    if not isinstance(value, dict | list):
        return value
    if depth == JSON_DEPTH:
        raise RecursionError(f"nested more than {JSON_DEPTH} deep")

    # A new table or list only where something in it is new.
    below = depth + 1
    if isinstance(value, dict):
        pairs = {without_halves(key): without_halves(inner, below) for key, inner in value.items()}
        same = all(key in value and inner is value[key] for key, inner in pairs.items())
        return value if same else pairs
    rows = [without_halves(inner, below) for inner in value]
    return value if all(inner is old for inner, old in zip(rows, value, strict=True)) else rows


def refuse_halves(value: Any, where: object) -> None:
    """ValueError that begins with `where` for a JSON value that holds half of a surrogate pair."""
    try:
        has_none = without_halves(value) is value
    except RecursionError as error:
        raise ValueError(f"{where} is {error}; flatten it") from error
    if not has_none:
        raise ValueError(
            f"{where} holds half a character (a surrogate without its other half), which no"
            " tokenizer takes and no file holds; take it out"
        )


def _nodes(value: Any, counts: dict[int, int]) -> int:
    """How many values a YAML tree has once its aliases are written out. RecursionError for one
    that holds itself.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counts:
        counts[id(value)] = -1
        below = value.values() if isinstance(value, dict) else value
        counts[id(value)] = 1 + sum(_nodes(inner, counts) for inner in below)
    if counts[id(value)] < 0:
        raise RecursionError
    return counts[id(value)]


def parse_yaml(text: str, where: object) -> Any:
    """Plain data of a YAML text. ValueError that begins with `where`."""
    import yaml  # bundles hold none, and are checked where it is not installed

    try:
        tree = yaml.safe_load(text)
        nodes = _nodes(tree, {})
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not plain YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(
            f"{where} is nested too deep to be read, or holds itself; flatten it"
        ) from error

    # Aliases that name aliases can stand for more values than memory has.
    if nodes > YAML_NODES:
        raise ValueError(
            f"{where} has {nodes:,} values once its aliases are written out, at most {YAML_NODES:,}"
            " are read; write it plainly"
        )
    return tree


def whole(least: int, most: int) -> Kind:
    """A whole number in [least, most]."""
    return Kind(
        f"a whole number from {least:,} to {most:,}",
        lambda value: type(value) is int and least <= value <= most,
    )


def is_real(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold, NaN and infinity among them."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 1023  # JSON has whole numbers of any length
    return isinstance(value, float)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that a float can hold."""
    return is_real(value) and math.isfinite(value)


NUMBER = Kind("a finite number", is_number)
TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TABLE = Kind("a JSON object", lambda value: isinstance(value, dict))
TEXTS = Kind(
    "a list of texts",
    lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
)


def optional(kind: Kind) -> Kind:
    """The same, of a key that may be absent."""
    return kind._replace(needed=False)


def check_object(value: Any, kinds: Mapping[str, Kind], where: object) -> dict[str, Any]:
    """A JSON object whose keys are those of `kinds`, each of its kind. ValueError that begins with
    `where` and names the key.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a JSON {type(value).__name__}, needed: a JSON object")

    # A key that is misspelt would be ignored: it is named first.
    for key in value:
        if key not in kinds:
            raise ValueError(f"{where}: the key {key!r} is not known here; {nearest(key, kinds)}")

    for key, kind in kinds.items():
        if key not in value:
            if kind.needed:
                raise ValueError(f"{where}: the key {key!r} is missing; needed: {kind.means}")
        elif not kind.holds(value[key]):
            got = json.dumps(value[key])
            raise ValueError(
                f"{where}: {key!r} is {got if len(got) < 80 else got[:80] + ' ...'}, needed:"
                f" {kind.means}"
            )
    return value
