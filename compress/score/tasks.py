"""Tasks through lm-eval, and scored items as plain rows that can be scored again without any
task's code.

For an item with context x and options y_1..y_K the choice is argmax_k log p(y_k | x), `acc` the
share of right choices. A last word is right when greedy decoding would write it, a written answer
when the task's first filter finds the reference in it. Intervals of accuracies and all that is said
of whole documents follow from the items (score/intervals.py: accuracy, perplexities).

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

from compress.score.intervals import Interval, accuracy, paired_scores
from compress.score.perturb import perturbed
from compress.score.task_files import check_tasks, load_task

DRIFTS = {"truthfulqa_mc1": "acc", "truthfulqa_mc2": "acc", "crows_pairs_english": "pct_stereotype"}
# How an item's own figure follows from the log-likelihoods and greediness of its choices and from
# its gold.
RULES: dict[str, Callable[[list[float], list[bool], Any], float]] = {
    "argmax": lambda logliks, greedy, gold: float(np.argmax(logliks) in np.atleast_1d(gold)),
    "greedy": lambda logliks, greedy, gold: float(greedy[0]),
    "mass": lambda logliks, greedy, gold: float(shares(logliks)[gold].sum()),
}
_KINDS = {
    "multiple_choice": "argmax",
    "loglikelihood": "greedy",
    "loglikelihood_rolling": "rolling",
    "generate_until": "text",
}


def shares(logliks: Sequence[float]) -> np.ndarray:
    """softmax: the share (K,) of each choice in the probability of all."""
    mass_K = np.exp(np.asarray(logliks) - max(logliks))
    return mass_K / mass_K.sum()


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

    # All tasks are there before the first is asked.
    loaded = {name: load_task(name, data_dir) for name in tasks}
    items = []
    for name, parts in loaded.items():
        for task in parts.values():
            examples = task.get_config("num_fewshot")
            if num_fewshot is not None and examples != 0:
                examples = num_fewshot
            task.set_config("num_fewshot", examples or 0)
            task.set_fewshot_seed(1234)  # lm-eval's own default
        items += _score(lm, name, parts, limit)

    result = _summary(items)
    if items and perturbations:
        return _with_perturbations(lm, result, perturbations)
    return result


def _score(lm: Any, name: str, parts: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """Items of one task, made of lm-eval's tasks `parts`; doc_id counts through all of them."""
    import lm_eval
    import lm_eval.api.task
    from tqdm import tqdm

    # Bars redraw themselves; a log file wants lines.
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=None)

    # Which documents of each part.
    sizes = {part: len(task.eval_docs) for part, task in parts.items()}
    *starts, count = np.cumsum([0, *sizes.values()]).tolist()
    start_of = dict(zip(parts, starts, strict=True))
    picked = None
    if limit and limit < count:
        picked = _evenly(limit, count, sizes, start_of)
        parts = {part: task for part, task in parts.items() if picked[part]}

    # Not simple_evaluate: around this same call it reseeds Python, numpy and torch, and runs git
    # and lscpu every time.
    output = lm_eval.evaluate(
        lm, {"tasks": parts}, samples=picked, bootstrap_iters=0, log_samples=True
    )

    # lm-eval scores by each of a task's filters; the first counts.
    items = []
    for part, task in parts.items():
        first_filter = next(iter(task.instances[0].filtered_resps))
        samples = [s for s in output["samples"][part] if s["filter"] == first_filter]
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            place = {"task": name, "doc_id": start_of[part] + sample["doc_id"]}
            items.append(place | _item(name, task, sample))
    return items


def _evenly(
    limit: int, count: int, sizes: Mapping[str, int], start_of: Mapping[str, int]
) -> dict[str, list[int]]:
    """`limit` of all `count` documents, evenly spaced, as places in each part. Files are often
    sorted by kind, and their first items are no sample.
    """
    even = [i * count // limit for i in range(limit)]
    return {
        part: [i - start_of[part] for i in even if 0 <= i - start_of[part] < size]
        for part, size in sizes.items()
    }


def _item(name: str, task: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """What was asked and what came of it, in JSON's types."""
    arguments, answers = sample["arguments"], sample["filtered_resps"]
    rule = "mass" if name == "truthfulqa_mc2" else _KINDS[task.OUTPUT_TYPE]

    # A document as a whole.
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

    # A written answer.
    if rule == "text":
        asked = {"rule": rule, "context": arguments[0][0], "choices": [], "gold": sample["target"]}
        correct = sample["exact_match"] if "exact_match" in sample else sample["acc"]
        return asked | {"text": answers[0], "correct": bool(correct)}

    # Choices behind one context, or behind one each.
    contexts = [context for context, _ in arguments]
    asked = {
        "rule": rule,
        "context": contexts[0] if len(set(contexts)) == 1 else contexts,
        "choices": [choice for _, choice in arguments],
        "gold": _gold(rule, task, sample),
    }
    logliks = [float(answer[0]) for answer in answers]
    return asked | _judged(name, logliks, float(sample[DRIFTS.get(name, "acc")]), rule)


def _gold(rule: str, task: Any, sample: dict[str, Any]) -> Any:
    """The number of the right choice, or the numbers of all that are true."""
    if rule == "mass":
        labels = sample["doc"]["mc2_targets"]["labels"]
        return [i for i, label in enumerate(labels) if label == 1]
    if rule == "greedy":
        return 0
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    return task.doc_to_choice(sample["doc"]).index(gold) if isinstance(gold, str) else gold


def _judged(name: str, logliks: list[float], value: float, rule: str) -> dict[str, Any]:
    """What came of an item with choices: `correct`, or the task's own figure as `value`."""
    answer = {"logliks": logliks, "choice": logliks.index(max(logliks))}
    if rule == "mass" or DRIFTS.get(name, "acc") != "acc":
        return answer | {"value": value}
    return answer | {"correct": bool(value)}


def rescore(lm: Any, rows: Sequence[dict[str, Any]]) -> TaskResult:
    """Score rendered items again: dicts as in `TaskResult.items`, whose answers are not looked at.
    No task is loaded. Written answers are left out: telling right from wrong takes their task's
    own filter.
    """
    # Everything is asked at once: what items share is then computed once.
    rows = [row for row in rows if row["rule"] != "text"]
    pairs: list[tuple[str, str]] = []
    texts: list[str] = []
    for row in rows:
        if row["rule"] == "rolling":
            texts.append(row["choices"][0])
            continue
        contexts = row["context"]
        if isinstance(contexts, str):
            contexts = [contexts] * len(row["choices"])
        pairs += zip(contexts, row["choices"], strict=True)
    answers = iter(lm.loglikelihood([_asked(*pair) for pair in pairs]))
    totals = iter(lm.loglikelihood_rolling([_asked(text) for text in texts]))

    # Each item takes its own from what came.
    items = []
    for row in rows:
        if row["rule"] == "rolling":
            items.append(row | {"logliks": [next(totals)]})
            continue
        logliks, greedy = map(list, zip(*islice(answers, len(row["choices"])), strict=True))
        value = RULES[row["rule"]](logliks, greedy, row["gold"])
        items.append(row | _judged(row["task"], logliks, value, row["rule"]))
    return _summary(items)


def _asked(*args: str) -> Any:
    """What an lm-eval model is handed: of no task."""
    return SimpleNamespace(args=args, task_name=None, doc_id=None)


def _summary(items: list[dict[str, Any]]) -> TaskResult:
    """Figures of items, task by task."""
    by_task = defaultdict(list)
    for item in items:
        by_task[item["task"]].append(item)

    result = TaskResult({f"n/{task}": len(rows) for task, rows in by_task.items()}, items, {}, {})
    for task, rows in by_task.items():
        count = len(rows)
        if "value" in rows[0]:
            result.scores[f"{DRIFTS[task]}/{task}"] = sum(row["value"] for row in rows) / count
        if "correct" in rows[0]:
            result.scores[f"acc/{task}"] = sum(row["correct"] for row in rows) / count

            # Only a choice can be guessed.
            chance = 0.0
            if rows[0]["rule"] == "argmax":
                chance = sum(1 / len(row["logliks"]) for row in rows) / count
            result.chance[task] = chance
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
    unreached = sorted({item["task"] for item in clean.items} - reached)
    if unreached:
        logging.getLogger(__name__).warning(
            "perturbations leave these tasks as they are, for want of an accuracy or a context: %s",
            ", ".join(unreached),
        )

    for name in names:
        damaged = [item | {"context": perturbed(item["context"], name)} for item in asked]
        again = rescore(lm, damaged)
        correct = accuracy(again.items)
        paired = paired_scores(again.items, asked, clean.chance)
        for task in sorted(reached):
            key, points_lost = f"acc/{task}", f"points_lost/{task}"
            acc, drop = f"acc/{task}@{name}", f"drop/{task}@{name}"
            difference = clean.scores[key] - again.scores[key]
            clean.scores[acc] = again.scores[key]
            clean.scores[drop] = paired.scores.get(points_lost, difference)

            # Intervals are of right and wrong answers, not of shares of probability.
            if key in correct.intervals:
                clean.intervals[acc] = correct.intervals[key]
                clean.intervals[drop] = paired.intervals[points_lost]
    return clean


def drift(student: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """drift/<task> of every task of `DRIFTS` in both scores."""
    keys = {task: f"{figure}/{task}" for task, figure in DRIFTS.items()}
    return {
        f"drift/{task}": student[key] - teacher[key]
        for task, key in keys.items()
        if key in student and key in teacher
    }
