"""Where a task and its rows come from: those that ship, lm-eval's own, local files."""

import difflib
import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from compress.assets import configs_dir
from compress.doors import json_lines
from compress.errors import ConfigError

CHOICES, TRUTHFUL = "question choices answerKey", "question {}_targets"
GROUPS = {
    "blimp": "UID",
    "mmlu": "subject",
}  # tasks of lm-eval that are one file here: <group>_<what this field says>

SPLIT_KEYS = ("training_split", "validation_split", "test_split")
FIELDS: dict[str, str] = {  # of a row, as on the hub
    "arc_easy": CHOICES,
    "arc_challenge": CHOICES,
    "openbookqa": "question_stem choices answerKey",
    "boolq": "passage question label",
    "hellaswag": "activity_label ctx_a ctx_b endings label",
    "piqa": "goal sol1 sol2 label",
    "winogrande": "sentence option1 option2 answer",
    "lambada_openai": "text",
    "blimp": "sentence_good sentence_bad UID",
    "mmlu": "question choices answer subject",
    "wikitext": "page",
    "gsm8k": "question answer",
    "truthfulqa_mc1": TRUTHFUL.format("mc1"),
    "truthfulqa_mc2": TRUTHFUL.format("mc2"),
    "crows_pairs_english": "sent_more sent_less",
}


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
        if name not in embedded and not _harness_yaml(name):
            theirs = [
                path.stem for path in _harness_root().rglob("*.yaml")
            ]  # lm-eval calls its files like its tasks
            near = difflib.get_close_matches(name, [*embedded, *FIELDS, *theirs], n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
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
        return {
            name: ConfigurableTask(
                config=_embedded_config(configs_dir() / "tasks" / name / f"{name}.yaml")
            )
        }
    yaml_path = _harness_yaml(name)
    assert yaml_path is not None, "check_tasks comes first"
    manager = TaskManager(include_defaults=False, include_path=str(yaml_path.parent))
    if data_dir is not None:
        index = manager.task_index
        members = [
            {"task": part} | _overrides(index[part].cfg, files)
            for part, files in _local(name, index, data_dir).items()
        ]
        # A group is lm-eval's public way to load registered tasks with some keys changed.
        try:
            parts = dict(manager.load([{"group": "local", "task": members}])["tasks"])
            for task in parts.values() if local_folder(name, data_dir).name not in FIELDS else ():
                for doc in task.eval_docs:
                    _ = task.doc_to_text(doc), task.doc_to_target(doc)
        except Exception as error:  # the task's own code, on rows of others: it may raise anything
            told, folder = (
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                local_folder(name, data_dir),
            )
            raise ValueError(
                f"task {name!r} can't read the rows in {folder} ({told}); write them as the hub has"
                " them"
            ) from error
        return parts
    try:
        return dict(manager.load([name])["tasks"])
    except OSError as error:  # what datasets raises without network or without the data set
        raise ValueError(
            f"task {name!r}: its data can't be had from the hub ({error}); give eval.data_dir with"
            f" {name}/<split>.jsonl"
        ) from error


def _embedded_config(path: Path) -> dict[str, Any]:
    """A task YAML as data, its rows held in memory. ValueError when it names code (`!function` or
    any other tag).
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path} names code or a custom tag ({error.problem}); a task may hold plain data only"
        ) from error
    files = config.pop("dataset_kwargs")["data_files"]
    return config | {
        "custom_dataset": _in_memory(
            {split: read_jsonl(path.parent / file) for split, file in files.items()}
        )
    }


def local_folder(name: str, data_dir: Path) -> Path:
    """Where a task's files are: its own folder, or for one paradigm or subject
    the folder of all.
    """
    group = next(
        (g for g in GROUPS if name.startswith(f"{g}_") and not (data_dir / name).is_dir()), name
    )
    return data_dir / group


def _local(
    name: str, index: Mapping[str, Any], data_dir: Path
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """lm-eval's task -> split -> rows, from `data_dir`. ValueError: no file, a row without a
    field, a paradigm or subject unknown to lm-eval.
    """
    folder = local_folder(name, data_dir)
    group, fields = (
        folder.name if folder.name in GROUPS else None,
        FIELDS.get(folder.name, "").split(),
    )
    placed = {path.stem: _placed(path) for path in sorted(folder.glob("*.jsonl"))}
    files = {split: [row for _, row in rows] for split, rows in placed.items()}
    if not files:
        config = next(
            entry.cfg
            for part, entry in index.items()
            if part.startswith(name) and entry.kind.name == "TASK"
        )
        splits = ", ".join(f"{config[key]}.jsonl" for key in SPLIT_KEYS if config.get(key))
        raise ValueError(
            f"{folder} has no <split>.jsonl; the task needs one of {splits} with the hub's fields"
            f" {', '.join(fields)}"
        )
    for lines in placed.values():
        first = lines[0][1]
        needed = fields or list(first)
        for where, row in lines:
            if lacking := [field for field in needed if field not in row]:
                raise ValueError(
                    f"{where}: the field {lacking[0]!r} is missing; task {name} needs"
                    f" {', '.join(needed)}"
                )
            if fields:
                _check_row(folder.name, row, where)
            elif odd := [field for field in needed if type(row[field]) is not type(first[field])]:
                raise ValueError(
                    f"{where}: the field {odd[0]!r} is a {type(row[odd[0]]).__name__}, a"
                    f" {type(first[odd[0]]).__name__} above"
                )
    if group is None:
        return {name: files}
    parts: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for split, rows in files.items():
        for row in rows:
            parts[f"{group}_{row[GROUPS[group]]}"][split].append(row)
    wanted = sorted(parts) if name == group else [name]
    for part in wanted:
        if part not in index or part not in parts:
            got = f"{GROUPS[group]!r} gives {', '.join(sorted(parts)[:5])}, ..."
            raise ValueError(f"{folder}: {part!r} is no task of lm-eval with rows here; {got}")
    return {part: dict(parts[part]) for part in wanted}


def _choices(name: str, field: str, value: Any) -> tuple[int, list[Any], str]:
    """Of a field with a row's choices: how many there are, their labels, and what is needed
    instead where they can't be taken.
    """
    texts: Any
    labels: Any
    if plain := name == "mmlu" or field == "endings":
        texts, labels, wanted = value, [], "a list of texts"
    else:
        keys = ("choices", "labels") if field.endswith("_targets") else ("text", "label")
        texts, labels = (value.get(key) if isinstance(value, dict) else None for key in keys)
        wanted = f"{keys[0]} and {keys[1]}, lists as long as each other"
    if (
        not isinstance(texts, list)
        or not texts
        or not all(isinstance(text, str) for text in texts)
        or not isinstance(labels, list)
    ):
        return 0, [], wanted
    whole = (len(texts) == 4 or name != "mmlu") if plain else len(labels) == len(texts)
    if field.endswith("_targets"):
        whole = whole and "1" in map(str, labels) and set(map(str, labels)) <= {"0", "1"}
    return len(texts), labels, "" if whole else wanted


def _check_row(name: str, row: dict[str, Any], where: str) -> None:
    """ValueError when a field of a row of a task in `FIELDS` is
    not what the task's own code takes.
    """
    count = {"boolq": 2, "piqa": 2, "winogrande": 3}.get(name, 0)  # winogrande counts from 1
    labels: list[Any] = []
    for field in FIELDS[name].split():
        value, wanted = row[field], ""
        if field in ("choices", "endings") or field.endswith("_targets"):
            count, labels, wanted = _choices(name, field, value)
        elif field == "label" or (field == "answer" and name in ("mmlu", "winogrande")):
            told = isinstance(value, bool) or re.fullmatch("-?[0-9]{1,3}", str(value))
            number = int(value) if told else -1 if value == "" else count
            if not -1 <= number < count:  # "" and -1 where nobody tells
                wanted = f"the number of a choice, below {count}"
        elif field == "answerKey" and value not in labels:
            wanted = f"one of the labels {labels}"
        elif not isinstance(value, str):
            wanted = "a text"
        if wanted:
            raise ValueError(
                f"{where}: the field {field!r} is {json.dumps(value)[:100]}; task {name} needs"
                f" {wanted}"
            )


def _overrides(config: dict[str, Any], files: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Keys of a harness task that make it read these rows. A split without rows falls back to one
    that has some; with a single one, test and few-shot both use it (lm-eval then keeps the item
    itself out of its examples).
    """
    train, validation, test = (
        config.get(key) if config.get(key) in files else None for key in SPLIT_KEYS
    )
    test = test or validation or train or next(iter(files))
    shots = next((s for s in (config.get("fewshot_split"), train, validation) if s in files), test)
    others = {
        "training_split": train if train != test else None,
        "validation_split": validation if validation != test else None,
    }
    return {
        **others,
        "test_split": test,
        "fewshot_split": shots,
        "custom_dataset": _in_memory(files),
    }


def _in_memory(splits: dict[str, list[dict[str, Any]]]) -> Callable[..., dict[str, Any]]:
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
    folders = sorted(path for path in _harness_root().iterdir() if path.is_dir())
    wanted = re.compile(
        rf"^['\"]?{'group' if name in GROUPS else 'task'}['\"]?: *['\"]?{re.escape(name)}['\"]? *$",
        re.MULTILINE,
    )
    for folder in sorted(folders, key=lambda f: not name.startswith(f.name.split("_")[0])):
        for path in sorted(folder.rglob("*.yaml")):
            if wanted.search(path.read_text(encoding="utf-8", errors="replace")):
                return path
    return None
