"""Stop asking a model when every limit on its accuracy is already decided: `eval.stop_early`.

The teacher is scored in full. A student is asked a quarter, a half, three quarters, then all of each task's items, in an order drawn once and
for all, compared with the teacher on the items it answered, and stopped at the first look at which every limit is a PASS or a FAIL. The first 95%
interval that excludes a limit would be wrong far more often than in 5%, so look k, of a share t_k, has a level of its own, P(|Z| < z_k), with

    P(|Z_1| < z_1, ..., |Z_k-1| < z_k-1, |Z_k| >= z_k) = 0.05 (t_k^3 - t_k-1^3)       Z normal, corr(Z_i, Z_j) = sqrt(t_i / t_j) for i < j

alpha spending (Lan & DeMets 1983) by the cube (Kim & DeMets 1987), close to O'Brien & Fleming's bounds. All four intervals hold the truth together in
95% of evaluations (repeated confidence intervals, Jennison & Turnbull 1989), hence also the reported one; a PASS with the truth exactly at the limit
comes in about 2.5%. That is for each limit by itself, as without stopping.

Where nothing is decided early, the last interval is 2.029 / 1.960, 4%, wider. With the limit d standard errors (of the full evaluation) away, 77%
of the items are asked at d = 3, 51% at 5, 32% at 8. Betting confidence sequences (Waudby-Smith & Ramdas 2023), looked at after each of 400 simulated
items, needed 17% where this needs 28%, but decided 91% of cases against 98%, then 36% against 53%, as the limit drew near; and they bound one
mean at a time, where `kept` is a mean over tasks of ratios.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from compress.budget import INCONCLUSIVE, is_accuracy, judge
from compress.score.paired import Items, accuracy, paired_scores
from compress.score.tasks import TaskResult

LOOKS = ((0.25, 0.999219), (0.5, 0.994227), (0.75, 0.981693), (1.0, 0.957572))  # share of the items, level; tests derive them again
Key = tuple[str, int]  # a task, and the number of one of its items in their order
NO_ANSWER = {"loglikelihood": (math.nan, False), "loglikelihood_rolling": math.nan, "generate_until": ""}


def until_certain(
    ask: Callable[[set[Key]], TaskResult], teacher_items: Items, chance: Mapping[str, float], limits: Sequence[Mapping[str, Any]]
) -> tuple[TaskResult, float]:
    """What `ask(items left out)` gives at the look that decides every accuracy limit in `limits`, and that look's level.

    In the result of an early stop, items_left/<task> counts those not asked; no other score of these tasks is in it, only their items.
    """
    docs: dict[str, list[int]] = defaultdict(list)
    for item in sorted((item for item in teacher_items if "correct" in item), key=lambda item: item["doc_id"]):
        docs[item["task"]].append(item["doc_id"])
    order = {task: random.Random(task).sample(range(len(ids)), len(ids)) for task, ids in docs.items()}
    wanted = [{name: limit for name, limit in some.items() if is_accuracy(name)} for some in limits]
    for share, level in LOOKS:
        later = {(task, number) for task, numbers in order.items() for number in numbers[math.ceil(share * len(numbers)) :]}
        result, left_out = ask(later), {(task, docs[task][number]) for task, number in later}
        items = [item for item in result.items if (item["task"], item["doc_id"]) not in left_out]
        assert not any(math.isnan(loglik) for item in items for loglik in item.get("logliks", ())), "an item was taken for one left out"
        own, paired = accuracy(items, level), paired_scores(items, teacher_items, chance, level, partial=True)
        scores, intervals = own.scores | paired.scores, own.intervals | paired.intervals
        words = {verdict["verdict"] for some in wanted for verdict in judge(scores, intervals, some, enforced=False)}
        if later and words and INCONCLUSIVE not in words:
            others = {name: value for name, value in result.scores.items() if name.partition("/")[2].partition("@")[0] not in order}
            left = {f"items_left/{task}": sum(key[0] == task for key in later) for task in order}
            return TaskResult(others | left, items, result.chance), level
    return result, level


def asking(lm: Any, evaluate: Callable[[], TaskResult]) -> Callable[[set[Key]], TaskResult]:
    """`ask` for `until_certain`: lm-eval builds all prompts at every look, for few-shot examples depend on the items before, but requests of
    items left out get no answer at once, and none runs twice. `evaluate` scores `lm`, whose three request methods are replaced."""
    methods, known = {kind: getattr(lm, kind) for kind in NO_ANSWER}, dict[Any, Any]()

    def ask(left_out: set[Key]) -> TaskResult:
        for kind, run in methods.items():
            setattr(lm, kind, partial(_answers, kind, run, known, left_out))
        return evaluate()

    return ask


def _answers(kind: str, run: Callable[..., list[Any]], known: dict[Any, Any], left_out: set[Key], requests: list[Any], **how: Any) -> list[Any]:
    keys = [(kind, *map(str, request.args)) for request in requests]  # lm-eval numbers a task's items, whichever were chosen, from 0
    new = {k: r for k, r in zip(keys, requests, strict=True) if k not in known and (r.task_name, r.doc_id) not in left_out}
    if new:
        known.update(zip(new, run(list(new.values()), **how), strict=True))
    return [known.get(key, NO_ANSWER[kind]) for key in keys]
