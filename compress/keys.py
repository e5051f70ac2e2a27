"""What a result depends on besides its inputs: our sources, and versions of what computes it.

A key that leaves one out serves old numbers as new ones; a key that takes in more makes everything
again for nothing. So sources are those that a module can reach by its imports, and packages are
listed for each kind of result.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.assets import PACKAGE
from compress.store import sha256_file, sha256_json

TEXT = ("tokenizers", "transformers", "jinja2")  # from text to token ids
SIGNALS = ("torch", "transformers", "tokenizers", "accelerate", "bitsandbytes", "torchao")
WEIGHTS = (*SIGNALS, "numpy", "scipy", "peft", "torch-pruning")
EXPORTS = ("torch", "transformers", "tokenizers", "numpy")  # and the packages that the format names
SCORES = ("torch", "transformers", "tokenizers", "jinja2", "numpy", "scipy", "lm-eval")
OF_RUNTIME: dict[str, tuple[str, ...]] = {  # besides SCORES
    "torch": ("compressed-tensors",),
    "llama.cpp": ("xllamacpp", "gguf"),
    "onnxruntime": ("onnx", "onnxruntime", "onnxruntime-genai"),
}


def versions_of(*packages: str) -> dict[str, str | None]:
    """Package -> its version; None where it is not installed, which decides results too."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return None


def token_inputs(teacher: Path) -> dict[str, Any]:
    """What ids of a text depend on: tokenizer and templates of a teacher, and what applies them."""
    from compress.models.tokenizer import tokenizer_digest

    return {"tokenizer": tokenizer_digest(teacher), "versions": versions_of(*TEXT)}


def author_inputs(teacher: Path) -> list[Any]:
    """What a teacher's own text depends on: all its files, and what makes prompts of them."""
    from compress.models.checkpoint import digest

    return [digest(teacher), versions_of(*TEXT)]


def sources_digest(*roots: str, package: Path = PACKAGE) -> str:
    """sha256 over the package's sources that `roots` reach by their imports.

    A root is a module, followed through its imports; `MODULE:` is that file alone, `MODULE:NAME`
    one class or function of it. AssertionError when there is no such module or name.
    """
    return _digest(roots, package)


@cache
def _digest(roots: tuple[str, ...], package: Path) -> str:
    digests: dict[str, str] = {}
    waiting = []
    for root in roots:
        module, colon, name = root.partition(":")
        file = _file(module, package)
        assert file, f"{root}: no such module of {package}"
        if not colon:
            waiting.append(file)
        else:
            digests[root] = sha256_json(_source_of(file, name)) if name else sha256_file(file)

    # By names inside the package, so that where it is installed does not count.
    for file in closure(waiting, package):
        digests[file.relative_to(package.parent).as_posix()] = sha256_file(file)
    return sha256_json(sorted(digests.items()))


def closure(files: list[Path], package: Path) -> list[Path]:
    """`files` of a package and those of it that they import, directly or not, in name order.

    What is imported for type checkers alone does not count.
    """
    reached = set[Path]()
    waiting = list(files)
    while waiting:
        if (file := waiting.pop()) not in reached:
            reached.add(file)
            waiting += _neighbours(file, package)
    return sorted(reached)


@cache
def _neighbours(file: Path, package: Path) -> list[Path]:
    """The package's files that one of them imports."""
    # NAME.__init__ of a package: one level up is itself.
    module = ".".join(file.relative_to(package.parent).with_suffix("").parts)
    names = _imported(ast.parse(file.read_bytes()), module)
    return [place for place in (_file(name, package) for name in names) if place]


def _imported(tree: ast.AST, module: str) -> Iterator[str]:
    """Absolute names that a module imports: of `from a import b` both, since b may be a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _imported(ast.Module(node.orelse, []), module)
            continue

        # A dot is the package that the module is in, each further one a level up.
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        yield from _imported(node, module)


def _file(module: str, package: Path) -> Path | None:
    """The file of a module of the package; None for any other name."""
    first, *rest = module.split(".")
    if first != package.name:
        return None
    place = package.joinpath(*rest)
    if (place / "__init__.py").is_file():
        return place / "__init__.py"
    file = place.with_suffix(".py")
    return file if rest and file.is_file() else None


def _source_of(file: Path, name: str) -> str:
    """The source of one class or function at a module's top level."""
    text = file.read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body if getattr(node, "name", None) == name]
    assert nodes, f"{file} has no {name}"
    return ast.get_source_segment(text, nodes[0]) or ""
