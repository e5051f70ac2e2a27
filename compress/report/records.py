"""Read run directories back: `run.json` plus one `record.json` per slot, checked at the door;
committed runs and bundles as well.

Everything below `report/` is a pure view: records go in, tables and pages come out. A run that is
still going, or was interrupted, is readable: the slots that have a record, and that run.json names,
are shown.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from compress.errors import EXIT_BUDGET, EXIT_OK, nearest, tree_without_credentials
from compress.score.task_files import read_jsonl

SCHEMA = 1
MANIFEST_SCHEMAS = (1, 2)  # of bundles that are read
Record = dict[str, Any]
RUN_KEYS: dict[str, type] = {"recipe": str, "name": str, "slots": list}
RECORD_KEYS: dict[str, type] = {"slot": str, "technique": str, "scores": dict, "verdicts": list}
MANIFEST_KEYS: dict[str, type] = {
    "run": str,
    "judged": str,
    "scores": dict,
    "verdicts": list,
    "lineage": list,
    "config": dict,
}
SLOT_FOLDER = re.compile(r"\d{2,3}-")
VERDICTS = ("FAIL", "INCONCLUSIVE", "PASS")  # worst first


@dataclass(frozen=True)
class Run:
    """A run directory, one slot of it, or a bundle: `info` is run.json as written, `records` are
    in slot order (at least one).
    """

    path: Path
    info: dict[str, Any]
    records: list[Record]
    chosen: str = ""  # the slot that was asked for

    @property
    def name(self) -> str:
        return "/".join(filter(None, [self.info["name"], self.chosen]))

    @property
    def teacher(self) -> Record | None:
        return teacher_of(self.records)

    @property
    def final(self) -> Record:
        """The slot that was asked for, or what the budget judges."""
        return next(
            (r for r in self.records if r["slot"] == self.chosen), judged(self.records, self.info)
        )

    def rows(self, record: Record, kind: str) -> list[dict[str, Any]]:
        """Rows of a record's `items` (answers to tasks), `open` (answers to open prompts) or
        `steps` (training curve), empty where they were not kept; of a bundle, both sides' answers.
        """
        if "judged" in self.info:
            side = "teacher" if record["technique"] == "teacher" else "student"
            return bundle_rows(self.path, side, kind)
        return _rows(folder_of(self.path, record) / f"{kind}.jsonl")

    def model(self) -> tuple[Path, str]:
        """Weights or file of `final`, and the runtime that it is for. ValueError when they are not
        here.
        """
        if "judged" in self.info:
            path = self.path / self.info["judged"]
        else:
            path = (folder_of(self.path, self.final) / "weights").resolve()

        # A run keeps a link to the store, which may have been emptied or be elsewhere.
        if not path.exists():
            raise ValueError(
                f"{self.path} does not hold the weights of {self.final['slot']}: {path} is missing;"
                " name the run itself or its bundle"
            )
        return path, self.final.get("runtime", "torch")


def folder_of(run_dir: Path, record: Record) -> Path:
    """The folder NN-<slot> of a record, one folder whatever the slot is called."""
    name = re.sub(r"[^\w.-]", "_", record["slot"])[:100]
    return run_dir / f"{record.get('index', 0):02d}-{name}"


def record_files(run_dir: Path) -> list[Path]:
    """The records in the folders of a run directory that are called like a slot's."""
    return [
        file
        for file in sorted(run_dir.glob("*/record.json"))
        if SLOT_FOLDER.match(file.parent.name)
    ]


def bundle_rows(bundle: Path, side: str, kind: str) -> list[dict[str, Any]]:
    """What a bundle's "teacher" or "student" answered, to the tasks (`items`) or the open prompts
    (`open`), as rows of a run's folders. ValueError when they are malformed."""
    if kind == "items":
        return _rows(bundle / ("requests.jsonl" if side == "teacher" else "answers.jsonl"))
    if kind != "open":
        return []

    # The prompts are in a file of their own, once for both sides.
    try:
        shared = {
            row["id"]: {"id": row["id"], "kind": row.get("kind", "own"), "prompt": row["prompt"]}
            for row in _rows(bundle / "open_prompts.jsonl")
        }
        return [shared[row["id"]] | row[side] for row in _rows(bundle / "open_answers.jsonl")]
    except (KeyError, TypeError) as error:
        where = "open_prompts.jsonl or open_answers.jsonl"
        raise ValueError(
            f"malformed {bundle}: {error} is missing in {where}; copy the bundle again"
        ) from error


def judged(records: Sequence[Record], info: Record) -> Record:
    """What the budget judges: the first file that ships, else the slot that the run's `config`
    ships, else the last one.
    """
    ship = info.get("config", {}).get("ship")
    files = [r for r in records if r["technique"].startswith("export_")]
    shipped = [r for r in records if r["slot"] == ship]
    return next(iter(files or shipped), records[-1])


def _rows(file: Path) -> list[dict[str, Any]]:
    return read_jsonl(file) if file.is_file() and file.stat().st_size else []


def teacher_of(records: Sequence[Record], runtime: str = "torch") -> Record | None:
    """The teacher's record that a difference is taken against: in the same runtime if it was
    scored there, for times must be comparable.
    """
    teachers = [r for r in records if r["technique"] == "teacher"]
    return next(
        (r for r in teachers if r.get("runtime") == runtime), teachers[0] if teachers else None
    )


def worst(records: list[Record]) -> str | None:
    """The worst enforced verdict of these records (FAIL before INCONCLUSIVE before PASS), None
    without any.
    """
    verdicts = chain.from_iterable(record["verdicts"] for record in records)
    words = {verdict["verdict"] for verdict in verdicts if verdict.get("enforced")}
    return next((word for word in VERDICTS if word in words), None)


def load_run(path: Path | str) -> Run:
    """Load a run directory. ValueError (what, got, allowed, next) when it is missing, malformed or
    has no record.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        raise ValueError(
            f"no run at {path}: it has no run.json; a run is a folder runs/<recipe>/<time>/ written"
            " by `compress run RECIPE`; name such a folder, or `<recipe>` for its newest run"
        )
    info = _read(path / "run.json", RUN_KEYS)
    slots = info["slots"]
    record_by_place = _read_records(path)
    for place, record in record_by_place.items():
        if record["slot"] not in slots and info.get("exit") in (EXIT_OK, EXIT_BUDGET):
            raise ValueError(
                f"malformed {place}: slot {record['slot']!r} is not in run.json's slots {slots}"
            )
        _check_record(place, record)

    # Slots that are not named were being written when the run was stopped.
    named = [record for record in record_by_place.values() if record["slot"] in slots]
    records = sorted(named, key=lambda record: slots.index(record["slot"]))
    names = [record["slot"] for record in records]
    if len(set(names)) < len(names):
        raise ValueError(
            f"malformed run {path}: two records for one slot in {names}; remove the stale folder"
        )
    missing = [slot for slot in slots if slot not in names]
    if not records or (missing and info.get("exit") == 0):
        raise ValueError(
            f"incomplete run {path}: no record.json for {', '.join(missing) or 'any slot'}; "
            f"`compress run {info['recipe']}` again picks up what is finished"
        )
    return Run(path, info, records)


def _read_records(path: Path) -> dict[Path, Record]:
    """Where each record of a run is read, and the record: in its slots' folders; of a committed
    run, which has none, in records.jsonl.
    """
    if files := record_files(path):
        return {file: _read(file, RECORD_KEYS) for file in files}
    file = path / "records.jsonl"
    return {
        path / f"{file.name}, line {number}": _checked(file, row, RECORD_KEYS)
        for number, row in enumerate(_rows(file), 1)
    }


def _check_record(place: Path, record: Record) -> None:
    """ValueError unless all scores are numbers, and all verdicts have a word and a sentence."""
    for key, value in record["scores"].items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"malformed {place}: scores[{key!r}] is {value!r}, allowed: a number")

    for verdict in record["verdicts"]:
        if (
            not isinstance(verdict, dict)
            or verdict.get("verdict") not in VERDICTS
            or "sentence" not in verdict
        ):
            raise ValueError(
                f"malformed {place}: verdict {verdict!r}, allowed: a sentence and one of {VERDICTS}"
            )


def open_run(name: str, runs_dir: Path | str = "runs") -> Run:
    """A run by its path, by `demo/2026-11-21T03-30-00` or by `demo` (its newest); one slot of it,
    as RUN/SLOT; or a bundle, by its path.
    """
    # The whole name as a run or a bundle first; then its last part as a slot, with or without the
    # number of its folder.
    if run := _run_at(name, "", Path(runs_dir)):
        return run
    above, _, folder = name.rstrip("/").rpartition("/")
    if run := _run_at(above or name, re.sub(r"^\d\d-", "", folder), Path(runs_dir)):
        return run

    recipes = {file.parent.parent.name for file in Path(runs_dir).glob("*/*/run.json")}
    raise ValueError(
        f"no run called {name!r} in {runs_dir}; {nearest(name, recipes)}; name a run directory,"
        " <recipe>/<time> or <recipe>, a slot below one of these, or a bundle; or make one with"
        " `compress run RECIPE`"
    )


def _run_at(name: str, slot: str, runs_dir: Path) -> Run | None:
    """The run, or without a `slot` the bundle, at the path `name` or below `runs_dir`; None where
    there is none. ValueError: it has no such slot.
    """
    for place in (Path(name), runs_dir / name):
        if not slot and (place / "manifest.json").is_file():
            return _load_bundle(place)

        # A recipe's folder holds its runs, whose names are times and sort as such.
        is_run = (place / "run.json").is_file()
        runs = [place] if is_run else [file.parent for file in place.glob("*/run.json")]
        if not runs:
            continue
        run = load_run(max(runs, key=lambda folder: folder.name))
        slots = [record["slot"] for record in run.records]
        if slot and slot not in slots:
            raise ValueError(f"{place} has no run or slot {slot!r}; {nearest(slot, slots)}")
        return replace(run, chosen=slot)
    return None


def _load_bundle(path: Path) -> Run:
    """A bundle as a run of two records: the teacher, and the file that was judged."""
    manifest = _read(path / "manifest.json", MANIFEST_KEYS, MANIFEST_SCHEMAS)
    if re.fullmatch(r"\.*|.*/.*", manifest["judged"], re.DOTALL):
        raise ValueError(
            f"malformed {path / 'manifest.json'}: 'judged' is {manifest['judged']!r}, allowed: a"
            " file or folder of the bundle"
        )
    lineage = manifest["lineage"]
    if not lineage or not all(
        isinstance(slot, dict) and {"slot", "technique"} <= slot.keys() for slot in lineage
    ):
        raise ValueError(
            f"malformed {path / 'manifest.json'}: 'lineage', allowed: slots with their techniques;"
            " copy the bundle again"
        )

    # The manifest has the scores of what was judged alone.
    student = judged(lineage, manifest)
    runtimes = {"export_gguf": "llama.cpp", "export_onnx": "onnxruntime"}
    numbers = {key: manifest.get(key, {}) for key in ("scores", "intervals", "rows", "verdicts")}
    runtime = runtimes.get(student["technique"], "torch")
    teachers = [slot for slot in lineage if slot["slot"] == "teacher"]
    records = [teacher | {"scores": {}, "verdicts": []} for teacher in teachers]
    records.append(student | numbers | {"runtime": runtime})

    recipe = manifest["run"].partition("/")[0]
    named = {"name": f"{manifest['run']}/bundle", "recipe": recipe}
    return Run(path, manifest | named, records)


def _read(file: Path, keys: dict[str, type], schemas: Sequence[int] = (SCHEMA,)) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read {file}: {error}; restore it, or run the recipe again"
        ) from error
    return _checked(file, data, keys, schemas)


def _checked(
    file: Path, data: Any, keys: dict[str, type], schemas: Sequence[int] = (SCHEMA,)
) -> dict[str, Any]:
    """`data` without what gives access in URLs. ValueError unless it is of this version's schema
    and has `keys` of these types.
    """
    schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if schema not in schemas:
        raise ValueError(
            f"cannot read {file}: schema {schema!r}, this version reads schema"
            f" {' and '.join(map(str, schemas))}; "
            "use the version of compress which wrote it, or run the recipe again"
        )

    for key, kind in keys.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(
                f"malformed {file}: {key!r} is {data.get(key)!r}, allowed: a {kind.__name__}; "
                "restore the file, or run the recipe again"
            )
    return dict(tree_without_credentials(data))
