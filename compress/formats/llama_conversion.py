"""llama.cpp's converter, from the copy that the package auto-round carries.

Only its folder `conversion/` is imported, without the rest of auto-round (which takes seconds and
230 MB), and `gguf` is made to fit: the converter is newer than the newest `gguf`, whose enums lack
names that classes of newer families mention beside those of old ones. A name without a value is
enough to import them. Left out: the llama.cpp checkout that auto-round would take from the
environment, and the newer converter that it would download.
"""

import importlib.util
import logging
import os
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import ConfigError

PACKAGE = "auto_round"
INSTALL = "pip install --no-deps auto-round==0.16.1"


def installed() -> bool:
    """Whether the package with the converter is there."""
    return importlib.util.find_spec(PACKAGE) is not None


@cache
def _folder() -> Path:
    """Where the package lies. ConfigError with the line to type when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "a GGUF of this family is written by llama.cpp's converter, which is in the package"
            f" auto-round, and that is not installed: {INSTALL}"
        )
    return Path(spec.submodule_search_locations[0])


@cache
def conversion() -> Any:
    """The converter. ConfigError when it is not installed."""
    folder = _folder() / "export" / "export_to_gguf" / "conversion"
    _name_all(folder)

    # Its modules import each other as `conversion`.
    with _alone():
        module = _module("conversion", folder / "__init__.py", folder)
    logging.getLogger("hf-to-gguf").setLevel(logging.CRITICAL)
    return module


def _module(name: str, file: Path, folder: Path | None = None) -> Any:
    """A file imported as `name`; with `folder` a package."""
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(folder)] if folder else None
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _alone() -> Iterator[None]:
    """The package as far as the converter needs it, one file of it, and nothing on `sys.path`."""
    names = [PACKAGE, f"{PACKAGE}.utils", f"{PACKAGE}.utils.path_safety"]
    before = {name: sys.modules.get(name) for name in names}
    variable = os.environ.get("NO_LOCAL_GGUF")
    os.environ["NO_LOCAL_GGUF"] = "1"
    try:
        for name in names[:2]:
            sys.modules[name] = types.ModuleType(name)
        _module(names[2], _folder() / "utils" / "path_safety.py")
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        if variable is None:
            os.environ.pop("NO_LOCAL_GGUF")


def _name_all(folder: Path) -> None:
    """Give `gguf` the names that the converter mentions and it lacks, without a value."""
    import gguf

    text = "".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py")))
    for kind, name in set(re.findall(r"gguf\.(MODEL_ARCH|MODEL_TENSOR)\.(\w+)", text)):
        enum: Any = getattr(gguf, kind)
        if not hasattr(enum, name):
            setattr(enum, name, None)


def converter_of(config: Any) -> Any:
    """The converter's class for a transformers config. ValueError when it has none, or one that
    needs a newer `gguf`.
    """
    architecture = (config.architectures or ["no architecture"])[0]
    module = conversion()
    try:
        with _alone():
            kind = module.get_model_class(architecture)
    except NotImplementedError as error:
        raise ValueError(
            f"{architecture} is not known to llama.cpp's converter; export compressed_tensors"
        ) from error
    if kind.model_arch is None:
        raise ValueError(
            f"{architecture} needs a newer gguf package than is installed; export"
            " compressed_tensors"
        )
    return kind


def pre_by_hash(tokenizer: Any) -> str | None:
    """The name that llama.cpp's converter has for the tokenizer whose ids of one long text have
    this hash; None where it knows none, or is not installed.
    """
    if not installed():
        return None
    try:
        name: str = conversion().TextModel.get_vocab_base_pre(None, tokenizer)
    except NotImplementedError:
        return None
    return name
