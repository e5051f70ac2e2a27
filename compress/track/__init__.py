"""Where records go besides the run directory. A sink is imported only when it is asked for, and
only copies what is already on disk.

A live run hands over each record as soon as its folder is whole, `compress sync` hands over all of
them again: the same call, which replaces what it wrote before.
"""

import json
import pkgutil
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

from compress.errors import ConfigError, nearest, without_credentials
from compress.report.records import Record, load_run
from compress.store import write_whole

TRACKERS = {"jsonl": "compress.track:Jsonl", "wandb": "compress.track.wandb:Wandb"}


class Tracker:
    """A sink for the records of one run directory. What it does not override, it does not do."""

    def __init__(self, run_dir: Path, project: str = "compress") -> None:
        self.run_dir = Path(run_dir).resolve()
        self.project = project

    @staticmethod
    def check() -> None:
        """ValueError when something is missing; called before any work."""

    def record(self, record: Record) -> None:
        """One finished slot of the run directory; for the same slot again, what was written of it
        before is replaced.
        """

    def finish(self, exit_code: int) -> None:
        """The run has ended; nothing is called afterwards."""


class Jsonl(Tracker):
    """Every record of a run, one a line, in `records.jsonl`. On disk when it returns."""

    def record(self, record: Record) -> None:
        write_whole(
            self.run_dir / "records.jsonl",
            "".join(json.dumps(row) + "\n" for row in load_run(self.run_dir).records).encode(),
        )


class Guarded:
    """A tracker that cannot stop a run: the first exception is one line on stderr, and the sink is
    left alone.
    """

    def __init__(self, name: str, sink: Tracker) -> None:
        self.name = name
        self.sink = sink
        self.alive = True

    def _call(self, method: str, *arguments: Any) -> None:
        try:
            if self.alive:
                getattr(self.sink, method)(*arguments)

        # Whatever a library raises: the run is worth more than its copy.
        except Exception as error:
            self.alive = False
            why = without_credentials(str(error))
            print(
                f"warning: tracker {self.name} stopped ({type(error).__name__}: {why}); nothing"
                " else stops, the records are in the run directory: compress sync"
                f" {self.sink.run_dir} --to {self.name}",
                file=sys.stderr,
            )

    record = partialmethod(_call, "record")
    finish = partialmethod(_call, "finish")


def check(name: str) -> None:
    """Raise ConfigError when the tracker is unknown, ValueError when its package is missing. Call
    it before any work starts.
    """
    if name not in TRACKERS:
        raise ConfigError(f"unknown tracker {name!r}; {nearest(name, TRACKERS)}")
    pkgutil.resolve_name(TRACKERS[name]).check()


def open_tracker(name: str, run_dir: Path, project: str = "compress", **options: Any) -> Guarded:
    """The checked tracker `name` writing below `run_dir`; `options` are that sink's own (see its
    class).
    """
    return Guarded(name, pkgutil.resolve_name(TRACKERS[name])(run_dir, project, **options))
