"""The scores that a model has only beside another: closeness on held-out text, by name and over
all its rows, to its teacher and to its parent; accuracy, beside its teacher.

Open answers beside the teacher's: score/open.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from compress.score.intervals import Scores, paired_scores, ratio_interval
from compress.score.measured import Measured
from compress.score.tasks import drift


def closeness_scores(means: Mapping[str, Any], texts: Mapping[str, slice]) -> Scores:
    """kl_to_teacher and top1_agree of the held-out texts, each and together, with intervals over
    rows. `means`: of each row (S,), as `fidelity.closeness` gives them; `texts`: name -> its rows.
    """
    values_by_name: dict[str, list[float]] = {}
    for name, values_S in (("kl_to_teacher", means["kl_rows"]), ("top1_agree", means["top1_rows"])):
        values_by_name[name] = values_S
        for text, part in texts.items():
            values_by_name[f"{name}/{text}"] = values_S[part]

    return Scores(
        {name: math.fsum(values) / len(values) for name, values in values_by_name.items()},
        {name: ratio_interval(values) for name, values in values_by_name.items()},
        [],
        {name: [values] for name, values in values_by_name.items()},
    )


def kl_to_parent(closeness: Scores) -> Scores:
    """The KL of a comparison with a parent, by its own name."""
    names = [name for name in closeness.scores if name.startswith("kl_to_teacher")]
    new_names = {name: name.replace("kl_to_teacher", "kl_to_parent") for name in names}
    return Scores(
        {new_names[name]: closeness.scores[name] for name in names},
        {new_names[name]: closeness.intervals[name] for name in names},
        [],
        {new_names[name]: closeness.rows[name] for name in names},
    )


def items_beside(student: Measured, teacher: Measured, *, stop_early: bool) -> Scores:
    """Accuracy kept, points lost, flips and drifts of a student's items beside its teacher's.

    ValueError as `paired_scores`; with `stop_early` the student may lack items.
    """
    paired = paired_scores(
        student.items, teacher.items, teacher.chance, student.level, partial=stop_early
    )
    return paired._replace(scores=paired.scores | drift(student.scores, teacher.scores))
