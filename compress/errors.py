"""Three kinds of refusal, one exit code each; every message says what, got, allowed and what to do next.

ConfigError: the recipe or the command line is wrong (exit 2). Any other ValueError: a file or checkpoint that was given is
wrong or damaged (exit 3). ResourceError: memory, disk or a lock (exit 5). A violated budget is exit 4; signals are 130 and 143.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK, EXIT_CONFIG, EXIT_INPUT, EXIT_BUDGET, EXIT_RESOURCES, EXIT_SIGINT, EXIT_SIGTERM = 0, 2, 3, 4, 5, 130, 143


class ConfigError(ValueError):
    """The recipe, an override or the command line can't be meant like this."""


class ResourceError(RuntimeError):
    """The machine lacks something: memory, disk space, write permission, or another process holds the lock."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest allowed name, or the list of what is allowed."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " * bool(close) + f"allowed: {', '.join(names) or 'nothing'}"
