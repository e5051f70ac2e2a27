"""The readable run directory: run.json, one folder a slot with its record, and the trackers fed
from them.

A directory is taken when it is new, empty or one of ours, and nobody else writes it. A command
that is repeated in a directory of its own (`hydra.run.dir=DIR`) rewrites what a run wrote there,
by name; whatever else lies there stays. run.json names a slot only when its folder is whole:
readers leave out what it does not name.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from compress import machine
from compress.doors import read_json
from compress.errors import EXIT_BUDGET, EXIT_OK, ConfigError, ResourceError
from compress.report.records import RUN_KEYS, SCHEMA, SLOT_FOLDER, folder_of, record_files
from compress.score.measured import Measured
from compress.session import Session, plain
from compress.store import left_over, write_json, write_whole
from compress.track import open_tracker

# As configs/base.yaml names run directories, and jobs of a sweep.
STAMP = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d)(-\d+)?")
ROWS = ("items", "steps", "open")
OURS = re.compile(r"run\.json|records\.jsonl|report\.html")
IN_A_SLOT = re.compile(rf"record\.json|({'|'.join(ROWS)})\.jsonl")
REMNANTS = (".bundle.part", ".bundle.old")


def now() -> str:
    """The moment, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def reserved(path: Path) -> Iterator[Path]:
    """The run directory to write, nobody else's for the block: `path`, or where another run of
    the same second has that, one with a number.

    ConfigError: it is the current folder; ValueError: it holds something that is no run's;
    ResourceError: a run is going on there.
    """
    path = path.absolute()
    if path.resolve() == Path.cwd():
        raise ConfigError(
            "hydra.run.dir is the current folder, where a run would mix its files with yours; "
            "name a new folder"
        )

    # Locked first and looked at then, so that nobody writes in between.
    for number in count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        free = _locked(handle)
        try:
            if _named_now(path) and (not free or (folder / "run.json").exists()):
                continue
            if not free:
                raise ResourceError(
                    f"another run is writing {folder}; wait for it, or set hydra.run.dir to a new "
                    "folder"
                )
            check_ours(folder)
            yield folder
            return
        finally:
            os.close(handle)
            if free:
                with suppress(OSError):  # a refused run leaves nothing; what holds something stays
                    folder.rmdir()


def _locked(handle: int) -> bool:
    """Whether nobody else has the directory; where directories can't be locked, that is taken
    for granted.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _named_now(path: Path) -> bool:
    """Whether this process made the name out of the time, instead of being given it."""
    if not (match := STAMP.fullmatch(path.name)):
        return False
    with suppress(ValueError):
        return (
            datetime.strptime(match["time"], "%Y-%m-%dT%H-%M-%S").timestamp()
            >= int(psutil.Process().create_time()) - 1
        )
    return False


def check_ours(path: Path) -> None:
    """ValueError when a directory holds something, but no run of ours; or a bundle or weights
    that would have to go and are not ours.
    """
    move = "set hydra.run.dir to a new or empty folder, or move it away"
    names = {
        file.name
        for file in path.iterdir()
        if not OURS.fullmatch(left_over(file)) and file.name not in REMNANTS
    }
    if names and "run.json" not in names:
        raise ValueError(
            f"{path} is no run directory: it holds {min(names)} and no run.json; {move}"
        )
    if "run.json" in names and not is_run(about := read_json(path / "run.json")):
        raise ValueError(
            f"{path / 'run.json'} is not of a run of this version "
            f"(schema {about.get('schema')!r}); {move}"
        )

    # What a run replaces must be what a run wrote.
    for folder in slot_folders(path):
        if (weights := folder / "weights").exists() and not weights.is_symlink():
            raise ValueError(
                f"{weights} holds weights themselves, where a run keeps a link to the store; {move}"
            )
    for file in path.iterdir():
        linked = file.is_symlink() and file.is_dir() and SLOT_FOLDER.match(file.name)
        if linked or (file.is_dir() and OURS.fullmatch(file.name)):
            raise ValueError(f"{file} is in the way of what a run writes there; {move}")
    bundle = path / "bundle"
    if (bundle.is_symlink() or bundle.exists()) and (stranger := _stranger(bundle)):
        raise ValueError(
            f"{stranger} was not written with a bundle, and the run would replace {bundle}; {move}"
        )


def slot_folders(path: Path) -> Iterator[Path]:
    """The folders of a run directory that hold a record of ours."""
    for file in record_files(path):
        with suppress(ValueError):
            record = read_json(file)
            if (
                record.get("schema") == SCHEMA
                and "slot" in record
                and folder_of(path, record) == file.parent
            ):
                yield file.parent


def is_run(about: dict[str, Any]) -> bool:
    """Whether this is what a run.json says."""
    return about.get("schema") == SCHEMA and all(
        isinstance(about.get(key), kind) for key, kind in RUN_KEYS.items()
    )


def _stranger(bundle: Path) -> Path | None:
    """What shows that a folder is not a bundle as we wrote it: a file that its sums don't name,
    or itself.
    """
    sums = bundle / "SHA256SUMS"
    if bundle.is_symlink() or not sums.is_file() or not (bundle / "manifest.json").is_file():
        return bundle
    listed = {line[66:] for line in sums.read_text(encoding="utf-8", errors="replace").split("\n")}
    files = (
        file
        for file in sorted(bundle.rglob("*"))
        if file != sums and (file.is_symlink() or not file.is_dir())
    )
    return next((file for file in files if str(file.relative_to(bundle)) not in listed), None)


class RunDir:
    """A reserved run directory that is being written."""

    def __init__(self, path: Path, session: Session) -> None:
        self.path = path.absolute()
        track = session.recipe.track
        self.records: list[dict[str, Any]] = []
        self.keys: dict[str, None] = {}  # in order

        # `compress gc` keeps what an earlier run named here, until this one is through.
        earlier_keys = []
        if (self.path / "run.json").is_file():
            earlier_keys = read_json(self.path / "run.json").get("keys", [])
        name = f"{self.path.parent.name}/{self.path.name}"
        self.about: dict[str, Any] = {
            "schema": SCHEMA, "recipe": self.path.parent.name, "name": name,
            "started": now(), "finished": None, "exit": None,
            "git_sha": machine.git_sha(), "versions": machine.versions(),
            "machine": machine.describe(session.threads), "digests": session.scorer.digests,
            "config": plain(asdict(session.recipe)), "slots": [], "keys": earlier_keys,
        }  # fmt: skip

        # The store knows of it first, so that whatever a kill leaves here is found. It names no
        # slot: readers leave out the earlier run's from now on.
        session.store.register(self.path)
        self.write()
        self._clear()
        self.trackers = [
            open_tracker(sink, self.path, project=track.project) for sink in track.sinks
        ]

    def _clear(self) -> None:
        """Remove what an earlier run, or one that was killed, wrote here."""
        for folder in slot_folders(self.path):
            for file in folder.iterdir():
                is_link = file.name == "weights" and file.is_symlink()
                if is_link or IN_A_SLOT.fullmatch(left_over(file) or file.name):
                    file.unlink()
            with suppress(OSError):  # files of the user's own keep their folder
                folder.rmdir()

        # What was being written when a process died, also where no record came to be.
        for file in self.path.glob("*/.*"):
            if SLOT_FOLDER.match(file.parent.name) and IN_A_SLOT.fullmatch(left_over(file)):
                file.unlink()
        for file in self.path.iterdir():
            if OURS.fullmatch(left_over(file)) or file.name in ("records.jsonl", "report.html"):
                file.unlink()
            elif file.name in REMNANTS:
                shutil.rmtree(file, ignore_errors=True)

    def write(self) -> None:
        """Replace run.json."""
        write_json(self.path / "run.json", self.about)

    def name_key(self, key: str) -> None:
        """Let run.json name a store key before its work starts, so that gc leaves unfinished work
        alone.

        Those that an earlier run named here stay until this one is through.
        """
        self.keys[key] = None
        self.about["keys"] = list(dict.fromkeys([*self.about["keys"], key]))
        self.write()

    def add(
        self, record: dict[str, Any], measured: Measured, curve: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Write one slot's folder and hand the record to the trackers."""
        ours = {
            "run": self.about["name"],
            "recipe": self.about["recipe"],
            "index": len(self.records),
        }
        record = {"schema": SCHEMA, "created": now()} | ours | record
        folder = folder_of(self.path, record)
        folder.mkdir(exist_ok=True)

        # The record comes last: what it speaks of is there.
        for name, rows in zip(ROWS, (measured.items, curve, measured.answers), strict=True):
            write_whole(
                folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
            )
        weights = folder / "weights"
        weights.unlink(missing_ok=True)
        weights.symlink_to(os.path.relpath(measured.model.path, folder))
        write_json(folder / "record.json", record)
        self.records.append(record)
        self.about["slots"].append(record["slot"])
        self.write()
        for tracker in self.trackers:
            tracker.record(record)
        return record

    def place_for_bundle(self) -> Path:
        """Where the bundle goes; an earlier run's is taken away, as a whole."""
        final, old = self.path / "bundle", self.path / ".bundle.old"
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(final.rename(old), ignore_errors=True)
        return final

    def finish(self, code: int) -> None:
        """Record the exit code. When that has no place on a full disk, the code alone is put
        over its own place.
        """
        if code in (EXIT_OK, EXIT_BUDGET):
            self.about["keys"] = list(self.keys)
        self.about |= {"finished": now(), "exit": code}
        try:
            self.write()
        except OSError:
            self._put_exit(code)
        for tracker in self.trackers:
            tracker.finish(code)

    def _put_exit(self, code: int) -> None:
        """Overwrite the exit code, or `null`, in the run.json that is on the disk, where the new
        one is no longer.
        """
        digits = str(code).encode()
        with suppress(OSError), (self.path / "run.json").open("r+b") as file:
            match = re.search(rb'\n "exit": (null|\d+)', file.read())
            if match and len(digits) <= len(match[1]):
                file.seek(match.start(1))
                file.write(digits.ljust(len(match[1])))
                file.flush()
                os.fsync(file.fileno())
