"""Ends of a sequence as a checkpoint's files state them: config.json and generation_config.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.doors import read_json

KEY = "eos_token_id"
# Where an end of a text may be stated, as messages name it.
CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "the tokenizer's eos_token"
TEMPLATE = "the chat template"


def as_ids(value: Any, where: object) -> list[int]:
    """Token ids of an `eos_token_id`: none, one or a list. ValueError that begins with `where`."""
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(
            f"{where}: {KEY} {value!r} is neither a token id nor a list of them; "
            "give whole numbers from 0"
        )
    return list(dict.fromkeys(ids))


def as_value(ids: Sequence[int]) -> int | list[int]:
    """Ids as an `eos_token_id`: the number itself where there is one."""
    return ids[0] if len(ids) == 1 else list(ids)


def in_files(checkpoint: Path) -> dict[str, list[int]]:
    """The ids that config.json and generation_config.json name as ends. ValueError as `as_ids`."""
    ids_by_file = {}
    for name in (CONFIG, GENERATION):
        file = checkpoint / name
        if file.is_file() and (ids := as_ids(_value(file, KEY), file)):
            ids_by_file[name] = ids
    return ids_by_file


def vocabulary_rows(checkpoint: Path) -> int:
    """Rows of the model's head as config.json says, 0 where it does not."""
    rows = _value(checkpoint / CONFIG, "vocab_size") if (checkpoint / CONFIG).is_file() else 0
    return rows if type(rows) is int else 0


def _value(file: Path, key: str) -> Any:
    """A key of a configuration, or of the text model's inside a multimodal one."""
    about = read_json(file)
    inner = about.get("text_config")
    if about.get(key) is None and isinstance(inner, dict):
        return inner.get(key)
    return about.get(key)
