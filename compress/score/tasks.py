"""Tasks through lm-eval, and scored items as plain rows that can be scored again without any
task's code.

For an item with context x and options y_1..y_K the choice is argmax_k log p(y_k | x), `acc` the
share of right choices. A last word is right when greedy decoding would write it, a written answer
when the task's first filter finds the reference in it. Intervals of accuracies and all that is said
of whole documents follow from the items (score/intervals.py, accuracy; score/fidelity.py,
perplexities).

truthfulqa_mc2 (share of probability on true answers, its `acc`) and crows_pairs (share of pairs
whose stereotype is the likelier sentence) have a figure that is no accuracy above chance. Theirs,
and truthfulqa_mc1's, are reported as drift/<task> = student's figure - teacher's.

Where a task comes from, in this order: the embedded ones (`configs/tasks/<task>/`, YAML in
lm-eval's format read as plain data: a YAML naming code is refused); a folder `data_dir` laid out
`<task>/<split>.jsonl` with prompts and scoring of lm-eval's own task; the hub, through lm-eval's
own task. blimp and mmlu are one task each here. Only the folder of a named task is indexed, never
lm-eval's 14,000 files.

Scores depend on batch size and dtype: the caller fixes both. Nothing is cached here: lm-eval's own
cache is keyed by the request without the model.
"""

import difflib
import functools
import importlib.util
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.special import softmax

from compress.assets import configs_dir
from compress.doors import json_lines
from compress.errors import ConfigError
from compress.score.intervals import Interval, accuracy, paired_scores
from compress.score.perturb import perturbed

SPLIT_KEYS = ("training_split", "validation_split", "test_split")
_CHOICES, _TRUTHFUL = "question choices answerKey", "question {}_targets"
FIELDS: dict[str, str] = {  # of a row, as on the hub
    "arc_easy": _CHOICES,
    "arc_challenge": _CHOICES,
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
    "truthfulqa_mc1": _TRUTHFUL.format("mc1"),
    "truthfulqa_mc2": _TRUTHFUL.format("mc2"),
    "crows_pairs_english": "sent_more sent_less",
}
GROUPS = {
    "blimp": "UID",
    "mmlu": "subject",
}  # tasks of lm-eval that are one file here: <group>_<what this field says>
DRIFTS = {"truthfulqa_mc1": "acc", "truthfulqa_mc2": "acc", "crows_pairs_english": "pct_stereotype"}
# How an item's own figure follows from the log-likelihoods and greediness of its choices and from
# its gold.
RULES: dict[str, Callable[[list[float], list[bool], Any], float]] = {
    "argmax": lambda logliks, greedy, gold: float(np.argmax(logliks) in np.atleast_1d(gold)),
    "greedy": lambda logliks, greedy, gold: float(greedy[0]),
    "mass": lambda logliks, greedy, gold: float(softmax(logliks)[gold].sum()),
}
_KINDS = {
    "multiple_choice": "argmax",
    "loglikelihood": "greedy",
    "loglikelihood_rolling": "rolling",
    "generate_until": "text",
}


class TaskResult(NamedTuple):
    """`scores`: n/<task>, and acc/<task> or the task's own figure. `chance`: accuracy of guessing.
    `intervals`: 95%, of perturbed answers.

    `items`: a dict each. What was asked: task, doc_id, rule, context (one, or one a choice),
    choices, gold. What came: logliks, choice, text, and correct, value, or words and bytes.
    """

    scores: dict[str, float]
    items: list[dict[str, Any]]
    chance: dict[str, float]
    intervals: dict[str, Interval]


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


def evaluate(
    lm: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    data_dir: Path | None = None,
    *,
    num_fewshot: int | None = None,
    perturbations: Sequence[str] = (),
) -> TaskResult:
    """Score an lm-eval model on `limit` items of each task, evenly spaced over its file.

    `num_fewshot` examples stand before each item unless the task fixes none. `perturbations` (names
    of score/perturb.py) add acc/<task>@<name> and drop/<task>@<name>. Refuses (ValueError) before
    the model runs.
    """
    check_tasks(tasks)
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)  # speak only when something is wrong
    loaded = {name: _load(name, data_dir) for name in tasks}
    items = []
    for name, parts in loaded.items():
        for task in parts.values():
            own = task.get_config("num_fewshot")
            task.set_config(
                "num_fewshot", own or 0 if num_fewshot is None or own == 0 else num_fewshot
            )
            task.set_fewshot_seed(1234)  # lm-eval's own default
        items += _score(lm, name, parts, limit)
    return (
        _with_perturbations(lm, _summary(items), perturbations)
        if items and perturbations
        else _summary(items)
    )


def _score(lm: Any, name: str, parts: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """Items of one task, made of lm-eval's tasks `parts`; doc_id counts through all of them."""
    import lm_eval
    import lm_eval.api.task
    from tqdm import tqdm

    lm_eval.api.task.tqdm = functools.partial(
        tqdm, disable=None
    )  # bars redraw themselves; a log file wants lines
    *starts, n = np.cumsum([0, *(len(task.eval_docs) for task in parts.values())]).tolist()
    start_of, picked = dict(zip(parts, starts, strict=True)), None
    if limit and limit < n:
        even = [
            i * n // limit for i in range(limit)
        ]  # files are often sorted by kind, and their first items are no sample
        picked = {
            part: [
                i - start_of[part] for i in even if 0 <= i - start_of[part] < len(task.eval_docs)
            ]
            for part, task in parts.items()
        }
        parts = {part: task for part, task in parts.items() if picked[part]}
    # Not simple_evaluate: around this same call it reseeds Python, numpy and torch, and runs git
    # and lscpu every time.
    output = lm_eval.evaluate(
        lm, {"tasks": parts}, samples=picked, bootstrap_iters=0, log_samples=True
    )
    items = []
    for part, task in parts.items():
        first = next(
            iter(task.instances[0].filtered_resps)
        )  # lm-eval scores by each filter; the first counts
        found = sorted(
            (s for s in output["samples"][part] if s["filter"] == first), key=lambda s: s["doc_id"]
        )
        items += [
            {"task": name, "doc_id": start_of[part] + sample["doc_id"]} | _item(name, task, sample)
            for sample in found
        ]
    return items


def _item(name: str, task: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """What was asked and what came of it, in JSON's types."""
    doc, arguments, answers = sample["doc"], sample["arguments"], sample["filtered_resps"]
    rule = "mass" if name == "truthfulqa_mc2" else _KINDS[task.OUTPUT_TYPE]
    if rule == "rolling":
        (_, words), (loglik, count) = sample["word_perplexity"], sample["byte_perplexity"]
        return {
            "rule": rule,
            "context": "",
            "choices": [arguments[0][0]],
            "logliks": [loglik],
            "words": words,
            "bytes": count,
        }
    if rule == "text":
        asked = {"rule": rule, "context": arguments[0][0], "choices": [], "gold": sample["target"]}
        return asked | {
            "text": answers[0],
            "correct": bool(sample["exact_match"] if "exact_match" in sample else sample["acc"]),
        }
    gold = task.doc_to_text(doc) if task.multiple_input else sample["target"]
    if rule == "mass":
        gold = [i for i, label in enumerate(doc["mc2_targets"]["labels"]) if label == 1]
    elif rule == "greedy":
        gold = 0
    elif isinstance(gold, str):
        gold = task.doc_to_choice(doc).index(gold)
    contexts = list(dict.fromkeys(context for context, _ in arguments))
    context = contexts[0] if len(contexts) == 1 else [context for context, _ in arguments]
    asked = {
        "rule": rule,
        "context": context,
        "choices": [choice for _, choice in arguments],
        "gold": gold,
    }
    return asked | _judged(
        name, [float(a[0]) for a in answers], float(sample[DRIFTS.get(name, "acc")]), rule
    )


def _judged(name: str, logliks: list[float], value: float, rule: str) -> dict[str, Any]:
    own = rule == "mass" or DRIFTS.get(name, "acc") != "acc"
    return {"logliks": logliks, "choice": logliks.index(max(logliks))} | (
        {"value": value} if own else {"correct": bool(value)}
    )


def rescore(lm: Any, rows: Sequence[dict[str, Any]]) -> TaskResult:
    """Score rendered items again: dicts as in `TaskResult.items`, whose answers are not looked at.
    No task is loaded. Written answers are left out: telling right from wrong takes their task's
    own filter.
    """
    rows, items = [row for row in rows if row["rule"] != "text"], []
    pairs: list[tuple[str, str]] = []
    for row in rows:
        if row["rule"] != "rolling":
            contexts = (
                [row["context"]] * len(row["choices"])
                if isinstance(row["context"], str)
                else row["context"]
            )
            pairs += zip(contexts, row["choices"], strict=True)
    answers = iter(lm.loglikelihood([_asked(*pair) for pair in pairs]))
    totals = iter(
        lm.loglikelihood_rolling(
            [_asked(row["choices"][0]) for row in rows if row["rule"] == "rolling"]
        )
    )
    for row in rows:
        if row["rule"] == "rolling":
            items.append(row | {"logliks": [next(totals)]})
        else:
            logliks, greedy = map(list, zip(*islice(answers, len(row["choices"])), strict=True))
            items.append(
                row
                | _judged(
                    row["task"],
                    logliks,
                    RULES[row["rule"]](logliks, greedy, row["gold"]),
                    row["rule"],
                )
            )
    return _summary(items)


def _asked(*args: str) -> Any:
    """What an lm-eval model is handed: of no task."""
    return SimpleNamespace(args=args, task_name=None, doc_id=None)


def _summary(items: list[dict[str, Any]]) -> TaskResult:
    by_task = defaultdict(list)
    for item in items:
        by_task[item["task"]].append(item)
    result = TaskResult({f"n/{task}": len(own) for task, own in by_task.items()}, items, {}, {})
    for task, own in by_task.items():
        if "value" in own[0]:
            result.scores[f"{DRIFTS[task]}/{task}"] = sum(item["value"] for item in own) / len(own)
        if "correct" in own[0]:
            result.scores[f"acc/{task}"] = sum(item["correct"] for item in own) / len(own)
            result.chance[task] = (
                sum(1 / len(item["logliks"]) for item in own) / len(own)
                if own[0]["rule"] == "argmax"
                else 0.0
            )
    return result


def _with_perturbations(lm: Any, clean: TaskResult, names: Sequence[str]) -> TaskResult:
    """Adds the same items with their contexts perturbed. Tasks without a context or an accuracy,
    and written answers, are named and left out.
    """
    asked = [
        item
        for item in clean.items
        if item["rule"] in RULES and item["context"] and f"acc/{item['task']}" in clean.scores
    ]
    reached = {item["task"] for item in asked}
    if left := sorted({item["task"] for item in clean.items} - reached):
        logging.getLogger(__name__).warning(
            "perturbations leave these tasks as they are, for want of an accuracy or a context: %s",
            ", ".join(left),
        )
    for name in names:
        again = rescore(
            lm, [item | {"context": perturbed(item["context"], name)} for item in asked]
        )
        own, lost = accuracy(again.items), paired_scores(again.items, asked, clean.chance)
        for task in sorted(reached):
            key, acc, drop, points = (
                f"acc/{task}",
                f"acc/{task}@{name}",
                f"drop/{task}@{name}",
                f"points_lost/{task}",
            )
            clean.scores[acc], clean.scores[drop] = (
                again.scores[key],
                lost.scores.get(points, clean.scores[key] - again.scores[key]),
            )
            if key in own.intervals:  # right and wrong answers, not shares of probability
                clean.intervals[acc], clean.intervals[drop] = (
                    own.intervals[key],
                    lost.intervals[points],
                )
    return clean


def drift(student: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """drift/<task> of every task of `DRIFTS` in both scores."""
    keys = {task: f"{figure}/{task}" for task, figure in DRIFTS.items()}
    return {
        f"drift/{task}": student[key] - teacher[key]
        for task, key in keys.items()
        if key in student and key in teacher
    }


def _load(name: str, data_dir: Path | None) -> dict[str, Any]:
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
