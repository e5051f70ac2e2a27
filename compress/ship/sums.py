"""A bundle's bytes: every file against SHA256SUMS, the manifest against the files and itself.

Nothing but Python's own library is needed: `compress verify` runs wherever the package is.
"""

import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from compress.ship.manifest import read_manifest
from compress.ship.signature import SIGNATURE, check, sign
from compress.store import left_over, sha256_file

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)", re.DOTALL)
SUMS_BYTES = 10_000_000  # a line is some hundred


def sums_digest(bundle: Path) -> str:
    """sha256 of SHA256SUMS, which stands for all of the bundle's bytes: to compare over another
    channel.
    """
    return sha256_file(bundle / SUMS)


def read_sums(bundle: Path) -> dict[str, str]:
    """Name -> sha256 as SHA256SUMS says. ValueError for a line that `sha256sum -c` would read
    otherwise, or not at all.
    """
    sums = bundle / SUMS
    if not stat.S_ISREG(sums.lstat().st_mode if os.path.lexists(sums) else 0):
        raise ValueError(
            f"{bundle} is no bundle: {SUMS} is missing or no plain file; give the folder bundle/ of"
            " a run"
        )
    if sums.stat().st_size > SUMS_BYTES:
        raise ValueError(
            f"{sums} has {sums.stat().st_size:,} bytes, at most {SUMS_BYTES:,} are read; copy the"
            " bundle again from its source"
        )

    # What comes behind the last line feed is a line without one, which is refused.
    *lines, rest = sums.read_bytes().split(b"\n")
    expected: dict[str, str] = {}
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        match = LINE.fullmatch(line.decode("utf-8", "surrogateescape"))
        name = match[2] if match else ""
        if not match or number > len(lines) or not _is_relative_name(name):
            shown = line.decode("utf-8", "replace")[:200]
            raise ValueError(
                f"{sums}, line {number} is not 'sha256  relative/name' and a line feed: {shown!r};"
                " the bundle was damaged or made to mislead"
            )
        if name in expected or name == SUMS:
            raise ValueError(
                f"{sums}, line {number} names {name!r} again; the bundle was damaged or made to"
                " mislead"
            )
        expected[name] = line[:64].decode()
    return expected


def _is_relative_name(name: str) -> bool:
    """Whether a name means the same to everybody and stays below the bundle."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and str(path) == name
    return plain and not path.is_absolute() and ".." not in path.parts


def _strangers(bundle: Path) -> tuple[dict[str, Path], list[str]]:
    """The bundle's plain files by name, and a sentence on everything else in it."""
    files: dict[str, Path] = {}
    bad: list[str] = []
    waiting = [bundle]
    while waiting:
        folder = waiting.pop()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        if not entries and folder != bundle:
            bad.append(f"{folder.relative_to(bundle)} is an empty folder, which no bundle has")

        # A link to a folder is a link, not a folder.
        for entry in entries:
            name = str(Path(entry.path).relative_to(bundle))
            if entry.is_symlink():
                bad.append(f"{name} is a symbolic link")
            elif entry.is_dir():
                waiting.append(Path(entry.path))
            elif entry.is_file():
                files[name] = Path(entry.path)
            else:
                bad.append(f"{name} is no plain file")
    return files, bad


def verify_bundle(
    bundle: Path, sha256: str | None = None, key: Path | None = None
) -> dict[str, Any]:
    """Compare every byte with SHA256SUMS, and the manifest with the files and with itself. Returns
    the manifest.

    `sha256`: of SHA256SUMS, as its sender said; `key`: a public key in PEM, which must have signed
    all files. ValueError naming every file that differs, lacks or does not belong, or the key of
    the manifest, or what is wrong with the signature.
    """
    expected = read_sums(bundle)
    if sha256 is not None and (got := sums_digest(bundle)) != sha256.lower():
        raise ValueError(
            f"{bundle / SUMS} has the sha256 {got}, not {sha256.lower()}: it is not the bundle that"
            " was meant; ask its sender"
        )

    # Every file on either side, once: a link in place of a file is not missing besides.
    files, bad = _strangers(bundle)
    files.pop(SUMS, None)
    if SIGNATURE not in expected:  # it was made of the sums
        files.pop(SIGNATURE, None)
    linked = {sentence.partition(" is ")[0] for sentence in bad}
    bad += [f"{name} is missing" for name in sorted(expected.keys() - files.keys() - linked)]
    bad += [f"{name} is not in {SUMS}" for name in sorted(files.keys() - expected.keys())]
    bad += [
        f"{name} was changed"
        for name in sorted(expected.keys() & files.keys())
        if sha256_file(files[name]) != expected[name]
    ]

    if bad:
        raise ValueError(
            f"{bundle} does not verify: {'; '.join(sorted(bad))}. Copy the bundle again from its"
            " source"
        )
    if "manifest.json" not in expected:
        raise ValueError(f"{bundle} has no manifest.json; copy the bundle again from its source")
    if key is not None:
        check(bundle, signed_digests(bundle), key)
    return read_manifest(bundle, expected)


def sign_bundle(bundle: Path, key: Path) -> tuple[Path, int]:
    """Sign a bundle with a private key in PEM: its model.sig, of how many files. ValueError unless
    it verifies: what was changed since it was written is not vouched for.
    """
    for torn in bundle.glob(f".{SIGNATURE}.*"):
        if left_over(torn) == SIGNATURE:  # of a process that was killed while it signed
            torn.unlink()
    verify_bundle(bundle)
    digests = signed_digests(bundle)
    return sign(bundle, digests, key), len(digests)


def signed_digests(bundle: Path) -> dict[str, str]:
    """sha256 by name of all files that a signature is of, SHA256SUMS among them, as it says."""
    return read_sums(bundle) | {SUMS: sums_digest(bundle)}
