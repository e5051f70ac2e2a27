"""Where a task and its rows come from: those that ship, lm-eval's own, local files."""

import difflib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.assets import configs_dir
from compress.doors import json_lines
from compress.errors import ConfigError
from compress.score.row_fields import FIELDS, check_rows

# Tasks of lm-eval that are one file here: <group>_<what this field says>.
GROUPS = {"blimp": "UID", "mmlu": "subject"}
SPLIT_KEYS = ("training_split", "validation_split", "test_split")
Rows = list[dict[str, Any]]


def known_tasks() -> list[str]:
    """The embedded tasks, by name."""
    return sorted(
        path.parent.name
        for path in (configs_dir() / "tasks").glob("*/*.yaml")
        if path.stem == path.parent.name
    )


def check_tasks(names: Sequence[str]) -> None:
    """ConfigError for a name that is neither an embedded task nor one of lm-eval's own, with the
    nearest names.
    """
    embedded = known_tasks()
    for name in names:
        if name in embedded or _harness_yaml(name):
            continue

        # lm-eval calls its files like its tasks.
        of_harness = [path.stem for path in _harness_root().rglob("*.yaml")]
        candidates = [*embedded, *FIELDS, *of_harness]
        nearest = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
        raise ConfigError(
            f"unknown task {name!r}; {hint}allowed: embedded: {', '.join(embedded)}; or any"
            " task of lm-eval by its name"
        )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file. ValueError naming file and line when one is not a JSON object, or
    when there is none.
    """
    return [row for _, row in _placed(path)]


def _placed(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The same, each with its file and line."""
    rows = []
    for where, row in json_lines(path):
        if not isinstance(row, dict):
            raise ValueError(
                f"{where} is not a JSON object but a {type(row).__name__}; write one object per"
                " line"
            )
        rows.append((where, row))

    if not rows:
        raise ValueError(f"{path} is empty; a task needs at least one item")
    return rows


def load_task(name: str, data_dir: Path | None) -> dict[str, Any]:
    """The lm-eval task objects that make up a task, by their names: embedded, else from
    `data_dir`, else from the hub.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    if name in known_tasks():
        config = _embedded_config(configs_dir() / "tasks" / name / f"{name}.yaml")
        return {name: ConfigurableTask(config=config)}

    # Only the folder of this task is indexed.
    yaml_path = _harness_yaml(name)
    assert yaml_path is not None, "check_tasks comes first"
    manager = TaskManager(include_defaults=False, include_path=str(yaml_path.parent))
    if data_dir is not None:
        return _from_folder(name, manager, data_dir)

    try:
        return dict(manager.load([name])["tasks"])
    except OSError as error:  # what datasets raises without network or without the data set
        raise ValueError(
            f"task {name!r}: its data can't be had from the hub ({error}); give eval.data_dir with"
            f" {name}/<split>.jsonl"
        ) from error


def _from_folder(name: str, manager: Any, data_dir: Path) -> dict[str, Any]:
    """lm-eval's task objects with the rows of `data_dir`. ValueError as `_local`, and for rows
    that the task's own code can't read.
    """
    index = manager.task_index
    members = [
        {"task": part} | _overrides(index[part].cfg, files)
        for part, files in _local(name, index, data_dir).items()
    ]
    folder = local_folder(name, data_dir)

    # A group is lm-eval's public way to load registered tasks with some keys changed.
    try:
        parts = dict(manager.load([{"group": "local", "task": members}])["tasks"])
        # Rows of a task whose fields nobody listed are read once, to see whether they can be.
        for task in parts.values() if folder.name not in FIELDS else ():
            for doc in task.eval_docs:
                _ = task.doc_to_text(doc), task.doc_to_target(doc)
    except Exception as error:  # the task's own code, on rows of others: it may raise anything
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"task {name!r} can't read the rows in {folder} ({cause}); write them as the hub has"
            " them"
        ) from error
    return parts


def _embedded_config(path: Path) -> dict[str, Any]:
    """A task YAML as data, its rows held in memory. ValueError when it names code (`!function` or
    any other tag).
    """
    import yaml  # a bundle's items need no task's file

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path} names code or a custom tag ({error.problem}); a task may hold plain data only"
        ) from error

    # Its files lie beside it.
    files = config.pop("dataset_kwargs")["data_files"]
    splits = {split: read_jsonl(path.parent / file) for split, file in files.items()}
    return config | {"custom_dataset": _in_memory(splits)}


def local_folder(name: str, data_dir: Path) -> Path:
    """Where a task's files are: its own folder, or for one paradigm or subject
    the folder of all.
    """
    if not (data_dir / name).is_dir():
        for group in GROUPS:
            if name.startswith(f"{group}_"):
                return data_dir / group
    return data_dir / name


def _local(name: str, index: Mapping[str, Any], data_dir: Path) -> dict[str, dict[str, Rows]]:
    """lm-eval's task -> split -> rows, from `data_dir`. ValueError: no file, a row without a
    field, a paradigm or subject unknown to lm-eval.
    """
    folder = local_folder(name, data_dir)
    placed = {path.stem: _placed(path) for path in sorted(folder.glob("*.jsonl"))}
    if not placed:
        raise _no_split(name, index, folder)
    for rows in placed.values():
        check_rows(name, folder.name, rows)

    files = {split: [row for _, row in rows] for split, rows in placed.items()}
    if folder.name not in GROUPS:
        return {name: files}

    # A file of a group holds all paradigms or subjects, each of which is a task of lm-eval.
    parts = _by_part(folder.name, files)
    names = sorted(parts) if name == folder.name else [name]
    for part in names:
        if part not in index or part not in parts:
            got = f"{GROUPS[folder.name]!r} gives {', '.join(sorted(parts)[:5])}, ..."
            raise ValueError(f"{folder}: {part!r} is no task of lm-eval with rows here; {got}")
    return {part: dict(parts[part]) for part in names}


def _no_split(name: str, index: Mapping[str, Any], folder: Path) -> ValueError:
    """That a folder has no rows of a task, and which files the task reads."""
    config = next(
        entry.cfg
        for part, entry in index.items()
        if part.startswith(name) and entry.kind.name == "TASK"
    )

    # What the files would be called, and what a row would hold.
    splits = ", ".join(f"{config[key]}.jsonl" for key in SPLIT_KEYS if config.get(key))
    fields = ", ".join(FIELDS.get(folder.name, "").split())
    return ValueError(
        f"{folder} has no <split>.jsonl; the task needs one of {splits} with the hub's fields"
        f" {fields}"
    )


def _by_part(group: str, files: Mapping[str, Rows]) -> dict[str, dict[str, Rows]]:
    """lm-eval's task -> split -> rows, of a group's files."""
    parts: dict[str, dict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    for split, rows in files.items():
        for row in rows:
            parts[f"{group}_{row[GROUPS[group]]}"][split].append(row)
    return parts


def _overrides(config: dict[str, Any], files: dict[str, Rows]) -> dict[str, Any]:
    """Keys of a harness task that make it read these rows. A split without rows falls back to one
    that has some; with a single one, test and few-shot both use it (lm-eval then keeps the item
    itself out of its examples).
    """
    train, validation, test = (
        config.get(key) if config.get(key) in files else None for key in SPLIT_KEYS
    )
    test = test or validation or train or next(iter(files))
    shots = next((s for s in (config.get("fewshot_split"), train, validation) if s in files), test)

    # What is scored is no split of its own beside the others.
    return {
        "training_split": train if train != test else None,
        "validation_split": validation if validation != test else None,
        "test_split": test,
        "fewshot_split": shots,
        "custom_dataset": _in_memory(files),
    }


def _in_memory(splits: dict[str, Rows]) -> Callable[..., dict[str, Any]]:
    """What lm-eval calls to get its splits; rows stay in memory, so no cache is written. A
    function: lm-eval copies and prints its config.
    """

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list(rows) for split, rows in splits.items()}

    return dataset


def _harness_root() -> Path:
    spec: Any = importlib.util.find_spec("lm_eval")  # finds the package without importing it
    return Path(spec.origin).parent / "tasks"


def _harness_yaml(name: str) -> Path | None:
    """The YAML of lm-eval's own task `name`, None when there is none. Folders named like the
    task's beginning are read first.
    """
    key = "group" if name in GROUPS else "task"
    naming_line = re.compile(
        rf"^['\"]?{key}['\"]?: *['\"]?{re.escape(name)}['\"]? *$",
        re.MULTILINE,
    )

    # Most tasks are found in the first folder.
    folders = sorted(path for path in _harness_root().iterdir() if path.is_dir())
    for folder in sorted(folders, key=lambda f: not name.startswith(f.name.split("_")[0])):
        for path in sorted(folder.rglob("*.yaml")):
            if naming_line.search(path.read_text(encoding="utf-8", errors="replace")):
                return path
    return None
