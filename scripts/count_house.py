"""Counts of the house: who imports whom, how dense a line is, how long a function, how it is named.

    python scripts/count_house.py [FOLDER ...]

Prints a table, and one line of JSON at the end. FOLDER is the package unless given; arrows and
circles are those of the package. Counted is code: lines that are not blank, comment or docstring;
tokens as Python's tokenizer sees them, without comments and layout; nodes are statements and
expressions of the syntax tree.
"""

from __future__ import annotations

import ast
import io
import json
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "compress"
COLUMNS = 100
PARAGRAPH_LINES = 12  # a function of so many lines of code has a paragraph in it
# What a floor's rooms may import stands below them; rooms of one floor don't import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("verbs",),
    ("handing", "solving"),
    ("accept", "ask", "doctor", "launch", "pipeline"),
    ("serve",),
    ("composing", "judging", "planning", "search", "ship"),
    ("rundir",),
    ("session",),
    ("config",),
    ("track",),
    ("report",),
    ("score",),
    ("stages", "teacher"),
    ("text",),
    ("formats",),
    ("quant",),
    ("distill",),
    ("prune", "train"),
    ("machine", "memory"),
    ("keys",),
    ("models",),
    ("budget", "collect"),
    ("confined", "recipe_text", "scratch", "store"),
    ("bounds", "command_line", "doors"),
    ("assets", "errors", "packages", "telemetry", "threads"),
)
# Participles and pronouns where a noun would say what a thing is.
EMPTY_NAMES = {
    *("found", "made", "own", "some", "wanted", "near", "left", "known", "said", "held"),
    *("whole", "how", "what", "mine", "its", "told"),
}


class Function(NamedTuple):
    """One function: where it is, its size, whether it has a paragraph and binds an empty name."""

    file: str
    name: str
    nodes: int
    lines: int
    code_lines: int
    paragraphs: bool
    empty_names: tuple[str, ...]


class Source:
    """A Python file with its syntax tree and its lines of code."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.text = file.read_text(encoding="utf-8")
        self.lines = self.text.split("\n")
        self.tree = ast.parse(self.text)
        self.docstring_lines = set(self._docstring_lines())
        self.tokens_by_line = self._tokens()

    def _docstring_lines(self) -> Iterator[int]:
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(self.tree):
            if isinstance(node, owners) and ast.get_docstring(node, clean=False) is not None:
                yield from range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)

    def _tokens(self) -> dict[int, int]:
        """Line of code -> tokens that begin on it; 0 inside a token of several lines."""
        layout = {
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        }
        counts: dict[int, int] = defaultdict(int)
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type in layout or token.start[0] in self.docstring_lines:
                continue
            counts[token.start[0]] += 1
            for line in range(token.start[0], token.end[0] + 1):
                counts[line] += 0
        return counts

    def long_lines(self) -> list[int]:
        """Numbers of lines above COLUMNS; a line that an URL makes long is none."""
        return [
            number
            for number, line in enumerate(self.lines, 1)
            if len(line) > COLUMNS and "://" not in line
        ]

    def functions(self) -> Iterator[Function]:
        """Every function, methods and inner ones included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield self._function(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
        end = node.end_lineno or node.lineno
        numbers = [n for n in range(node.lineno, end + 1) if n not in self.docstring_lines]
        text = [self.lines[number - 1].strip() for number in numbers]
        inner = list(ast.walk(node))
        names = {
            child.id
            for child in inner
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)
        }
        return Function(
            str(self.file.relative_to(ROOT)) if self.file.is_relative_to(ROOT) else self.file.name,
            node.name,
            sum(isinstance(child, ast.stmt | ast.expr) for child in inner),
            end - node.lineno + 1,
            sum(number in self.tokens_by_line for number in numbers),
            any(not line or line.startswith("#") for line in text),
            tuple(sorted(names & EMPTY_NAMES)),
        )


def sources(folder: Path) -> list[Source]:
    """All Python files below a folder."""
    return [Source(file) for file in sorted(folder.rglob("*.py"))]


def module_name(file: Path) -> str:
    """`models.checkpoint` of compress/models/checkpoint.py, `models` of its __init__."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(package: list[Source]) -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, anywhere in it; for type checkers too."""
    modules = {module_name(source.file) for source in package}
    arrows: dict[str, set[str]] = {}
    for source in package:
        names = set()
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compress"):
                base = (node.module or "").removeprefix("compress").lstrip(".")
                inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
                names |= (inner & modules) or {base}
            elif isinstance(node, ast.Import):
                names |= {alias.name.removeprefix("compress.") for alias in node.names}
        arrows[module_name(source.file)] = names & modules - {module_name(source.file), ""}
    return arrows


def room(module: str) -> str:
    """The room that a module is in: its folder, or itself."""
    return module.partition(".")[0]


def upward_arrows(arrows: dict[str, set[str]]) -> list[str]:
    """Imports between rooms that do not go down FLOORS, as "a -> b"."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    floor[""] = -1  # the package itself
    return sorted(
        f"{module} -> {other}"
        for module, others in arrows.items()
        for other in others
        if room(module) != room(other) and floor[room(module)] >= floor[room(other)]
    )


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not."""
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in arrows.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        reached[start] = seen
    groups = {
        frozenset(other for other in seen if start in reached.get(other, set()))
        for start, seen in reached.items()
        if start in seen
    }
    return sorted(sorted(group) for group in groups)


def counts(folder: Path) -> dict[str, float]:
    """The figures of a folder's code."""
    files = sources(folder)
    functions = [function for source in files for function in source.functions()]
    code_lines = sum(len(source.tokens_by_line) for source in files)
    tokens = sum(sum(source.tokens_by_line.values()) for source in files)
    longer = [function for function in functions if function.code_lines >= PARAGRAPH_LINES]
    return {
        "files": len(files),
        "code_lines": code_lines,
        "tokens": tokens,
        "tokens_per_code_line": round(tokens / code_lines, 2),
        "lines_over_100": sum(len(source.long_lines()) for source in files),
        "files_over_400_lines": sum(len(source.lines) > 401 for source in files),
        "functions": len(functions),
        "functions_over_80_lines": sum(function.lines > 80 for function in functions),
        "functions_over_300_nodes": sum(function.nodes > 300 for function in functions),
        "share_with_paragraphs": round(
            sum(function.paragraphs for function in longer) / max(1, len(longer)), 3
        ),
        "share_with_empty_names": round(
            sum(bool(function.empty_names) for function in functions) / max(1, len(functions)), 3
        ),
    }


def main() -> None:
    """The table, and JSON on the last line."""
    folders = [Path(name).resolve() for name in sys.argv[1:]] or [PACKAGE]
    record: dict[str, dict[str, float]] = {}
    for folder in folders:
        record[folder.name] = counts(folder)
    arrows = imports(sources(PACKAGE))
    record["house"] = {
        "upward_arrows": len(upward_arrows(arrows)),
        "circles": len(circles(arrows)),
        "readme_bytes": (ROOT / "README.md").stat().st_size,
    }
    for name, figures in record.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:26s} {value:>10,}")
    for arrow in upward_arrows(arrows):
        print("upward:", arrow)
    for circle in circles(arrows):
        print("circle:", " ".join(circle))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
