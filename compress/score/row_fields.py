"""What rows of lm-eval's own tasks hold on the hub, and whether a row is one of them."""

import json
import re
from collections.abc import Sequence
from typing import Any

CHOICES = "question choices answerKey"
TRUTHFUL = "question {}_targets"
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
Placed = Sequence[tuple[str, dict[str, Any]]]  # rows, each with its file and line


def check_rows(name: str, kind: str, rows: Placed) -> None:
    """ValueError for a row of the task `name` that its code can't take: of a `kind` in `FIELDS`
    what the hub's rows hold, of any other what the first row holds.
    """
    fields = FIELDS.get(kind, "").split()
    first = rows[0][1]
    needed = fields or list(first)
    for where, row in rows:
        missing = [field for field in needed if field not in row]
        if missing:
            raise ValueError(
                f"{where}: the field {missing[0]!r} is missing; task {name} needs"
                f" {', '.join(needed)}"
            )
        if fields:
            _check_values(kind, row, where)
            continue

        # Nothing is known of such a task's fields but that they stay of one type.
        odd = [field for field in needed if type(row[field]) is not type(first[field])]
        if odd:
            raise ValueError(
                f"{where}: the field {odd[0]!r} is a {type(row[odd[0]]).__name__}, a"
                f" {type(first[odd[0]]).__name__} above"
            )


def _check_values(name: str, row: dict[str, Any], where: str) -> None:
    """ValueError when a field of a row of a task in `FIELDS` is
    not what the task's own code takes.
    """
    count = {"boolq": 2, "piqa": 2, "winogrande": 3}.get(name, 0)  # winogrande counts from 1
    labels: list[Any] = []
    for field in FIELDS[name].split():
        value, needed = row[field], ""

        # Choices come before the answer that picks one of them.
        if field in ("choices", "endings") or field.endswith("_targets"):
            count, labels, needed = _choices(name, field, value)
        elif field == "label" or (field == "answer" and name in ("mmlu", "winogrande")):
            if not -1 <= _number(value, count) < count:  # "" and -1 where nobody tells
                needed = f"the number of a choice, below {count}"
        elif field == "answerKey" and value not in labels:
            needed = f"one of the labels {labels}"
        elif not isinstance(value, str):
            needed = "a text"

        if needed:
            raise ValueError(
                f"{where}: the field {field!r} is {json.dumps(value)[:100]}; task {name} needs"
                f" {needed}"
            )


def _number(value: Any, otherwise: int) -> int:
    """The number of a choice, -1 for an empty text, `otherwise` for anything else."""
    if isinstance(value, bool) or re.fullmatch("-?[0-9]{1,3}", str(value)):
        return int(value)
    return -1 if value == "" else otherwise


def _choices(name: str, field: str, value: Any) -> tuple[int, list[Any], str]:
    """Of a field with a row's choices: how many there are, their labels, and what is needed
    instead where they can't be taken.
    """
    # Texts alone; mmlu's are four.
    if name == "mmlu" or field == "endings":
        needed = "a list of texts"
        if not _are_texts(value):
            return 0, [], needed
        return len(value), [], needed if name == "mmlu" and len(value) != 4 else ""

    # Texts with a label each.
    keys = ("choices", "labels") if field.endswith("_targets") else ("text", "label")
    needed = f"{keys[0]} and {keys[1]}, lists as long as each other"
    texts, labels = (value.get(key) if isinstance(value, dict) else None for key in keys)
    if not isinstance(texts, list) or not _are_texts(texts) or not isinstance(labels, list):
        return 0, [], needed

    # Labels of targets say which choices are true: one at least.
    fits = len(labels) == len(texts)
    if field.endswith("_targets"):
        flags = set(map(str, labels))
        fits = fits and "1" in flags and flags <= {"0", "1"}
    return len(texts), labels, "" if fits else needed


def _are_texts(value: Any) -> bool:
    """Whether it is a list of texts, one at least."""
    return isinstance(value, list) and bool(value) and all(isinstance(t, str) for t in value)
