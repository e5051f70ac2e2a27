"""Crash-safe, content-addressed directories: an entry is there whole or not at all.

    <store>/store.json        the mark of a store: a folder without it is refused, by runs and by
                              `compress gc`
    <store>/entries/<key>/    a finished checkpoint; `stage.json`, written last, names every file's
                              sha256 and bytes
    <store>/work/<key>/       unfinished training state of the same key; found again without naming
                              a run
    <store>/notes/<key>.json  what varies from run to run (seconds, training curve): kept outside
                              the entry
    <store>/scores/           scores by (weights digest, evaluation digest, runtime, machine)
    <store>/signals/, data/   teacher signals and packed text, written by their own modules
    <store>/runs/             where the run directories are that name entries here; `compress gc`
                              keeps what these name
    <store>/locks/<key>       flock'ed while a process builds the key; the kernel releases it when
                              the process dies
    <store>/locks/store       flock'ed, shared, by every process that works here; alone by
                              `compress gc`

Writing: build beside, fsync every file, write `stage.json`, fsync, rename, fsync the parent (the
order that survives a power cut on a journalling file system; Pillai et al., OSDI 2014, section
3.3). A reader therefore never sees half an entry.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.doors import read_json
from compress.errors import ConfigError, ResourceError, is_full, room_words

STAGE_JSON = "stage.json"
STORE_JSON = "store.json"
# Of a store without a mark.
FIRST_ROOMS = ("entries", "work", "notes", "scores", "signals", "data", "locks")
ROOMS = (*FIRST_ROOMS, "runs")
MARK = {"store": "compress", "schema": 1}
URL = re.compile(r"[\w+.-]{2,}:/")
# As `write_whole` calls what it has not finished.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)")


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


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
    try:
        beside.write_bytes(data)
        fsync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically."""
    write_whole(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative name: {"sha256", "bytes"}} of every file below `folder`, in name order."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return {
        str(p.relative_to(folder)): {"sha256": sha256_file(p), "bytes": p.stat().st_size}
        for p in files
    }


def commit(folder: Path, final: Path) -> None:
    """Make a finished folder durable and give it its name in one step."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fsync(path)
    fsync(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(final)
    fsync(final.parent)


def left_over(path: Path) -> str:
    """The name of the file that a process which has died was about to write at `path`; "" for all
    else.
    """
    match = TEMPORARY.fullmatch(path.name)
    if not match or path.is_symlink() or not path.is_file():
        return ""
    try:
        os.kill(int(match["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return match["name"]
    except PermissionError:
        pass
    return ""


class Store:
    """One store directory, shared with whoever else works in it for as long as this object lives.

    `root` is created on first use; with `create` False, as `compress gc` opens it, neither is it
    made nor is anybody waited for. ValueError: it is a folder of something else, or does not exist;
    ResourceError: it can't be written or locked.
    """

    def __init__(self, root: Path | str, *, create: bool = True) -> None:
        if not str(root) or URL.match(str(root)):
            raise ConfigError(
                f"store={root} is no folder of this machine; give a new or empty one, as"
                " store=runs/.store"
            )
        self.root = Path(root).absolute()
        if not create and not self.root.is_dir():
            raise ValueError(f"there is no store at {root}; name it with --store DIR")

        # Closing the handle lets go of the lock: at the latest when the process dies.
        try:
            self._open(create)
            self._shared = os.open(self.root / "locks" / "store", os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, self._shared)
            self._share(wait=create)
        except OSError as error:
            needs = f": {room_words(self.root)}" if is_full(error) else ""
            raise ResourceError(
                f"the store {self.root} can't be written ({error.strerror}){needs}; free it or set"
                " store=DIR"
            ) from error

    def _open(self, create: bool) -> None:
        """Make the mark and the rooms of a new store; ValueError for a folder
        that is not a store.
        """
        mark = self.root / STORE_JSON
        if create:
            self.root.mkdir(parents=True, exist_ok=True)
        if not mark.is_file():
            write_json(mark, MARK | {"older": self._is_older(create)})

        about = read_json(mark)
        if {key: about.get(key) for key in MARK} != MARK:
            raise ValueError(
                f"{mark} is not the mark of a store that this version knows; give another folder,"
                " or use the version which made it"
            )
        for room in ROOMS:
            (self.root / room).mkdir(exist_ok=True)

    def _is_older(self, create: bool) -> bool:
        """Whether a folder without a mark is a store of before there were marks, not a new one.
        ValueError: neither.
        """
        # Another process may be writing the mark just now.
        names = {
            path.name for path in self.root.iterdir() if not path.name.startswith(f".{STORE_JSON}.")
        }
        rooms = {name for name in names if name in ROOMS and (self.root / name).is_dir()}
        older = names == rooms and rooms.issuperset(FIRST_ROOMS)
        if older or (create and not names):
            return older

        state = f"is empty: it has no {STORE_JSON}"
        if names:
            state = f"holds {min(names - rooms or names)} and no {STORE_JSON}"
        raise ValueError(
            f"{self.root} is not a store: it {state}; a store is a folder of its own, give a"
            " new or empty one"
        )

    def _share(self, *, wait: bool = True) -> None:
        """Keep `compress gc` out.

        Where it is in already, it is waited for, by all but another one.
        """
        try:
            fcntl.flock(self._shared, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise ResourceError(
                    f"another `compress gc` is emptying {self.root}; wait for it"
                ) from None

            # Whoever waits is told for what.
            print(
                f"waiting for another command, which is clearing up {self.root}",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(self._shared, fcntl.LOCK_SH)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other process out; ResourceError at once when one works in the store."""
        try:
            fcntl.flock(self._shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._share()  # asking for more has let go of it
            raise ResourceError(
                f"another process works in the store {self.root}; repeat the command when it has"
                " ended"
            ) from None

        try:
            yield
        finally:
            self._share()

    def register(self, run: Path) -> None:
        """Note a run directory, so that `compress gc` finds what it names wherever it is, also
        when both were moved together.
        """
        path, root = str(run.resolve()), self.root.resolve()
        write_json(
            self.root / "runs" / f"{sha256_json(path)[:32]}.json",
            {"schema": 1, "run": path, "from_store": os.path.relpath(path, root)},
        )

    def entry(self, key: str) -> Path:
        """Where the entry of `key` is or will be."""
        return self.root / "entries" / key

    def has(self, key: str) -> bool:
        """Whether `key` is finished. Every byte is compared with `stage.json`: ValueError naming
        the first file that differs.

        What a process that was killed right after finishing it left in `work` is removed.
        """
        folder = self.entry(key)
        if not (folder / STAGE_JSON).is_file():
            return False

        expected = self.stage_json(key).get("files", {})
        actual = file_table(folder)
        actual.pop(STAGE_JSON)
        for name in sorted(expected.keys() | actual.keys()):
            if expected.get(name) != actual.get(name):
                state = "changed"
                if name not in actual:
                    state = "missing"
                elif name not in expected:
                    state = "unknown"
                raise ValueError(
                    f"{folder / name} is {state} since it was written; delete {folder} and run"
                    " again to rebuild it"
                )

        if (work := self.root / "work" / key).exists():
            shutil.rmtree(work, ignore_errors=True)
        return True

    def stage_json(self, key: str) -> dict[str, Any]:
        """The inputs, metrics and files of a finished entry."""
        return dict(read_json(self.entry(key) / STAGE_JSON))

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
                    f"process {holder} is building the same stage ({key[:12]}) in {self.root}; wait"
                    " for it, or set store=DIR to work apart"
                ) from None

            # For who comes while this one holds it.
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def build(
        self, key: str, inputs: dict[str, Any], make: Callable[[Path, Path], dict[str, float]]
    ) -> Path:
        """The entry of `key`, made by `make(out, work)` -> metrics unless it is there already.

        `out` is an empty directory renamed into place at the end, and removed when `make` fails;
        `work` survives kills and failures and is removed on success.
        """
        # Finished entries are read without the lock: many runs may share them at once.
        if self.has(key):
            return self.entry(key)

        with self.lock(key):
            if self.has(key):  # another process finished it while this one came for the lock
                return self.entry(key)
            out, work = self.root / "entries" / f".{key}.part", self.root / "work" / key
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            work.mkdir(exist_ok=True)

            try:
                metrics = make(out, work)
                files = file_table(out)
                stage = {"schema": 1, "key": key, "inputs": inputs, "metrics": metrics}
                write_json(out / STAGE_JSON, stage | {"files": files})
                commit(out, self.entry(key))
            except BaseException:
                # A full disk has room again, for the run to say how it ended.
                shutil.rmtree(out, ignore_errors=True)
                raise

            shutil.rmtree(work, ignore_errors=True)
            return self.entry(key)

    def note(self, key: str, value: dict[str, Any] | None = None) -> dict[str, Any]:
        """Read, or first write, what varies from run to run."""
        path = self.root / "notes" / f"{key}.json"
        if value is not None:
            write_json(path, value)
        return dict(read_json(path)) if path.is_file() else {}


def files_digest(folder: Path, files: list[Path]) -> str:
    """sha256 over the names, below `folder`, and the contents of files."""
    lines = [f"{file.relative_to(folder).as_posix()} {sha256_file(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
