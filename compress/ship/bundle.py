"""The bundle: what a deployment team receives, and can check without trusting us.

hf/                  the checkpoint as a plain Hugging Face directory
model-TYPE.gguf, compressed_tensors/
                     the same weights as the recipe's `export.files` says (formats/__init__.py)
README.md            model card: scores, verdicts, what it says, lineage, licences, lines to copy
bom.json             what it is made of, for a reader of bills of materials (ship/bom.py); where
                     cyclonedx-python-lib is installed
Containerfile, compose.yaml
                     `compress serve` of this bundle as a container (ship/container.py); of a GGUF
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
model.sig            a signature of all of them, where `compress sign` was run (ship/signature.py)
"""

import importlib.util
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.doors import read_json
from compress.report.records import Record, Run, folder_of
from compress.score.open import Answers
from compress.score.prompts import Prompt, as_row
from compress.ship.bom import BOM, bom_json
from compress.ship.card import model_card
from compress.ship.container import COMPOSE, CONTAINERFILE, compose, containerfile
from compress.ship.licences import as_record, licence_of, own_words
from compress.ship.manifest import SCHEMA
from compress.ship.sums import SUMS
from compress.store import STAGE_JSON, commit, file_table, sha256_file, write_json
from compress.teacher import TERMS

# Of a record; the last one where it was asked.
LINEAGE = ("slot", "technique", "parent", "digest", "key", "stage_config", "metrics", "open_form")


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
    _copy_models(part, checkpoint, files, teacher)
    origin = _origin(run, teacher)
    terms = sorted(file.name for file in (part / TERMS).glob("*"))

    judged = files[0].record if files else run.final
    _copy_evidence(part, run, judged, prompts)

    # How it is served, and what it is made of.
    judged_file = files[0].model.path.name if files else "hf"
    if judged_file.endswith(".gguf"):
        (part / CONTAINERFILE).write_text(containerfile())
        (part / COMPOSE).write_text(compose())

    # The manifest names the files so far; the sums name it and the card besides.
    manifest = {
        "schema": SCHEMA,
        "run": run.info["name"],
        "budget": "PASS" if passed else "FAIL",
        "teacher": origin,
        "licence": as_record(licence_of(origin, terms)),
        "config": run.info["config"],
        "judged": judged_file,
        **{key: judged[key] for key in ("scores", "intervals", "rows", "verdicts")},
        **{key: run.info[key] for key in ("machine", "versions", "git_sha", "digests")},
        "lineage": [_ancestor(record) for record in run.records],
        "files": file_table(part),
    }
    if _write_bom(part, manifest, run.info.get("started")):
        content = {"sha256": sha256_file(part / BOM), "bytes": (part / BOM).stat().st_size}
        manifest["files"] |= {BOM: content}
    write_json(part / "manifest.json", manifest)
    card = model_card(run, manifest, passed=passed)
    (part / "README.md").write_text(card, encoding="utf-8", errors="replace")
    table = file_table(part)
    sums = [f"{entry['sha256']}  {name}\n" for name, entry in sorted(table.items())]
    (part / SUMS).write_text("".join(sums))

    shutil.rmtree(final, ignore_errors=True)
    commit(part, final)
    return final


def _copy_evidence(part: Path, run: Run, judged: Record, prompts: Sequence[Prompt]) -> None:
    """What was asked, and what teacher and judged file answered."""
    reference = next(record for record in run.records if record["slot"] == "teacher")
    shutil.copyfile(folder_of(run.path, reference) / "items.jsonl", part / "requests.jsonl")
    shutil.copyfile(folder_of(run.path, judged) / "items.jsonl", part / "answers.jsonl")
    _write_open(part, prompts, run.rows(reference, "open"), run.rows(judged, "open"))


def _copy_models(part: Path, checkpoint: Path, files: list[Any], teacher: Any) -> None:
    """Checkpoint, exported files and the teacher's terms into the folder `part`."""
    shutil.copytree(checkpoint, part / "hf", ignore=shutil.ignore_patterns(STAGE_JSON))
    for shipped in files:
        copy = shutil.copytree if shipped.model.path.is_dir() else shutil.copyfile
        copy(shipped.model.path, part / shipped.model.path.name)

    # The terms that the teacher, and so its student, is under.
    if (teacher.path / TERMS).is_dir():
        shutil.copytree(teacher.path / TERMS, part / TERMS)


def _write_bom(part: Path, manifest: Mapping[str, Any], made: Any) -> bool:
    """Write bom.json where cyclonedx-python-lib is installed; whether it is."""
    if importlib.util.find_spec("cyclonedx") is None:
        return False
    family = str(read_json(part / "hf" / "config.json").get("model_type", "unknown"))
    began = made if isinstance(made, str) else None
    (part / BOM).write_text(bom_json(manifest, family, began), encoding="utf-8", errors="replace")
    return True


def _origin(run: Run, teacher: Any) -> dict[str, Any]:
    """Where the teacher is from: what the recipe calls it, its digest, of an imported one its file,
    and licence and languages as its file or its own model card says.
    """
    file = teacher.path / "source.json"
    source = json.loads(file.read_text()) if file.is_file() else {}
    called = {"source": run.info["config"]["teacher"]["source"], "digest": teacher.digest}
    return own_words(teacher.path, getattr(teacher, "gguf", None)) | called | source


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
