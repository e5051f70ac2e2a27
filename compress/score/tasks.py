"""Multiple-choice tasks through lm-eval: which option does the model find most likely? The only file importing lm_eval.

For an item with context x and options y_1..y_K, the score of an option is log p(y_k | x) summed over its tokens; the choice is the
argmax, `acc` the share of right choices, `acc_stderr` = sqrt(acc (1 - acc) / (n - 1)) (what lm-eval reports).

Where a task comes from, in this order: the embedded ones (`configs/tasks/<task>/`, YAML in lm-eval's format read as plain data: a YAML
naming code is refused); a folder `data_dir` laid out `<task>/<split>.jsonl` with the prompts of lm-eval's own task; the hub, through
lm-eval's own task. Only the folder of a named task is indexed, never lm-eval's 14,000 files.

Scores depend on batch size and dtype: the caller fixes the one, the other is fp32. Nothing is cached here: lm-eval's own cache is keyed
by the request without the model. Left out: generation tasks, task groups.
"""

import difflib
import functools
import importlib.util
import json
import logging
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from compress.assets import configs_dir
from compress.errors import ConfigError

SPLIT_KEYS = ("training_split", "validation_split", "test_split")


class TaskResult(NamedTuple):
    """`scores`: acc/<task>, acc_stderr/<task>, n/<task>. `items`: a dict each (task, doc_id, correct, choice, logliks). `chance`: of guessing."""

    scores: dict[str, float]
    items: list[dict[str, Any]]
    chance: dict[str, float]


def known_tasks() -> list[str]:
    """The embedded tasks, by name."""
    return sorted(path.parent.name for path in (configs_dir() / "tasks").glob("*/*.yaml") if path.stem == path.parent.name)


def check_tasks(names: Sequence[str]) -> None:
    """ConfigError for a name that is neither an embedded task nor one of lm-eval's own, with the nearest names."""
    embedded = known_tasks()
    for name in names:
        if name not in embedded and not _harness_yaml(name):
            theirs = [path.stem for path in _harness_root().rglob("*.yaml")]  # lm-eval calls its files like its tasks
            near = difflib.get_close_matches(name, [*embedded, *theirs], n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            allowed = f"embedded: {', '.join(embedded)}; or any multiple-choice task of lm-eval by its name"
            raise ConfigError(f"unknown task {name!r}; {hint}{allowed}")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file. ValueError naming file and line when one is not a JSON object, or when there is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error}); write one object per line") from error
    if not rows:
        raise ValueError(f"{path} is empty; a task needs at least one item")
    return rows


def make_hf_lm(model_dir: Path, batch_size: int, device: str = "cpu") -> Any:
    """lm-eval's `hf` model over a checkpoint directory, in fp32 with a fixed batch size."""
    from compress.checkpoint import load_model, load_tokenizer

    _quiet()
    from lm_eval.models.huggingface import HFLM

    model: Any = load_model(model_dir)
    return HFLM(pretrained=model.to(device), tokenizer=load_tokenizer(model_dir), batch_size=batch_size, device=device)


def evaluate(lm: Any, tasks: Sequence[str], limit: int | None = None, data_dir: Path | None = None) -> TaskResult:
    """Score an lm-eval model on `limit` items of each task, evenly spaced over its file. Refuses (ValueError) before the model runs."""
    check_tasks(tasks)
    _quiet()
    import lm_eval
    import lm_eval.api.task
    from tqdm import tqdm

    loaded = {name: _load(name, data_dir) for name in tasks}
    for task in loaded.values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(1234)  # lm-eval's own default
    # Not simple_evaluate: around this same call it reseeds Python, numpy and torch, and runs git and lscpu every time.
    if not sys.stderr.isatty():  # bars redraw themselves; a log file wants lines
        lm.loglikelihood = functools.partial(lm.loglikelihood, disable_tqdm=True)
        lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    counts = {name: len(task.eval_docs) for name, task in loaded.items()}
    # Evenly spaced: files are often sorted by kind, and their first items are no sample.
    chosen = {name: [i * n // min(limit, n) for i in range(min(limit, n))] for name, n in counts.items()} if limit else None
    output = lm_eval.evaluate(lm, {"tasks": loaded}, samples=chosen, bootstrap_iters=0, log_samples=True)
    result = TaskResult({}, [], {})
    for task, samples in output["samples"].items():
        items = []
        for sample in sorted(samples, key=lambda s: s["doc_id"]):
            logliks = [float(response[0]) for response in sample["filtered_resps"]]
            item = {"task": task, "doc_id": sample["doc_id"], "correct": bool(sample["acc"])}
            items.append(item | {"choice": logliks.index(max(logliks)), "logliks": logliks})
        n, acc = len(items), sum(i["correct"] for i in items) / len(items)
        result.scores.update({f"acc/{task}": acc, f"acc_stderr/{task}": math.sqrt(acc * (1 - acc) / max(n - 1, 1)), f"n/{task}": n})
        result.chance[task] = sum(1 / len(i["logliks"]) for i in items) / n
        result.items.extend(items)
    return result


def _load(name: str, data_dir: Path | None) -> Any:
    """An lm-eval task object: embedded, else from `data_dir`, else from the hub."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    if name in known_tasks():
        return ConfigurableTask(config=_embedded_config(configs_dir() / "tasks" / name / f"{name}.yaml"))
    yaml_path = _harness_yaml(name)
    assert yaml_path is not None, "check_tasks comes first"
    manager = TaskManager(include_defaults=False, include_path=str(yaml_path.parent))
    if data_dir is None:
        try:
            task = manager.load([name])["tasks"][name]
        except OSError as error:  # what datasets raises without network or without the data set
            raise ValueError(f"task {name!r}: its data can't be had from the hub ({error}); give eval.data_dir with {name}/<split>.jsonl") from error
    else:
        overrides = _local_overrides(manager.task_index[name].cfg, data_dir / name)
        # A group of one is lm-eval's public way to load a registered task with some keys changed.
        task = manager.load([{"group": "local", "task": [{"task": name, **overrides}]}])["tasks"][name]
    if task.get_config("output_type") != "multiple_choice":
        raise ConfigError(f"task {name!r} is {task.get_config('output_type')}; only multiple_choice tasks are scored")
    return task


def _embedded_config(path: Path) -> dict[str, Any]:
    """A task YAML as data, its rows held in memory. ValueError when it names code (`!function` or any other tag)."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise ValueError(f"{path} names code or a custom tag ({error.problem}); a task may hold plain data only") from error
    files = config.pop("dataset_kwargs")["data_files"]
    return config | {"custom_dataset": functools.partial(_in_memory, {split: path.parent / file for split, file in files.items()})}


def _local_overrides(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Keys of a harness task that make it read `folder`/<split>.jsonl. A split without a file falls back to one that has one; with a
    single file, test and few-shot both use it (lm-eval then keeps the item itself out of its examples)."""
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        splits = ", ".join(f"{config[key]}.jsonl" for key in SPLIT_KEYS if config.get(key))
        raise ValueError(f"{folder} has no <split>.jsonl; the task needs one of {splits} with the hub's field names")
    train, validation, test = (config.get(key) if config.get(key) in files else None for key in SPLIT_KEYS)
    test = test or validation or train or next(iter(files))
    shots = next((s for s in (config.get("fewshot_split"), train, validation) if s in files), test)
    others = {"training_split": train if train != test else None, "validation_split": validation if validation != test else None}
    return {**others, "test_split": test, "fewshot_split": shots, "custom_dataset": functools.partial(_in_memory, files)}


def _in_memory(files: dict[str, Path], **_: Any) -> dict[str, Any]:
    """What lm-eval calls to get its splits; rows stay in memory, so no cache is written anywhere."""
    from datasets import Dataset

    return {split: Dataset.from_list(read_jsonl(path)) for split, path in files.items()}


def _harness_root() -> Path:
    spec: Any = importlib.util.find_spec("lm_eval")  # finds the package without importing it
    return Path(spec.origin).parent / "tasks"


def _harness_yaml(name: str) -> Path | None:
    """The YAML of lm-eval's own task `name`, None when there is none. Folders named like the task's beginning are read first."""
    folders = sorted(path for path in _harness_root().iterdir() if path.is_dir())
    wanted = re.compile(rf"^task: *['\"]?{re.escape(name)}['\"]? *$", re.MULTILINE)
    for folder in sorted(folders, key=lambda f: not name.startswith(f.name.split("_")[0])):
        for path in folder.rglob("*.yaml"):
            if wanted.search(path.read_text(encoding="utf-8", errors="replace")):
                return path
    return None


def _quiet() -> None:
    """lm-eval and datasets speak only when something is wrong."""
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
