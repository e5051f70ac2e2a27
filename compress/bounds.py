"""What numbers, texts and sources of a recipe may be at all, whoever reads them: sums that end in
NaN, a hundred thousand threads and names that nothing has are refused while composing.
"""

import math
import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from compress.errors import ConfigError, nearest

# As text/embedded.py has them.
EMBEDDED_SOURCES = (
    "docstrings",
    "topics",
    "docstring_chat",
    "conversations",
    "conversations_heldout",
    "questions",
    "questions_heldout",
)
SOURCE_KINDS = ("embedded", "hub", "generated")
MOST_THREADS = max(64, 16 * (os.cpu_count() or 1))  # a hundred thousand of them end the process
# Least and most of numbers, by the name of their field; what is not named here must be finite, and
# whole numbers fit in 64 bits.
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "threads": (0, MOST_THREADS),
    "processes": (0, 1024),
    "seq_len": (8, 2**20),
    "limit": (1, 10**9),
    "open_limit": (1, 10**9),
    "num_fewshot": (0, 1000),
    "batch_size": (1, 2**16),
    "context_tokens": (1, 2**24),
    "heldout_sequences": (2, 10**6),
    "prompt_tokens": (1, 10**6),
    "new_tokens": (2, 10**6),
    "repeats": (1, 10**5),
    "prompt_lengths": (1, 10**6),
    "batch_sizes": (1, 2**16),
    "context_lengths": (3, 10**6),
    "price_per_hour": (1e-9, 1e9),
    "tokens": (1, 10**15),
    "epochs": (1, 10**6),
    "batch_sequences": (1, 10**6),
    "micro_batch_sequences": (1, 10**6),
    "lr": (0, 1000),
    "grad_clip": (0, 1e12),
    "validations": (0, 10**6),
    "validation_sequences": (1, 10**6),
    "patience": (0, 10**6),
    "calibration_sequences": (1, 10**6),
    "iterations": (1, 10**6),
    "rank": (0, 2**16),
    "alpha": (1, 2**20),
    "top": (1, 2**20),
    "file_bytes": (0, 2**60),
    "bits_per_weight": (0, 32),
    "ffn": (1, 2**24),
    "multiple": (1, 2**24),
    "kv_groups": (1, 2**16),
    "heads_per_group": (1, 2**16),
    "keep_first": (0, 10**5),
    "keep_last": (0, 10**5),
}


def check_values(where: str, options: Any) -> None:
    """ConfigError for a number of a dataclass, or of one below it, that is not finite or outside
    of BOUNDS, and for a text that no path can hold.
    """
    for option in fields(options):
        value = getattr(options, option.name)
        name = f"{where}.{option.name}".lstrip(".")
        if is_dataclass(value):
            check_values(name, value)

        # A list has the bounds of its numbers.
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and "\0" in one:
                raise ConfigError(f"{name}={one!r} holds a NUL character; write it without")
            if isinstance(one, float) and not math.isfinite(one):
                raise ConfigError(f"{name}={value} must be a finite number")
            if isinstance(one, int | float) and not isinstance(one, bool):
                least, most = BOUNDS.get(option.name, (-(2**63), 2**63 - 1))
                if not least <= one <= most:
                    raise ConfigError(f"{name}={value} must be from {least:,} to {most:,}")


def check_home(key: str, path: str) -> None:
    """ConfigError for a path below the home of a user who is not there."""
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise ConfigError(
            f"{key}: {path!r} begins with the home of a user who does not exist here; write ./~..."
            " for a file of that name"
        )


def check_source(key: str, source: str) -> None:
    """ConfigError for a source of text that is a typing error: no file can be meant."""
    check_home(key, source)
    kind, _, rest = source.partition(":")
    if kind == "embedded" and rest not in EMBEDDED_SOURCES:
        raise ConfigError(
            f"{key}: {source!r} is no embedded source; {nearest(rest, EMBEDDED_SOURCES)}"
        )
    if kind in SOURCE_KINDS:
        return

    # A file that is not there yet may be written later, if it looks like one.
    if not source.strip() or not (
        re.search(r"[/\\.]", source) or Path(os.path.expanduser(source)).is_file()
    ):
        names = [f"embedded:{name}" for name in EMBEDDED_SOURCES]
        raise ConfigError(
            f"{key}: {source!r} is neither a file nor a source; {nearest(source, names)}, hub:...,"
            " generated:..., or a path"
        )
