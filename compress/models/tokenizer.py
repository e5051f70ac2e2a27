"""A checkpoint's tokenizer: opened, checked, copied and hashed."""

import shutil
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress.doors import read_json
from compress.models.end_files import in_files
from compress.models.model_config import is_of_input, one_line, read_config
from compress.models.probe import check_tokenizer
from compress.store import files_digest

TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
# A folder of NAME.jinja: chat templates beside the default one.
MORE_TEMPLATES = "additional_chat_templates"


def tokenizer_digest(path: Path) -> str:
    """sha256 over the tokenizer's files, chat templates included: what token ids depend on."""
    return files_digest(path, tokenizer_files(path))


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights; one that names no end of its own gets the model's.

    ValueError naming its folder, and the file when one is damaged or its patterns fail on some text
    (`compress/models/probe.py`).
    """
    # The files are read here before transformers does: it refuses in many lines.
    check_tokenizer(path / "tokenizer.json")
    ends = list(chain.from_iterable(in_files(path).values()))

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:
        if not is_of_input(error):
            raise

        # A damaged JSON file is named by itself.
        for file in tokenizer_files(path):
            if file.suffix == ".json":
                read_json(file)
        raise ValueError(
            f"{path}: its tokenizer can't be opened ({one_line(error)}); copy the tokenizer's files"
            " again"
        ) from error

    if tokenizer.eos_token_id is None and ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def token_count(tokenizer: Any) -> int:
    """The highest id of a tokenizer and one more: rows that an embedding needs. Ids may have gaps,
    and `len` counts tokens.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_tokens(path: Path, tokenizer: Any) -> None:
    """ValueError when a checkpoint's tokenizer gives ids that its embedding has no row for."""
    ids, rows = token_count(tokenizer), int(read_config(path)["vocab_size"])
    if not 0 < ids <= rows:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {ids - 1:,}, the model embeds {rows:,} tokens;"
            " take the tokenizer that belongs to it, or resize the embedding"
        )


def tokenizer_files(path: Path) -> list[Path]:
    """The files of a checkpoint's tokenizer: those of TOKENIZER_FILES that are there, and further
    chat templates.
    """
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    return files + sorted((path / MORE_TEMPLATES).glob("*.jinja"))


def copy_tokenizer(checkpoint: Path, out: Path) -> None:
    """Copy the tokenizer's files, chat templates included, byte for byte."""
    for file in tokenizer_files(checkpoint):
        copy = out / file.relative_to(checkpoint)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
