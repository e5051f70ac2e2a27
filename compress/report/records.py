"""Read run directories back: `run.json` plus one `record.json` per slot, checked at the door.

Everything below `report/` is a pure view: records go in, tables and pages come out. A run that is still going, or was interrupted, is
readable: the slots that have a record are shown.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import nearest

SCHEMA = 1
Record = dict[str, Any]
RUN_KEYS: dict[str, type] = {"recipe": str, "name": str, "slots": list}
RECORD_KEYS: dict[str, type] = {"slot": str, "technique": str, "scores": dict, "verdicts": list}
VERDICTS = ("FAIL", "INCONCLUSIVE", "PASS")  # worst first


@dataclass(frozen=True)
class Run:
    """One run directory: `info` is run.json as written, `records` are in slot order (at least one)."""

    path: Path
    info: dict[str, Any]
    records: list[Record]

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def teacher(self) -> Record | None:
        return teacher_of(self.records)

    @property
    def final(self) -> Record:
        """What the budget judges: the first file that ships, else the last slot."""
        return next((r for r in self.records if r["technique"].startswith("export_")), self.records[-1])


def teacher_of(records: Sequence[Record], runtime: str = "torch") -> Record | None:
    """The teacher's record that a difference is taken against: in the same runtime if it was scored there, for times must be comparable."""
    teachers = [r for r in records if r["technique"] == "teacher"]
    return next((r for r in teachers if r.get("runtime") == runtime), teachers[0] if teachers else None)


def worst(records: list[Record]) -> str | None:
    """The worst enforced verdict of these records (FAIL before INCONCLUSIVE before PASS), None without any."""
    found = {v["verdict"] for r in records for v in r["verdicts"] if v.get("enforced")}
    return next((word for word in VERDICTS if word in found), None)


def load_run(path: Path | str) -> Run:
    """Load a run directory. ValueError (what, got, allowed, next) when it is missing, malformed or has no record."""
    path = Path(path)
    if not (path / "run.json").is_file():
        raise ValueError(f"no run at {path}: it has no run.json; a run is a folder runs/<recipe>/<time>/ written by "
                         "`compress run RECIPE`; name such a folder, or `<recipe>` for its newest run")  # fmt: skip
    info = _read(path / "run.json", RUN_KEYS)
    slots, records = info["slots"], []
    for file in path.glob("[0-9]*-*/record.json"):
        record = _read(file, RECORD_KEYS)
        if record["slot"] not in slots:
            raise ValueError(f"malformed {file}: slot {record['slot']!r} is not in run.json's slots {slots}")
        for key, value in record["scores"].items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"malformed {file}: scores[{key!r}] is {value!r}, allowed: a number")
        for verdict in record["verdicts"]:
            if not isinstance(verdict, dict) or verdict.get("verdict") not in VERDICTS or "sentence" not in verdict:
                raise ValueError(f"malformed {file}: verdict {verdict!r}, allowed: a sentence and one of {VERDICTS}")
        records.append(record)
    records.sort(key=lambda record: slots.index(record["slot"]))
    found = [r["slot"] for r in records]
    if len(set(found)) < len(found):
        raise ValueError(f"malformed run {path}: two records for one slot in {found}; remove the stale folder")
    missing = [slot for slot in slots if slot not in found]
    if not records or (missing and info.get("exit") == 0):
        raise ValueError(f"incomplete run {path}: no record.json for {', '.join(missing) or 'any slot'}; "
                         f"`compress run {info['recipe']}` again picks up what is finished")  # fmt: skip
    return Run(path, info, records)


def resolve(name: str | Path, runs_dir: Path | str = "runs") -> Path:
    """The run directory meant by a path, by `demo/2026-11-21T03-30-00`, or by `demo` (its newest run)."""
    runs_dir = Path(runs_dir)
    for place in (Path(name), runs_dir / name):
        if (place / "run.json").is_file():
            return place
        if runs := list(place.glob("*/run.json")):
            return max(runs, key=lambda file: file.parent.name).parent  # the names are times and sort as such
    known = {p.parent.parent.name for p in runs_dir.glob("*/*/run.json")}
    raise ValueError(f"no run called {str(name)!r} in {runs_dir}; {nearest(str(name), known)}; name a run directory, "
                     "<recipe>/<time> or <recipe>, or make one with `compress run RECIPE`")  # fmt: skip


def _read(file: Path, keys: dict[str, type]) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}; restore it, or run the recipe again") from error
    if (got := data.get("schema") if isinstance(data, dict) else type(data).__name__) != SCHEMA:
        raise ValueError(f"cannot read {file}: schema {got!r}, this version reads schema {SCHEMA}; "
                         "use the version of compress which wrote it, or run the recipe again")  # fmt: skip
    for key, kind in keys.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"malformed {file}: {key!r} is {data.get(key)!r}, allowed: a {kind.__name__}; "
                             "restore the file, or run the recipe again")  # fmt: skip
    return data
