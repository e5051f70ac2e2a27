"""Three kinds of refusal, one exit code each; every message says what, got, allowed and what to do
next.

Besides the two below: any other ValueError is a file or checkpoint that was given and is wrong or
damaged (exit 3). 4 is a violated budget.
"""

import difflib
import errno
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

# A user and password, or a token, in front of a URL's host. A path takes one of the slashes
# away; the second form is for passwords with a slash in them, and leaves ports alone.
SCHEME = r"(?P<scheme>[a-z][a-z0-9+.-]+:/{1,3})"
USERINFO = re.compile(SCHEME + r"(?P<user>[^\s/?#\"'<>]+)@", re.IGNORECASE)
SLASHED = re.compile(SCHEME + r"(?P<user>[^\s/?#@:]*:(?!\d{1,5}[/?#])[^\s@]*)@", re.IGNORECASE)
CONTAINERS = ("abfs:", "abfss:", "wasb:", "wasbs:", "hf:")  # where NAME@ is an address, no user
QUERY = re.compile(
    r"(?P<name>[?&;#](?:sig|sas|key|auth|pwd|pass|jwt"
    r"|[\w.%-]*(?:token(?!s|iz)|secret|signature|passw|credential"
    r"|api[_-]?key|access[_-]?key|authori)[\w.%-]*)=)"
    r"[^\s&#\"'<>;]+",
    re.IGNORECASE,
)

# What a key looks like wherever it stands: of the hub, of model and code hosts, of clouds, a
# private key in PEM, and whatever follows "Bearer".
SHAPED = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}|\bgh[oprsu]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=Bearer )[\w.~+/=-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)",
    re.DOTALL,
)
# Variables of the environment whose values are secrets.
SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS)?_?KEY(_ID)?)$", re.IGNORECASE
)
SECRET_CHARACTERS = 8  # a shorter one would be found in ordinary words

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_INPUT = 3
EXIT_BUDGET = 4
EXIT_RESOURCES = 5
EXIT_SIGINT = 130
EXIT_SIGTERM = 143

DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # reorder what is shown

# What libraries raise of damaged files and templates that are programs, by name: importing them
# takes long.
DAMAGED = {"SafetensorError", "TemplateError"}
LEAST_BYTES = 16_000_000  # that the smallest recipe takes
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


class ConfigError(ValueError):
    """The recipe, an override or the command line can't be meant like this (exit 2)."""


class ResourceError(RuntimeError):
    """The machine lacks something: memory, disk space, write permission, or another process holds
    the lock (exit 5).
    """


class Interrupted(BaseException):
    """Training was stopped by a signal after its state was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def is_disk(error: BaseException) -> bool:
    """Whether the disk is full, read-only or not ours, or a file would be longer than it may be.

    Libraries written in Rust give the number of the error in their text alone: "(os error 28)".
    """
    codes = (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM)
    text = str(error)
    named = any(f"(os error {code})" in text for code in codes)
    return getattr(error, "errno", None) in codes or named or "No space left" in text


def is_full(error: BaseException) -> bool:
    """Whether it is room that the disk lacks, or that a file may have."""
    text = str(error)
    named = any(f"(os error {code})" in text for code in FULL)
    words = "No space left" in text or "Disk quota" in text or "File too large" in text
    return getattr(error, "errno", None) in FULL or named or words


def amount(size: int) -> str:
    """Bytes in the unit that leaves digits to compare."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def room_words(path: Path) -> str:
    """What a run needs at least beside what is free on the disk of a path, which need not exist."""
    path = path.absolute()
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    return f"a run needs at least {amount(LEAST_BYTES)}, {amount(free)} are free in {place}"


def is_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a device."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
    )


def exit_code(error: BaseException) -> int:
    """The exit code of a run that ends with `error`; 1 is a bug of ours."""
    # Ended on purpose, by itself or by a signal.
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

    # What was given is damaged or is not there; whatever else comes up is ours.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & DAMAGED or getattr(error, "errno", None) in NO_FILE:
        return EXIT_INPUT
    places = FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError
    return (
        EXIT_INPUT
        if isinstance(error, ValueError | FloatingPointError | RecursionError | places)
        else 1
    )


def printable(text: str) -> str:
    """Text without what acts on a terminal: controls but newline and tab, changes of direction."""
    acting = (unicodedata.category(c) in ("Cc", "Cs") or c in DIRECTIONS for c in text)
    return "".join(c for c, acts in zip(text, acting, strict=True) if c in "\n\t" or not acts)


def shown(text: str) -> str:
    """A text for a terminal or a log: \\x1b and the like for what would act on a terminal, *** for
    what gives access.
    """
    escaped = "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
    return without_credentials(escaped)


@lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    return bool(SECRET_NAME.search(name))


def secrets() -> list[str]:
    """Values of the environment that give access, the longest first; paths of files are none."""
    values = {value for name, value in os.environ.items() if _is_secret(name)}
    return sorted(
        (v for v in values if len(v) >= SECRET_CHARACTERS and not v.startswith(("/", "~", "."))),
        key=len,
        reverse=True,
    )


def without_credentials(text: str) -> str:
    """`text` with *** for whatever gives access: users, passwords, signatures and tokens in the
    URLs that it holds, keys by their shape, and secrets of the environment by their value. The one
    point through which text goes into records, logs, pages, trackers and messages.
    """
    for secret in secrets():
        text = text.replace(secret, "***")
    text = SHAPED.sub("***", text)

    def hidden(match: re.Match[str]) -> str:
        address = match["scheme"].lower().startswith(CONTAINERS) and ":" not in match["user"]
        return match[0] if address else f"{match['scheme']}***@"

    text = SLASHED.sub(hidden, USERINFO.sub(hidden, text))
    return QUERY.sub(lambda match: f"{match['name']}***", text)


def tree_without_credentials(value: Any) -> Any:
    """The same for every string of nested dicts and lists, keys included."""
    if isinstance(value, dict):
        return {
            tree_without_credentials(key): tree_without_credentials(entry)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [tree_without_credentials(entry) for entry in value]
    return without_credentials(value) if isinstance(value, str) else value


def refuse_credentials(value: Any, where: str) -> None:
    """ConfigError when a string, or one of nested dicts and lists, is a URL that gives access;
    `where` names it.
    """
    # Down to the strings, each with the key that it stands under.
    if isinstance(value, dict):
        for key, entry in value.items():
            refuse_credentials(key, where)
            refuse_credentials(entry, f"{where}.{key}" if where else str(key))
        return
    if isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            refuse_credentials(entry, f"{where}[{number}]")
        return

    if isinstance(value, str) and ":/" in value and (shown := without_credentials(value)) != value:
        raise ConfigError(
            f"{where or 'the recipe'} has a user, password or token in a URL: {shown}. Settings are"
            " copied into records and bundles; leave it out, and give it in the environment (as"
            " AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, HF_TOKEN) or in ~/.config/fsspec/"
        )


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest allowed name, or the list of what is allowed."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return guess + f"allowed: {', '.join(names) or 'nothing'}"
