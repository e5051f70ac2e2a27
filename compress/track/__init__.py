"""Where records go besides the run directory. A sink is imported only when it is asked for, and only copies what is already on disk."""

import json
import pkgutil
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

from compress.errors import nearest
from compress.store import fsync

TRACKERS = {"jsonl": "compress.track:Jsonl", "wandb": "compress.track.wandb:Wandb"}


class Tracker:
    """A sink for the records of one run directory. What it does not override, it does not do."""

    def __init__(self, run_dir: Path, project: str = "compress") -> None:
        self.run_dir, self.project = Path(run_dir).resolve(), project

    @staticmethod
    def check() -> None:
        """ValueError when something is missing; called before any work."""

    def start(self, run: dict[str, Any]) -> None:
        """`run`: run.json. Called once."""

    def record(self, record: dict[str, Any], steps: list[dict[str, Any]]) -> None:
        """One finished slot, and its training curve: rows {"step": int, "loss": nats, "tokens_per_sec": float}."""

    def finish(self, exit_code: int) -> None:
        """The run has ended; nothing is called afterwards."""


class Jsonl(Tracker):
    """Every record of a run, one a line, in `records.jsonl`; a training curve in its slot's `steps.jsonl`. On disk when it returns."""

    def record(self, record: dict[str, Any], steps: list[dict[str, Any]]) -> None:
        for file, rows, mode in ((slot_dir(self.run_dir, record) / "steps.jsonl", steps, "w"), (self.run_dir / "records.jsonl", [record], "a")):
            if rows:
                with file.open(mode, encoding="utf-8") as out:
                    out.write("".join(json.dumps(row) + "\n" for row in rows))
                fsync(file)


class Guarded:
    """A tracker that cannot stop a run: the first exception is one line on stderr, and the sink is left alone."""

    def __init__(self, name: str, sink: Tracker) -> None:
        self.name, self.sink, self.alive = name, sink, True

    def _call(self, method: str, *arguments: Any) -> None:
        try:
            if self.alive:
                getattr(self.sink, method)(*arguments)
        except Exception as error:
            self.alive = False
            print(f"warning: tracker {self.name} stopped ({type(error).__name__}: {error}); the run goes on, "
                  "its records are in the run directory", file=sys.stderr)  # fmt: skip

    start = partialmethod(_call, "start")
    record = partialmethod(_call, "record")
    finish = partialmethod(_call, "finish")


def check(name: str) -> None:
    """Raise ValueError when the tracker is unknown or its package is missing. Call it before any work starts."""
    if name not in TRACKERS:
        raise ValueError(f"unknown tracker {name!r}; {nearest(name, TRACKERS)}; set it with track=NAME")
    pkgutil.resolve_name(TRACKERS[name]).check()


def open_tracker(name: str, run_dir: Path, **options: Any) -> Guarded:
    """The checked tracker `name` writing below `run_dir`; `options` are that sink's own (see its class)."""
    return Guarded(name, pkgutil.resolve_name(TRACKERS[name])(run_dir, **options))


def slot_dir(run_dir: Path, record: dict[str, Any]) -> Path:
    """The folder NN-<slot> of a record."""
    return run_dir / f"{record['index']:02d}-{record['slot']}"
