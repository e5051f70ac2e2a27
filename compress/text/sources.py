"""Documents of a source of text, each a string or a chat; everything that is wrong with one is a
sentence with file and row.

A *source* is one string:

embedded:docstrings      docstrings of the running Python's standard library (PSF licence), read
        with `ast`, never imported
embedded:topics          `pydoc_data.topics`, the language reference's help texts (PSF licence)
embedded:docstring_chat  question and answer pairs made of the docstrings' first paragraphs
embedded:conversations   what the embedded teacher wrote out of nothing
        (`configs/conversations/README.md`), in its own chat template
embedded:conversations_heldout  the last tenth of these, which the source above leaves out: never
        trained on
embedded:questions, embedded:questions_heldout  the same as plain text, "Question: ..." and below it
        "Answer: ...", for teachers without a chat template
PATH  .txt (documents split at blank lines), .jsonl or .json (a row a line, or one array of rows),
      .parquet; all but the last also as .gz. A row is a string or has fields as in `rows.py`
hub:NAME[@CONFIG]:SPLIT:FIELD  a hub dataset (FIELD holds a text or turns; needs the network)
generated:COUNTxTOKENS:PROMPTS  what the teacher writes itself, out of nothing or on prompts
        (`written.py`)

Text is UTF-8. Half surrogates (`\\ud83d` alone, as cut text has them) become U+FFFD, which is said
once for a source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compress.doors import (
    UNPACKED_FACTOR,
    json_lines,
    parse_json,
    read_text,
    unpacked_bytes,
    without_halves,
)
from compress.models.chats import Chat, Document
from compress.text.embedded import EMBEDDED
from compress.text.rows import FIELDS, NEEDED, document

KINDS = "sources are embedded:NAME, hub:NAME:SPLIT:FIELD or a .txt, .jsonl or .parquet file"
PARQUET_ROWS = 256  # read together
Rows = Iterator[tuple[str, Any]]  # where a row stands, and what it is
Log = Callable[[str], None]


def quiet(message: str) -> None:
    """No log."""


def documents(source: str, log: Log = quiet) -> list[Document]:
    """All documents of a source but empty chats. ValueError when it is unknown, missing, malformed
    or has no text.
    """
    kind, _, name = source.partition(":")
    if kind == "embedded":
        if name not in EMBEDDED:
            raise ValueError(
                f"data source {source!r} is unknown; embedded sources are"
                f" {', '.join(sorted(EMBEDDED))}"
            )
        given = [
            text if isinstance(text, str) else Chat(text, where=f"{source}, row {i}")
            for i, text in enumerate(EMBEDDED[name](), 1)
        ]
    elif kind == "hub":
        given = [document(row, where) for where, row in _mended(_hub_rows(source), log)]
    elif kind == "generated":
        raise ValueError(
            f"data source {source[:80]!r} is what a teacher writes: it can't be read, nor be what"
            " another one is written on"
        )
    else:
        given = _from_file(Path(source).expanduser(), log)

    # A chat without turns says nothing; blank texts alone are no source.
    filled = [text for text in given if isinstance(text, str) or text]
    if not any(text.strip() if isinstance(text, str) else text for text in filled):
        raise ValueError(
            f"data source {source} has no usable text; give a file with at least one document"
        )
    return filled


def _mended(rows: Rows, log: Log) -> Rows:
    """The rows without half surrogates. ValueError for one that is nested too deep."""
    logged = False
    for where, row in rows:
        try:
            mended = without_halves(row)
        except RecursionError as error:
            raise ValueError(f"{where} is {error}; flatten it") from error

        # Once is enough for a source.
        if mended is not row and not logged:
            log(
                f"{where} holds half a character (a surrogate without its other half): U+FFFD"
                " stands in its place, here and below"
            )
            logged = True
        yield where, mended


def _from_file(path: Path, log: Log) -> list[Document]:
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a name that is too long for any file
        is_file = False
    if not is_file:
        name = re.sub(r":/+[^/@\s]*@", "://", str(path)[:200])  # without the password of a URL
        problem = (
            "is a directory; name the files in it"
            if len(str(path)) < 1000 and path.is_dir()
            else "does not exist"
        )
        raise ValueError(f"data file {name} {problem}; {KINDS}")

    # What it is by its name, packed or not.
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = (
        suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    )

    # Paragraphs of plain text are documents; rows may hold anything.
    if kind == ".txt":
        text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
        return [part.strip() for part in text.split("\n\n") if part.strip()]
    if kind in (".jsonl", ".json"):
        return [document(row, where) for where, row in _mended(_json_rows(path), log)]
    if kind == ".parquet" and suffixes[-1] == kind:
        return [document(row, where) for where, row in _mended(_parquet_rows(path), log)]
    allowed = ".txt, .jsonl, .json (an object a line, or one array), each also as .gz, and .parquet"
    raise ValueError(f"data file {path} ends in {path.suffix!r}; allowed: {allowed}")


def _json_rows(path: Path) -> Rows:
    """Values of JSON Lines, or those of a file that is one JSON array or one indented object."""
    text = read_text(path)
    if re.match(r"\s*\[", text):
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(parse_json(text, path), 1))
    elif re.match(r"\s*\{[ \t]*[\r\n]", text):  # one object over several lines
        yield f"{path}, row 1", parse_json(text, path)
    else:
        yield from json_lines(path, text)


def _parquet_rows(path: Path) -> Rows:
    """The known fields of a Parquet file's rows. ValueError when the file is damaged or has none
    of them.
    """
    import pyarrow.parquet as parquet
    from pyarrow.lib import ArrowException

    number = 0
    bytes_left = unpacked_bytes(path)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in FIELDS if name in names]
            if not columns:
                raise ValueError(f"{path} has the fields {sorted(names)}; {NEEDED}")

            # So few rows at once, and not more bytes in all than a real file would have.
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                bytes_left -= batch.nbytes
                if bytes_left < 0:
                    raise ValueError(
                        f"{path} unpacks to {UNPACKED_FACTOR} times its size and more; write it"
                        " anew"
                    )
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} can't be read as Parquet behind row {number} ({why}); copy it again"
        ) from error


def _hub_rows(source: str) -> Rows:
    """Rows of a hub dataset, each what `document` takes. ValueError when the source is malformed
    or can't be had.
    """
    match = re.fullmatch(r"hub:([^:@]+)(?:@([^:]+))?:(.+):(\w+)", source)
    if not match:
        raise ValueError(
            f"data source {source!r} is not hub:NAME[@CONFIG]:SPLIT:FIELD, as in"
            " hub:Salesforce/wikitext@wikitext-2-raw-v1:test:text"
        )
    name, config, split, field = match.groups()
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or Path(name).exists():
        raise ValueError(
            f"data source {source!r} names no dataset of the hub but a path; name the files"
            " themselves"
        )

    # Nothing but plain data is taken of the hub: a script that builds a dataset is refused.
    import datasets

    try:
        rows = datasets.load_dataset(name, name=config, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # scripts, unknown splits, no network, ...
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"data source {source} can't be had ({why}); check the name and the network, or use a"
            " local file"
        ) from error

    # A list is turns, whatever its field is called.
    for number, row in enumerate(rows, 1):
        if field not in row:
            raise ValueError(
                f"data source {source}: the dataset has the fields {sorted(row)}; name one of them"
                " behind the split"
            )
        given = row[field]
        yield (
            f"{name}, row {number}",
            {"messages": given, "tools": row.get("tools")} if isinstance(given, list) else given,
        )
