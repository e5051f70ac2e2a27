"""Who may come in: one key, from a file or the environment, never from the command line, which
other users of a machine can read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from compress.errors import ConfigError

KEY_CHARACTERS = 16  # a key has at least so many
KEY_BYTES = 4096  # and a file of one at most so many


def read_key(file: Path | None, variable: str, option: str) -> str | None:
    """The key in `file`, else in the environment's `variable`; None where neither is given.

    ConfigError, which names `option`, for one that is too short or can't stand in a header.
    ValueError: the file can't be read.
    """
    if file is not None:
        if not file.is_file() or file.stat().st_size > KEY_BYTES:
            raise ValueError(
                f"{option} {file} is no file of at most {KEY_BYTES:,} bytes; write the key into it,"
                " as in: openssl rand -hex 32 > key"
            )
        key = file.read_text(errors="replace").strip()
        where = f"the key in {option} {file}"
    else:
        if variable not in os.environ:
            return None
        key = os.environ[variable].strip()
        where = f"the key in {variable}"

    if len(key) < KEY_CHARACTERS:
        raise ConfigError(
            f"{where} has {len(key)} characters, at least {KEY_CHARACTERS} are needed; make one"
            " with: openssl rand -hex 32"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{where} has characters that can't stand in a header; use ASCII letters and digits"
        )
    return key


class Lock:
    """Tells the key from every other, in a time that does not depend on where they differ."""

    def __init__(self, key: str | None) -> None:
        self._digest = None if key is None else _digest(key)

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return self._digest is None

    def admits(self, authorization: str | None) -> bool:
        """Whether a request's Authorization header is `Bearer` and the key."""
        if self._digest is None:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(_digest(key), self._digest)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
