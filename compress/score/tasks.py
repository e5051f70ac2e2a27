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

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

from compress.score.intervals import Interval, accuracy, paired_scores
from compress.score.perturb import perturbed
from compress.score.task_files import check_tasks, load_task

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
    loaded = {name: load_task(name, data_dir) for name in tasks}
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
