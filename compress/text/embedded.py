"""Text that is on every machine: the running Python's own documentation, and conversations that
ship with the package.
"""

from __future__ import annotations

import ast
import inspect
import json
import lzma
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from compress.assets import configs_dir
from compress.models.chats import plain_text

SKIPPED_MODULES = (
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "__pycache__",
)
# Shorter docstrings are one-line summaries that teach little and cost an EOS each.
MIN_CHARACTERS = 80
HELDOUT_SHARE = 0.1  # of the embedded conversations
Plain = str | list[dict[str, Any]]  # a text, or turns of a chat


@cache
def _docstrings() -> tuple[tuple[str, str], ...]:
    root = Path(sysconfig.get_path("stdlib"))
    names: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if any(part in SKIPPED_MODULES for part in parts):
            continue

        # A few files of other Python versions lie in some installations.
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue

        # A text that several names share is kept under the first.
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        for name, text in _docs_below(tree, module):
            if len(text) >= MIN_CHARACTERS:
                names.setdefault(text, name)
    return tuple((name, text) for text, name in names.items())


def _docs_below(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(node):
        yield name, inspect.cleandoc(text)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docs_below(child, f"{name}.{child.name}")


def _docstring_chat() -> list[Plain]:
    chats: list[Plain] = []
    for name, text in _docstrings():
        answer = " ".join(text.split("\n\n")[0].split())
        if name.count(".") >= 1 and "._" not in name and MIN_CHARACTERS <= len(answer) <= 600:
            question = f"What does `{name}` do in Python's standard library?"
            chats.append(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            )
    return chats


def conversations_file() -> Path:
    """The conversations that ship with the package."""
    return configs_dir() / "conversations" / "conversations.jsonl.xz"


@cache
def _conversations() -> tuple[list[Plain], list[Plain]]:
    """Those to train on and those held out."""
    with lzma.open(conversations_file(), "rt", encoding="utf-8") as lines:
        rows: list[Plain] = [json.loads(line)["messages"] for line in lines]
    kept = len(rows) - round(HELDOUT_SHARE * len(rows))
    return rows[:kept], rows[kept:]


def _questions(chats: list[Plain]) -> list[Plain]:
    """Chats as plain text, for teachers that have no chat template."""
    return [plain_text(chat) for chat in chats if not isinstance(chat, str)]


EMBEDDED: dict[str, Callable[[], list[Plain]]] = {
    "docstrings": lambda: [text for _, text in _docstrings()],
    "topics": lambda: [text.strip() for _, text in sorted(topics.items())],
    "docstring_chat": _docstring_chat,
    "conversations": lambda: _conversations()[0],
    "conversations_heldout": lambda: _conversations()[1],
    "questions": lambda: _questions(_conversations()[0]),
    "questions_heldout": lambda: _questions(_conversations()[1]),
}
