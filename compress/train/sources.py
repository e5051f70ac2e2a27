"""Where text comes from. A *source* is one string:

embedded:docstrings      docstrings of the running Python's standard library (PSF licence), read with `ast`, never imported
embedded:topics          `pydoc_data.topics`, the language reference's help texts (PSF licence)
embedded:docstring_chat  question and answer pairs made of the docstrings' first paragraphs
PATH                     .txt (documents split at blank lines), .jsonl / .json lines or .parquet with `text`, `messages`, or a
                         `prompt|question` / `answer|response|completion` pair
hub:NAME[@CONFIG]:SPLIT:FIELD   a hub dataset (FIELD as above; needs the network)
generated:COUNTxTOKENS:PROMPTS  what the teacher writes on the first COUNT documents of another source (`generated.py`)
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

Document = str | list[dict[str, str]]
SKIPPED_MODULES = ("test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "__pycache__")
MIN_CHARACTERS = 80  # shorter docstrings are one-line summaries that teach little and cost an EOS each


@cache
def _docstrings() -> tuple[tuple[str, str], ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if any(part in SKIPPED_MODULES for part in parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a few files of other Python versions lie in some installations
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        for name, text in _docs_below(tree, module):
            if len(text) >= MIN_CHARACTERS:
                found.setdefault(text, name)
    return tuple((name, text) for text, name in found.items())


def _docs_below(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, inspect.cleandoc(text)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docs_below(child, f"{name}.{child.name}")


def _topics() -> list[Document]:
    from pydoc_data.topics import topics

    return [topics[name].strip() for name in sorted(topics)]


def _docstring_chat() -> list[Document]:
    chats: list[Document] = []
    for name, text in _docstrings():
        answer = " ".join(text.split("\n\n")[0].split())
        if name.count(".") >= 1 and "._" not in name and MIN_CHARACTERS <= len(answer) <= 600:
            question = f"What does `{name}` do in Python's standard library?"
            chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return chats


EMBEDDED: dict[str, Callable[[], list[Document]]] = {
    "docstrings": lambda: [text for _, text in _docstrings()],
    "topics": _topics,
    "docstring_chat": _docstring_chat,
}


def _document(row: dict[str, Any], where: str) -> Document:
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("messages"), list):
        return row["messages"]
    question = row.get("prompt", row.get("question"))
    answer = row.get("answer", row.get("response", row.get("completion")))
    if isinstance(question, str) and isinstance(answer, str):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    raise ValueError(f"{where} has the fields {sorted(row)}; needed: text, messages, or prompt|question with answer|response|completion")


def _json_lines(path: Path) -> Iterator[Document]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error.msg}); one JSON object a line is needed") from error
            yield _document(row, f"{path}, line {number}")


def _from_hub(source: str) -> list[Document]:
    match = re.fullmatch(r"hub:([^:@]+)(?:@([^:]+))?:(.+):(\w+)", source)
    if not match:
        raise ValueError(f"data source {source!r} is not hub:NAME[@CONFIG]:SPLIT:FIELD, as in hub:Salesforce/wikitext@wikitext-2-raw-v1:test:text")
    try:
        return list(_from_datasets(match[1], name=match[2], split=match[3], field=match[4]))
    except (OSError, ConnectionError) as error:
        raise ValueError(
            f"data source {source} can't be had ({type(error).__name__}); check the name and the network, or use a local file"
        ) from error


def _from_datasets(path: str, **how: Any) -> Iterator[Document]:
    import datasets

    field = how.pop("field", None)
    for number, row in enumerate(datasets.load_dataset(path, **how)):
        yield row[field] if field else _document(row, f"{path}, row {number}")


def documents(source: str) -> list[Document]:
    """All documents of a source. ValueError when it is unknown, missing, malformed or has no text."""
    if source.startswith("embedded:"):
        name = source.removeprefix("embedded:")
        if name not in EMBEDDED:
            raise ValueError(f"data source {source!r} is unknown; embedded sources are {', '.join(sorted(EMBEDDED))}")
        found = EMBEDDED[name]()
    elif source.startswith("hub:"):
        found = _from_hub(source)
    else:
        found = _from_file(Path(source).expanduser())
    if not any(document.strip() if isinstance(document, str) else document for document in found):
        raise ValueError(f"data source {source} has no usable text; give a file with at least one document")
    return found


def _from_file(path: Path) -> list[Document]:
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist; sources are embedded:NAME, hub:NAME:SPLIT:FIELD or a .txt, .jsonl or .parquet file")
    if path.suffix == ".txt":
        return [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    if path.suffix in (".jsonl", ".json"):
        return list(_json_lines(path))
    if path.suffix == ".parquet":
        return list(_from_datasets("parquet", data_files=str(path), split="train"))
    raise ValueError(f"data file {path} ends in {path.suffix!r}; allowed: .txt, .jsonl, .json (one object a line), .parquet")
