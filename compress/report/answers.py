"""What models said when they were asked, as people read it: figures in a sentence, answers side by
side, the worst first.

An answer is whatever a model wrote: markup, control characters, 64 times one letter. The page shows
it whole, escaped by its template. A terminal and a model card get it on one line, without what does
not print, cut to SHOWN characters; the card besides with everything escaped that Markdown or HTML
would act on.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.records import Record, Run
from compress.score.open import TEACHER_RIGHT, worst_first

SHOWN = 300  # characters of an answer on one line
Row = Mapping[str, Any]  # of open.jsonl: {id, kind, prompt, answer, ended, loops, right}
Pair = tuple[Row, Row]  # what the reference says and what the candidate says, to one prompt
ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def asked(run: Run) -> list[Pair]:
    """The teacher's answers beside those of what the budget judges, the worst first; empty where
    they were not kept."""
    if run.teacher is None or run.teacher is run.final:
        return []
    return in_pairs(run.rows(run.teacher, "open"), run.rows(run.final, "open"))


def in_pairs(teacher: Sequence[Row], student: Sequence[Row]) -> list[Pair]:
    """Answers to the same prompts, in the order of `score.open.worst_first`."""
    teacher_rows = {row["id"]: row for row in teacher}
    student_rows = {row["id"]: row for row in student}
    ids = [row["id"] for row in worst_first(student, teacher)]
    return [(teacher_rows[id], student_rows[id]) for id in ids]


def lost(first: Sequence[Row], other: Sequence[Row]) -> list[Pair]:
    """What the first of two candidates gets right and the other does not, loops first."""
    return [pair for pair in in_pairs(first, other) if pair[0]["right"] and not pair[1]["right"]]


def figures(record: Record) -> str:
    """A record's open answers beside its teacher's, in a sentence; empty where none are."""
    scores, intervals = record["scores"], record.get("intervals", {})
    if "n/open_kept" not in scores:
        return ""
    questions, teacher_right = round(scores["n/open"]), round(scores["n/open_kept"])

    # A share of few has no meaning.
    if "open/kept" not in scores:
        kept = f"fewer than {TEACHER_RIGHT} are too few to say what share of them it keeps"
    else:
        low, high = intervals.get("open/kept", [scores["open/kept"]] * 2)
        share = f"{scores['open/kept']:.1%} (95% interval {low:.1%} to {high:.1%})"
        kept = f"of the {teacher_right:,} it keeps {share}"

    student_right = round(questions * scores["open/right"])
    loops = scores["open/loops"]
    teacher_loops = abs(loops - scores["open/loops_gained"])
    return (
        f"Asked {questions:,} questions, the teacher answers {teacher_right:,} rightly, the student"
        f" {student_right:,}; {kept}; {loops:.1%} of its answers repeat themselves (the teacher's"
        f" {teacher_loops:.1%})."
    )


def plainly(run: Run) -> str:
    """Which models have no chat template, in a sentence; empty where all have one."""
    sides = [record for record in (run.teacher, run.final) if record]
    plain = ", ".join(record["slot"] for record in sides if record.get("open_form") == "plain")
    return f"Without a chat template, and so asked in plain text: {plain}." if plain else ""


def marks(row: Row) -> list[tuple[str, str]]:
    """What there is to say of an answer, each with the verdict whose colour it has."""
    words = [("right", "PASS") if row["right"] else ("wrong", "FAIL")]
    if row["loops"]:
        words.append(("loops", "FAIL"))
    if not row["ended"]:
        words.append(("not ended", "INCONCLUSIVE"))
    return words


def one_line(text: str) -> str:
    """A text without line breaks and what does not print, cut to SHOWN characters."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text)
    printable = " ".join(kept.split())
    return f"{printable[:SHOWN]} ..." if len(printable) > SHOWN else printable or "(nothing)"


def printed(pair: Pair) -> str:
    """A prompt and both answers for a terminal."""
    teacher, student = pair
    return "\n".join([
        f"{one_line(teacher['id'])}: {one_line(teacher['prompt'])}",
        f"    teacher, {_words(teacher)}: {one_line(teacher['answer'])}",
        f"    student, {_words(student)}: {one_line(student['answer'])}",
    ])  # fmt: skip


def quoted(pair: Pair) -> str:
    """A prompt and both answers as a Markdown quotation, in which nothing of theirs is markup."""
    teacher, student = pair
    return "\n".join([
        f"> {literal(teacher['id'])}: **{literal(teacher['prompt'])}**",
        ">",
        f"> - teacher, {_words(teacher)}: {literal(teacher['answer'])}",
        f"> - student, {_words(student)}: {literal(student['answer'])}",
    ])  # fmt: skip


def literal(text: str) -> str:
    """A text on one line, as Markdown that renders as the text itself."""
    return re.sub(r"([\\`*_~|$\[\]])", r"\\\1", one_line(text)).translate(ENTITIES)


def _words(row: Row) -> str:
    return ", ".join(word for word, _ in marks(row))
