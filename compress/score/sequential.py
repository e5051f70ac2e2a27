"""Stop asking a model when every limit on its accuracy is already decided: `eval.stop_early`.

The teacher is scored in full. A student is asked a quarter, a half, three quarters, then all of
each task's items, in an order drawn once and for all, compared with the teacher on the items it
answered, and stopped at the first look at which every limit is a PASS or a FAIL. The first 95%
interval that excludes a limit would be wrong far more often than in 5%, so look k, of a share t_k,
has a level of its own, P(|Z| < z_k), with

    P(|Z_1| < z_1, ..., |Z_k-1| < z_k-1, |Z_k| >= z_k) = 0.05 (t_k^3 - t_k-1^3)       Z normal,
    corr(Z_i, Z_j) = sqrt(t_i / t_j) for i < j

alpha spending (Lan & DeMets 1983) by the cube (Kim & DeMets 1987), close to O'Brien & Fleming's
bounds. All four intervals hold the truth together in 95% of evaluations (repeated confidence
intervals, Jennison & Turnbull 1989), hence also the reported one; a PASS with the truth exactly at
the limit comes in about 2.5%. That is for each limit by itself, as without stopping.

Where nothing is decided early, the last interval is 2.029 / 1.960, 4%, wider. With the limit d
standard errors (of the full evaluation) away, 77% of the items are asked at d = 3, 51% at 5, 32% at
8. Betting confidence sequences (Waudby-Smith & Ramdas 2023), looked at after each of 400 simulated
items, needed 17% where this needs 28%, but decided 91% of cases against 98%, then 36% against 53%,
as the limit drew near; and they bound one mean at a time, where `kept` is a mean over tasks of
ratios.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compress.budget import INCONCLUSIVE, is_accuracy, judge
from compress.score.intervals import Items, accuracy, paired_scores
from compress.score.tasks import TaskResult

# Share of the items, level; tests derive them again.
LOOKS = ((0.25, 0.999219), (0.5, 0.994227), (0.75, 0.981693), (1.0, 0.957572))


def asked_in_parts(items: Items) -> dict[str, list[Any]]:
    """Items by task that can be asked one by one, in the order drawn for them: those with choices,
    which are right or wrong.
    """
    rows_by_task: dict[str, list[Any]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item["doc_id"]):
        if "correct" in item and item.get("rule") != "text":
            rows_by_task[item["task"]].append(item)
    return {
        task: random.Random(task).sample(rows, len(rows)) for task, rows in rows_by_task.items()
    }


def until_certain(
    ask: Callable[[list[Any]], TaskResult],
    teacher_items: Items,
    chance: Mapping[str, float],
    limits: Sequence[Mapping[str, Any]],
    rest: TaskResult,
) -> tuple[TaskResult, float]:
    """What is known at the look that decides every accuracy limit in `limits`, and that look's
    level. `ask(rows)` scores items of the teacher's anew (`score/tasks.py`, rescore), `rest`
    holds the student's other tasks. After an early stop, items_left/<task> counts those not
    asked.
    """
    rows_by_task = asked_in_parts(teacher_items)
    accuracy_limits = [
        {name: limit for name, limit in group.items() if is_accuracy(name)} for group in limits
    ]
    items = list(rest.items)
    asked = dict.fromkeys(rows_by_task, 0)
    for share, level in LOOKS:
        # The items between the last look and this one.
        rows: list[Any] = []
        for task, task_rows in rows_by_task.items():
            end = math.ceil(share * len(task_rows))
            rows += task_rows[asked[task] : end]
            asked[task] = end
        items += ask(rows).items

        # Is anything still open?
        correct = accuracy(items, level)
        paired = paired_scores(items, teacher_items, chance, level, partial=True)
        scores, intervals = correct.scores | paired.scores, correct.intervals | paired.intervals
        verdicts = set()
        for group in accuracy_limits:
            judged = judge(scores, intervals, group, enforced=False)
            verdicts |= {verdict["verdict"] for verdict in judged}
        if verdicts and INCONCLUSIVE not in verdicts:
            break

    unasked = {
        f"items_left/{task}": len(rows) - asked[task]
        for task, rows in rows_by_task.items()
        if asked[task] < len(rows)
    }
    return TaskResult(rest.scores | unasked, items, dict(chance), {}), level
