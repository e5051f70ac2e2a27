"""Crash-safe, content-addressed directories: an entry is there whole or not at all.

    <store>/entries/<key>/   a finished checkpoint; `stage.json`, written last, names every file's sha256 and bytes
    <store>/work/<key>/      unfinished training state of the same key; found again without naming a run
    <store>/notes/<key>.json what varies from run to run (seconds, training curve): kept outside the entry
    <store>/scores/          scores by (weights digest, evaluation digest, runtime, machine)
    <store>/signals/, data/  teacher signals and packed text, written by their own modules
    <store>/locks/<key>      flock'ed while a process builds the key; the kernel releases it when the process dies

Writing: build beside, fsync every file, write `stage.json`, fsync, rename, fsync the parent (the order that survives a
power cut on a journalling file system; Pillai et al., OSDI 2014, section 3.3). A reader therefore never sees half an entry.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compress.errors import ResourceError

STAGE_JSON = "stage.json"


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    fsync(beside)
    beside.replace(path)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically."""
    write_whole(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative name: {"sha256", "bytes"}} of every file below `folder`, in name order."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return {str(p.relative_to(folder)): {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in files}


def commit(folder: Path, final: Path) -> None:
    """Make a finished folder durable and give it its name in one step."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fsync(path)
    fsync(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(final)
    fsync(final.parent)


class Store:
    """One store directory. `root` is created on first use; ResourceError when that is impossible."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        for name in ("entries", "work", "notes", "scores", "signals", "data", "locks"):
            try:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ResourceError(f"the store {self.root} can't be written ({error.strerror}); free it or set store=DIR") from error

    def entry(self, key: str) -> Path:
        """Where the entry of `key` is or will be."""
        return self.root / "entries" / key

    def has(self, key: str) -> bool:
        """Whether `key` is finished. Every byte is compared with `stage.json`: ValueError naming the first file that differs."""
        folder = self.entry(key)
        if not (folder / STAGE_JSON).is_file():
            return False
        expected, found = self.stage_json(key)["files"], file_table(folder)
        found.pop(STAGE_JSON)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                state = "missing" if name not in found else "unknown" if name not in expected else "changed"
                raise ValueError(f"{folder / name} is {state} since it was written; delete {folder} and run again to rebuild it")
        return True

    def stage_json(self, key: str) -> dict[str, Any]:
        """The inputs, metrics and files of a finished entry."""
        return json.loads((self.entry(key) / STAGE_JSON).read_text())

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the key; ResourceError at once when another process holds it."""
        with (self.root / "locks" / key).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise ResourceError(
                    f"process {holder} is building the same stage ({key[:12]}) in {self.root}; wait for it, or set store=DIR to work apart"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def build(self, key: str, inputs: dict[str, Any], make: Callable[[Path, Path], dict[str, float]]) -> Path:
        """The entry of `key`, made by `make(out, work)` -> metrics unless it is there already.

        `out` is an empty directory renamed into place at the end; `work` survives kills and is removed on success.
        """
        if self.has(key):  # finished entries are read without the lock: many runs may share them at once
            return self.entry(key)
        with self.lock(key):
            if self.has(key):  # another process finished it while this one came for the lock
                return self.entry(key)
            out, work = self.root / "entries" / f".{key}.part", self.root / "work" / key
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            work.mkdir(exist_ok=True)
            metrics = make(out, work)
            write_json(out / STAGE_JSON, {"schema": 1, "key": key, "inputs": inputs, "metrics": metrics, "files": file_table(out)})
            commit(out, self.entry(key))
            shutil.rmtree(work, ignore_errors=True)
            return self.entry(key)

    def note(self, key: str, value: dict[str, Any] | None = None) -> dict[str, Any]:
        """Read, or first write, what varies from run to run."""
        path = self.root / "notes" / f"{key}.json"
        if value is not None:
            write_json(path, value)
        return json.loads(path.read_text()) if path.is_file() else {}

    def gc(self, keep: set[str], digests: set[str], *, dry_run: bool) -> tuple[int, int]:
        """Remove entries, notes and work whose key is not in `keep`, scores of weights not in `digests`, all signals and data.

        Returns (things, bytes) removed. A key whose lock is held is never touched.
        """

        def key(path: Path) -> str:
            return path.name.lstrip(".").split(".")[0]

        doomed = [p for room in ("entries", "work", "notes") for p in (self.root / room).iterdir() if key(p) not in keep]
        doomed += [p for p in (self.root / "scores").iterdir() if p.name[:16] not in {digest[:16] for digest in digests}]
        doomed += [p for room in ("signals", "data") for p in (self.root / room).iterdir()]
        doomed = [p for p in doomed if not self._held(key(p))]
        size = sum(file.stat().st_size for path in doomed for file in (path, *path.rglob("*")) if file.is_file())
        for path in doomed if not dry_run else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return len(doomed), size

    def _held(self, key: str) -> bool:
        if not (self.root / "locks" / key).is_file():
            return False
        with suppress(ResourceError), self.lock(key):
            return False
        return True
