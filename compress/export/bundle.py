"""The bundle: what a deployment team receives, and can check without trusting us.

hf/               the checkpoint as a plain Hugging Face directory
model-TYPE.gguf, compressed_tensors/   the same weights as the recipe's `export.files` says (export/formats.py)
README.md         model card: score table, verdicts, what it says, lineage, licences
manifest.json     files, lineage, limits, scores and evaluation settings; all that `accept` needs
requests.jsonl    every scored item as it was put to the teacher (context, choices, gold) and what it answered (logliks), so that accuracy
                  kept can be measured again without any task's code
answers.jsonl     what the judged file answered to these (where it could stop early, to those it was asked), so that `compress compare` can
                  name what got better or worse
open_prompts.jsonl   the open prompts with their checks, as `eval.open_prompts` takes them
                  (score/open.py); not there when nothing was asked
open_answers.jsonl   what teacher and judged file said to them, {"id", "teacher": {answer, ended,
                  loops, right}, "student": {...}}, so that `accept` needs no teacher for open/kept
SHA256SUMS        sha256 of every other file, in the format of `sha256sum -c`
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from compress.checkpoint import sha256_file
from compress.export import formats
from compress.report import answers
from compress.report.records import Run, folder_of
from compress.report.table import markdown_table, verdict_lines
from compress.score.open import Answers, Prompt, as_row
from compress.store import STAGE_JSON, commit, file_table, write_json

SUMS = "SHA256SUMS"
LINE = re.compile(r"^([0-9a-f]{64}) [ *](.+)$")
# Of a record; the last one where it was asked.
LINEAGE = ("slot", "technique", "parent", "digest", "key", "stage_config", "metrics", "open_form")
WORST, GOOD = 5, 3  # answers in the model card


def write_bundle(
    final: Path, run: Run, checkpoint: Path, files: list[Any], teacher: Any, *,
    passed: bool, prompts: Sequence[Prompt],
) -> Path:  # fmt: skip
    """Write the bundle of a finished run beside `final` and rename it into place. Returns `final`.

    `prompts`: the open prompts that the run put.
    """
    part = final.with_name(".bundle.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(checkpoint, part / "hf", ignore=shutil.ignore_patterns(STAGE_JSON))
    for shipped in files:
        (shutil.copytree if shipped.model.path.is_dir() else shutil.copyfile)(shipped.model.path, part / shipped.model.path.name)
    source = json.loads((teacher.path / "source.json").read_text()) if (teacher.path / "source.json").is_file() else {}
    origin = {"source": run.info["config"]["teacher"]["source"], "digest": teacher.digest} | source
    first = next(r for r in run.records if r["slot"] == "teacher")
    judged = files[0].record if files else run.final
    for record, name in ((first, "requests.jsonl"), (judged, "answers.jsonl")):
        shutil.copyfile(folder_of(run.path, record) / "items.jsonl", part / name)
    _write_open(part, prompts, *(run.rows(record, "open") for record in (first, judged)))
    manifest = {
        "schema": 1, "run": run.info["name"], "budget": "PASS" if passed else "FAIL", "teacher": origin, "config": run.info["config"],
        "judged": files[0].model.path.name if files else "hf", **{key: judged[key] for key in ("scores", "intervals", "rows", "verdicts")},
        "machine": run.info["machine"], "versions": run.info["versions"], "git_sha": run.info["git_sha"],
        "digests": run.info["digests"],
        "lineage": [{k: r[k] for k in LINEAGE if k in r} for r in run.records],
        "files": file_table(part),
    }  # fmt: skip
    write_json(part / "manifest.json", manifest)
    card = model_card(run, manifest, passed=passed)
    (part / "README.md").write_text(card, encoding="utf-8", errors="replace")
    table = file_table(part)
    (part / SUMS).write_text("".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(table.items())))
    shutil.rmtree(final, ignore_errors=True)
    commit(part, final)
    return final


def _write_open(
    folder: Path, prompts: Sequence[Prompt], teacher: Answers, student: Answers
) -> None:
    """The prompts that both answered and what they said, below `folder`; no file without any."""
    its, mine = ({row["id"]: row for row in rows} for rows in (teacher, student))
    asked = [prompt for prompt in prompts if prompt.id in its and prompt.id in mine]
    if not asked:
        return
    said = [
        {"id": prompt.id, "teacher": _said(its[prompt.id]), "student": _said(mine[prompt.id])}
        for prompt in asked
    ]
    for name, lines in (("open_prompts.jsonl", map(as_row, asked)), ("open_answers.jsonl", said)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _said(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of an answer, what a bundle keeps."""
    return {key: row[key] for key in ("form", "answer", "ended", "loops", "right")}


def _what_it_says(run: Run) -> list[str]:
    """The model card's section on open answers, empty where nothing was asked."""
    told, pairs = answers.figures(run.final), answers.asked(run)
    if not told:
        return []
    rest = [(pair, pair[1]) for pair in pairs[WORST:]]
    good = [pair for pair, its in rest if its["right"] and its["ended"] and not its["loops"]]
    spread = good[:: max(1, len(good) // GOOD)][:GOOD]  # over their ids, and so of several kinds
    lines = ["## What it says", "", told, answers.plainly(run), ""]
    for title, some in (("The worst answers:", pairs[:WORST]), ("Good ones:", spread)):
        if some:
            lines += [title, "", *(f"{answers.quoted(pair)}\n" for pair in some)]
    return lines


def model_card(run: Run, manifest: dict[str, Any], *, passed: bool) -> str:
    """The bundle's README: what it is, what it costs, where it comes from."""
    origin = manifest["teacher"]
    lines = [
        f"# {run.info['recipe']}: a student of {origin['source']}", "",
        "" if passed else "**This bundle violates its budget; see the verdicts below.**\n",
        f"Made by `compress run {run.info['recipe']}` ({run.info['name']}). `{manifest['judged']}` is the file that was judged.", "",
        "## Files", "", "- `hf/`: the checkpoint for transformers and further training, unpacked",
        *[f"- `{(file := format.file.format(type=type))}`: {format.about.format(file=file)}"
          for format, type, _ in map(formats.parse, run.info["config"]["export"]["files"])], "",
        "## Scores", "", markdown_table(run.records), "", "## Verdicts", "",
        *[f"- {line}" for line in verdict_lines(run.records)], "",
        *_what_it_says(run), "## Lineage", "",
        *[f"{i}. `{e['slot']}` ({e['technique']}) from `{e['parent'] or 'nothing'}`, weights sha256 `{e['digest'][:16]}`"
          for i, e in enumerate(manifest["lineage"], 1)], "",
        "## Licences", "",
        f"- Teacher: {origin.get('licence', 'unknown; ask its publisher')}. The student is a derived work and stays under those terms.",
        *[f"- Training text: {name}" for name in [*run.info['config']['data']['train'], *run.info['config']['data']['chat']]], "",
        "## Check it", "", "```", f"sha256sum -c {SUMS}", "compress verify .",
        "compress accept .   # measures the budget again on this machine", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def verify_bundle(bundle: Path) -> dict[str, Any]:
    """Compare every byte with SHA256SUMS. Returns the manifest. ValueError naming every file that differs, lacks or does not belong."""
    sums = bundle / SUMS
    if not sums.is_file():
        raise ValueError(f"{bundle} is no bundle: {SUMS} is missing; give the folder bundle/ of a run")
    expected: dict[str, str] = {}
    for number, line in enumerate(sums.read_text().splitlines(), 1):
        match = LINE.match(line)
        if not match or PurePosixPath(match[2]).is_absolute() or ".." in PurePosixPath(match[2]).parts:
            raise ValueError(f"{sums}, line {number} is not 'sha256  relative/name': {line!r}; the bundle was damaged or made to mislead")
        expected[match[2]] = match[1]
    found = {str(p.relative_to(bundle)): p for p in bundle.rglob("*") if p.is_symlink() or p.is_file()}
    found.pop(SUMS)
    bad = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    bad += [f"{name} is not in {SUMS}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if found[name].is_symlink():
            bad.append(f"{name} is a symbolic link")
        elif sha256_file(found[name]) != expected[name]:
            bad.append(f"{name} was changed")
    if bad:
        raise ValueError(f"{bundle} does not verify: {'; '.join(bad)}. Copy the bundle again from its source")
    if "manifest.json" not in expected:
        raise ValueError(f"{bundle} has no manifest.json; copy the bundle again from its source")
    return dict(json.loads((bundle / "manifest.json").read_text()))
