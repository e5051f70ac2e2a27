"""JSON Lines: every record of a run, one a line, in `records.jsonl`; a training curve in its slot's `steps.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from compress.track import slot_dir


class Jsonl:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)

    @staticmethod
    def check() -> None:
        """Nothing to miss: the standard library is enough."""

    def start(self, run: dict[str, Any]) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def record(self, record: dict[str, Any], steps: list[dict[str, Any]]) -> None:
        if steps:
            curve = slot_dir(self.run_dir, record) / "steps.jsonl"
            curve.parent.mkdir(parents=True, exist_ok=True)
            _write(curve, steps, "w")
        _write(self.run_dir / "records.jsonl", [record], "a")

    def finish(self, exit_code: int) -> None:
        """Every line is already on disk."""


def _write(file: Path, rows: list[dict[str, Any]], mode: str) -> None:
    """Whole lines in one write, on disk when it returns."""
    with file.open(mode, encoding="utf-8") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))
        out.flush()
        os.fsync(out.fileno())
