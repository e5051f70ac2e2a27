"""Three kinds of refusal, one exit code each; every message says what, got, allowed and what to do next.

Besides the two below: any other ValueError is a file or checkpoint that was given and is wrong or damaged (exit 3). 4 is a violated budget.
"""

import difflib
import errno
from collections.abc import Iterable

EXIT_OK, EXIT_CONFIG, EXIT_INPUT, EXIT_BUDGET, EXIT_RESOURCES, EXIT_SIGINT, EXIT_SIGTERM = 0, 2, 3, 4, 5, 130, 143

# What libraries raise of damaged files and templates that are programs, by name: importing them takes long.
DAMAGED = {"SafetensorError", "TemplateError"}
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


class ConfigError(ValueError):
    """The recipe, an override or the command line can't be meant like this (exit 2)."""


class ResourceError(RuntimeError):
    """The machine lacks something: memory, disk space, write permission, or another process holds the lock (exit 5)."""


class Interrupted(BaseException):
    """Training was stopped by a signal after its state was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def is_disk(error: BaseException) -> bool:
    """Whether the disk is full, read-only or not ours."""
    codes = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM)
    return getattr(error, "errno", None) in codes or "No space left" in str(error)


def is_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def exit_code(error: BaseException) -> int:
    """The exit code of a run that ends with `error`; 1 is a bug of ours."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, Interrupted):
        return 128 + error.signum
    if isinstance(error, KeyboardInterrupt):
        return EXIT_SIGINT
    if isinstance(error, ConfigError):
        return EXIT_CONFIG
    if isinstance(error, ResourceError) or is_disk(error) or is_memory(error):
        return EXIT_RESOURCES
    if {kind.__name__ for kind in type(error).__mro__} & DAMAGED or getattr(error, "errno", None) in NO_FILE:
        return EXIT_INPUT
    return EXIT_INPUT if isinstance(error, ValueError | FloatingPointError | FileNotFoundError | RecursionError) else 1


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest allowed name, or the list of what is allowed."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return guess + f"allowed: {', '.join(names) or 'nothing'}"
