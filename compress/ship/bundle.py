"""The bundle: what a deployment team receives, and can check without trusting us.

hf/                  the checkpoint as a plain Hugging Face directory
model-TYPE.gguf, compressed_tensors/
                     the same weights as the recipe's `export.files` says (formats/__init__.py)
README.md            model card: score table, verdicts, what it says, lineage, licences
manifest.json        files, lineage, limits, scores and evaluation settings; all that `accept` needs
requests.jsonl       every scored item as it was put to the teacher (context, choices, gold) and
                     what it answered (logliks), so that accuracy kept can be measured again without
                     any task's code
answers.jsonl        what the judged file answered to these (where it could stop early, to those it
                     was asked), so that `compress compare` can name what got better or worse
open_prompts.jsonl   the open prompts with their checks, as `eval.open_prompts` takes them
                     (score/open.py); not there when nothing was asked
open_answers.jsonl   what teacher and judged file said to them, {"id", "teacher": {answer, ended,
                     loops, right}, "student": {...}}, so that `accept` needs no teacher for
                     open/kept
terms/               the terms that the teacher came under, where it brought any
SHA256SUMS           sha256 of every other file, in the format of `sha256sum -c`
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress import formats
from compress.report import answers
from compress.report.records import Record, Run, folder_of
from compress.report.table import markdown_table, verdict_lines
from compress.score.open import Answers
from compress.score.prompts import Prompt, as_row
from compress.ship.sums import SUMS
from compress.store import STAGE_JSON, commit, file_table, write_json
from compress.teacher import TERMS

# Of a record; the last one where it was asked.
LINEAGE = ("slot", "technique", "parent", "digest", "key", "stage_config", "metrics", "open_form")
# Answers in the model card.
WORST = 5
GOOD = 3


def write_bundle(
    final: Path, run: Run, checkpoint: Path, files: list[Any], teacher: Any, *,
    passed: bool, prompts: Sequence[Prompt],
) -> Path:  # fmt: skip
    """Write the bundle of a finished run beside `final` and rename it into place. Returns `final`.

    `checkpoint`: the shipped slot's; `files`: what was exported of it, as measured; `teacher`: the
    recipe's, as opened; `prompts`: the open prompts that the run put.
    """
    part = final.with_name(".bundle.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(checkpoint, part / "hf", ignore=shutil.ignore_patterns(STAGE_JSON))
    for shipped in files:
        copy = shutil.copytree if shipped.model.path.is_dir() else shutil.copyfile
        copy(shipped.model.path, part / shipped.model.path.name)

    # The terms that the teacher, and so its student, is under.
    if (teacher.path / TERMS).is_dir():
        shutil.copytree(teacher.path / TERMS, part / TERMS)

    # What was asked, and what teacher and judged file answered.
    reference = next(record for record in run.records if record["slot"] == "teacher")
    judged = files[0].record if files else run.final
    shutil.copyfile(folder_of(run.path, reference) / "items.jsonl", part / "requests.jsonl")
    shutil.copyfile(folder_of(run.path, judged) / "items.jsonl", part / "answers.jsonl")
    _write_open(part, prompts, run.rows(reference, "open"), run.rows(judged, "open"))

    # The manifest names the files so far; the sums name it and the card besides.
    manifest = {
        "schema": 1,
        "run": run.info["name"],
        "budget": "PASS" if passed else "FAIL",
        "teacher": _origin(run, teacher),
        "config": run.info["config"],
        "judged": files[0].model.path.name if files else "hf",
        **{key: judged[key] for key in ("scores", "intervals", "rows", "verdicts")},
        **{key: run.info[key] for key in ("machine", "versions", "git_sha", "digests")},
        "lineage": [_ancestor(record) for record in run.records],
        "files": file_table(part),
    }
    write_json(part / "manifest.json", manifest)
    card = model_card(run, manifest, passed=passed)
    (part / "README.md").write_text(card, encoding="utf-8", errors="replace")
    table = file_table(part)
    sums = [f"{entry['sha256']}  {name}\n" for name, entry in sorted(table.items())]
    (part / SUMS).write_text("".join(sums))

    shutil.rmtree(final, ignore_errors=True)
    commit(part, final)
    return final


def _origin(run: Run, teacher: Any) -> dict[str, Any]:
    """Where the teacher is from: what the recipe calls it, its digest, and of an imported one its
    file and licence.
    """
    file = teacher.path / "source.json"
    source = json.loads(file.read_text()) if file.is_file() else {}
    return {"source": run.info["config"]["teacher"]["source"], "digest": teacher.digest} | source


def _ancestor(record: Record) -> dict[str, Any]:
    """Of a slot's record, what the manifest keeps."""
    return {key: record[key] for key in LINEAGE if key in record}


def _write_open(
    folder: Path, prompts: Sequence[Prompt], teacher: Answers, student: Answers
) -> None:
    """The prompts that both answered and what they said, below `folder`; no file without any."""
    teacher_rows = {row["id"]: row for row in teacher}
    student_rows = {row["id"]: row for row in student}
    asked = [p for p in prompts if p.id in teacher_rows and p.id in student_rows]
    if not asked:
        return

    answered = [
        {
            "id": prompt.id,
            "teacher": _answer(teacher_rows[prompt.id]),
            "student": _answer(student_rows[prompt.id]),
        }
        for prompt in asked
    ]
    _write_lines(folder / "open_prompts.jsonl", map(as_row, asked))
    _write_lines(folder / "open_answers.jsonl", answered)


def _write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as JSON, one a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of an answer, what a bundle keeps."""
    return {key: row[key] for key in ("form", "answer", "ended", "loops", "right")}


def _what_it_says(run: Run) -> list[str]:
    """The model card's section on open answers, empty where nothing was asked."""
    figures = answers.figures(run.final)
    if not figures:
        return []
    pairs = answers.asked(run)

    # Good ones are spread over their ids, and so of several kinds.
    good = []
    for pair in pairs[WORST:]:
        student = pair[1]
        if student["right"] and student["ended"] and not student["loops"]:
            good.append(pair)
    spread = good[:: max(1, len(good) // GOOD)][:GOOD]

    lines = ["## What it says", "", figures, answers.plainly(run), ""]
    for title, shown in (("The worst answers:", pairs[:WORST]), ("Good ones:", spread)):
        if shown:
            lines += [title, "", *(f"{answers.quoted(pair)}\n" for pair in shown)]
    return lines


def model_card(run: Run, manifest: dict[str, Any], *, passed: bool) -> str:
    """The bundle's README: what it is, what it costs, where it comes from."""
    origin, config = manifest["teacher"], run.info["config"]
    files = []
    for format, type, _ in map(formats.parse, config["export"]["files"]):
        file = format.file.format(type=type)
        files.append(f"- `{file}`: {format.about.format(file=file)}")
    terms = f", which are in `{TERMS}/`" if _has_terms(manifest) else ""
    lineage = [
        f"{number}. `{slot['slot']}` ({slot['technique']}) from `{slot['parent'] or 'nothing'}`,"
        f" weights sha256 `{slot['digest'][:16]}`"
        for number, slot in enumerate(manifest["lineage"], 1)
    ]

    lines = [
        f"# {run.info['recipe']}: a student of {origin['source']}",
        "",
        "" if passed else "**This bundle violates its budget; see the verdicts below.**\n",
        (
            f"Made by `compress run {run.info['recipe']}` ({run.info['name']})."
            f" `{manifest['judged']}` is the file that was judged."
        ),
        "",
        "## Files",
        "",
        "- `hf/`: the checkpoint for transformers and further training, unpacked",
        *files,
        "",
        "## Scores",
        "",
        markdown_table(run.records),
        "",
        "## Verdicts",
        "",
        *[f"- {line}" for line in verdict_lines(run.records)],
        "",
        *_what_it_says(run),
        "## Lineage",
        "",
        *lineage,
        "",
        "## Licences",
        "",
        (
            f"- Teacher: {origin.get('licence', 'unknown; ask its publisher')}. The student is a"
            " derived work and stays under those terms"
            f"{terms}."
        ),
        *[
            f"- Training text: {name}"
            for name in [*config["data"]["train"], *config["data"]["chat"]]
        ],
        "",
        "## Check it",
        "",
        "```",
        f"sha256sum -c {SUMS}",
        "compress verify .",
        "compress accept .   # measures the budget again on this machine",
        "```",
        "",
    ]
    return "\n".join(lines)


def _has_terms(manifest: dict[str, Any]) -> bool:
    """Whether the teacher's terms are in the bundle."""
    return any(name.startswith(f"{TERMS}/") for name in manifest["files"])
