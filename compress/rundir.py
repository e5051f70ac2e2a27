"""A run's readable directory, and the trackers fed from it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress import machine
from compress.config import Recipe
from compress.score.scorer import Measured
from compress.session import Session, plain
from compress.store import write_json
from compress.track import open_tracker, slot_dir

CURVE_POINTS = 60


class RunDir:
    """The readable run directory: run.json, one folder a slot, records, and the trackers fed from them."""

    def __init__(self, path: Path, recipe: Recipe, session: Session) -> None:
        self.path = path.absolute()
        self.records: list[dict[str, Any]] = []
        self.path.mkdir(parents=True, exist_ok=True)
        name = f"{self.path.parent.name}/{self.path.name}"
        self.about: dict[str, Any] = {
            "schema": 1, "recipe": self.path.parent.name, "name": name, "started": now(), "finished": None, "exit": None,
            "git_sha": machine.git_sha(), "versions": machine.versions(), "machine": machine.describe(session.threads),
            "config": plain(asdict(recipe)), "slots": [], "keys": [],
        }  # fmt: skip
        self.trackers = [open_tracker(sink, self.path, project=recipe.track.project) for sink in recipe.track.sinks]
        self.write()
        for tracker in self.trackers:
            tracker.start(self.about)

    def write(self) -> None:
        """Replace run.json."""
        write_json(self.path / "run.json", self.about)

    def name_key(self, key: str) -> None:
        """Let run.json name a store key before its work starts, so that gc leaves unfinished work alone."""
        self.about["keys"].append(key)
        self.write()

    def add(self, record: dict[str, Any], measured: Measured, curve: list[dict[str, Any]]) -> dict[str, Any]:
        """Write one slot's folder and hand the record to the trackers."""
        index, run, recipe = len(self.records), self.about["name"], self.about["recipe"]
        record = {"schema": 1, "run": run, "recipe": recipe, "index": index, "created": now()} | record
        folder = slot_dir(self.path, record)
        folder.mkdir()
        write_json(folder / "record.json", record)
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in measured.items))
        (folder / "weights").symlink_to(os.path.relpath(measured.model.path, folder))
        self.records.append(record)
        self.about["slots"].append(record["slot"])
        self.write()
        for tracker in self.trackers:
            tracker.record(record, curve)
        return record

    def finish(self, code: int) -> None:
        """Record the exit code."""
        self.about |= {"finished": now(), "exit": code}
        self.write()
        for tracker in self.trackers:
            tracker.finish(code)


def thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most CURVE_POINTS rows for the record, evenly spread, and every row with a validation; trackers get them all."""
    every = -(-len(curve) // CURVE_POINTS)
    return [row for number, row in enumerate(curve) if number % max(1, every) == 0 or "validation_kl" in row or number == len(curve) - 1]


def now() -> str:
    """The moment, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
