r"""Student against teacher on the same items: every comparison is paired.

Per item, teacher right/wrong x student right/wrong gives four counts; b = only the teacher right, c = only the student.

- kept = (acc - chance) / (acc_teacher - chance): accuracy kept above chance.
- flips = (b + c) / n: share of items whose correctness changed, also when accuracy did not (Dutta et al. 2024, arXiv 2407.09141).
- Exact McNemar test (McNemar 1947): under equal accuracy b ~ Binomial(b + c, 1/2); two-sided p = min(1, 2 P(X <= min(b, c))).
- Paired bootstrap (Efron & Tibshirani 1993, ch. 13, percentile interval): items are drawn with replacement, teacher and student together.
  kept depends on the four counts only, so a resample is one multinomial draw of the counts: the same distribution, without touching
  items. Draws in which the teacher is not above chance have no kept and are left out.
- Wilson score interval (Wilson 1927), lower end: a task on which it is not above chance leaves `kept` and is named.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Items = Sequence[Mapping[str, Any]]
Right = NDArray[np.bool_]  # (N,): whether each item was answered rightly


class Paired(NamedTuple):
    """`scores`: kept/<task>, flips/<task>, mcnemar_p/<task>, kept (mean over tasks). `intervals`: 95%, for kept/<task> and kept.
    `excluded`: tasks on which the teacher is not surely above chance."""

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    excluded: list[str]


def kept(acc: float, acc_teacher: float, chance: float) -> float:
    """Accuracy kept above chance; 1 = the teacher's, 0 = guessing. ValueError when the teacher itself is not above chance."""
    if acc_teacher <= chance:
        raise ValueError(f"the teacher's accuracy {acc_teacher:.3f} is not above chance {chance:.3f}: there is nothing to keep; leave the task out")
    return (acc - chance) / (acc_teacher - chance)


def mcnemar_p(student: Right, teacher: Right) -> float:
    """Exact two-sided McNemar p-value of equal accuracy on the same items (N,)."""
    b, c = int(np.sum(teacher & ~student)), int(np.sum(student & ~teacher))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))  # integers until the division: exact for any n


def wilson_lower(right: int, n: int) -> float:
    """Lower end of the 95% Wilson interval of a share: `right` of `n`, at least 1."""
    return float(binomtest(right, n).proportion_ci(0.95, "wilson").low)


def bootstrap_kept(student: Right, teacher: Right, chance: float, seed: int = 0, resamples: int = 2000) -> NDArray[np.float64]:
    """`kept` in each paired resample of the items (N,) -> (resamples,); NaN where the teacher is not above chance."""
    n = len(teacher)
    cells = np.bincount(2 * teacher.astype(int) + student.astype(int), minlength=4)  # neither, student, teacher, both
    counts = np.random.default_rng(seed).multinomial(n, cells / n, size=resamples)
    acc, acc_teacher = (counts[:, 1] + counts[:, 3]) / n, (counts[:, 2] + counts[:, 3]) / n
    above = np.where(acc_teacher > chance, acc_teacher - chance, np.nan)
    return (acc - chance) / above


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """95% percentile interval of bootstrap draws, NaN left out."""
    low, high = np.nanquantile(draws, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return float(low), float(high)


def paired_scores(student_items: Items, teacher_items: Items, chance_by_task: Mapping[str, float]) -> Paired:
    """Compare per-item results (dicts with task, doc_id, correct). ValueError unless both hold exactly the same items."""
    student, teacher = _by_task(student_items), _by_task(teacher_items)
    if student.keys() != teacher.keys():
        raise ValueError(f"student was scored on {sorted(student)}, teacher on {sorted(teacher)}; score both with the same eval settings")
    result, draws, values = Paired({}, {}, []), [], []
    for index, (task, docs) in enumerate(teacher.items()):
        if odd := sorted(docs.keys() ^ student[task].keys()):
            got = f"{len(odd)} items were scored for one model only (first: doc_id {odd[0]})"
            raise ValueError(f"task {task}: {got}; use the same eval settings and limit")
        t, s = np.array(list(docs.values())), np.array([student[task][doc] for doc in docs])
        result.scores[f"flips/{task}"], result.scores[f"mcnemar_p/{task}"] = float(np.mean(s != t)), mcnemar_p(s, t)
        if wilson_lower(int(t.sum()), len(t)) <= chance_by_task[task]:
            result.excluded.append(task)
            continue
        values.append(kept(float(s.mean()), float(t.mean()), chance_by_task[task]))
        draws.append(bootstrap_kept(s, t, chance_by_task[task], seed=index))
        result.scores[f"kept/{task}"], result.intervals[f"kept/{task}"] = values[-1], interval(draws[-1])
    if values:  # tasks are independent samples: draw i of the mean is the mean of the tasks' draws i
        result.scores["kept"], result.intervals["kept"] = float(np.mean(values)), interval(np.mean(draws, axis=0))
    return result


def _by_task(items: Items) -> dict[str, dict[int, bool]]:
    table: dict[str, dict[int, bool]] = {}
    for item in (item for item in items if "correct" in item):
        docs = table.setdefault(item["task"], {})
        if item["doc_id"] in docs:
            raise ValueError(f"task {item['task']}: item {item['doc_id']} appears twice; score the model again")
        docs[item["doc_id"]] = bool(item["correct"])
    return table
