"""The bundle: what a deployment team receives, and can check without trusting us.

hf/  the checkpoint as a plain Hugging Face directory
model-TYPE.gguf, compressed_tensors/  the same weights as the recipe's `export.files` says
        (formats/__init__.py)
README.md         model card: score table, verdicts, what it says, lineage, licences
manifest.json     files, lineage, limits, scores and evaluation settings; all that `accept` needs
requests.jsonl    every scored item as it was put to the teacher (context, choices, gold) and what
                  it answered (logliks), so that accuracy kept can be measured again without any
                  task's code
answers.jsonl     what the judged file answered to these (where it could stop early, to those it was
                  asked), so that `compress compare` can name what got better or worse
open_prompts.jsonl   the open prompts with their checks, as `eval.open_prompts` takes them
                     (score/open.py); not there when nothing was asked
open_answers.jsonl   what teacher and judged file said to them, {"id", "teacher": {answer, ended,
                     loops, right}, "student": {...}}, so that `accept` needs no teacher for
                     open/kept
SHA256SUMS        sha256 of every other file, in the format of `sha256sum -c`
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from compress import formats
from compress.models.checkpoint import sha256_file
from compress.report import answers
from compress.report.records import Run, folder_of
from compress.report.table import markdown_table, verdict_lines
from compress.score.open import Answers
from compress.score.prompts import Prompt, as_row
from compress.ship.manifest import read_manifest
from compress.store import STAGE_JSON, commit, file_table, write_json

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)", re.DOTALL)
SUMS_BYTES = 10_000_000  # a line is some hundred
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
        (shutil.copytree if shipped.model.path.is_dir() else shutil.copyfile)(
            shipped.model.path, part / shipped.model.path.name
        )
    source = (
        json.loads((teacher.path / "source.json").read_text())
        if (teacher.path / "source.json").is_file()
        else {}
    )
    origin = {"source": run.info["config"]["teacher"]["source"], "digest": teacher.digest} | source
    first = next(r for r in run.records if r["slot"] == "teacher")
    judged = files[0].record if files else run.final
    for record, name in ((first, "requests.jsonl"), (judged, "answers.jsonl")):
        shutil.copyfile(folder_of(run.path, record) / "items.jsonl", part / name)
    _write_open(part, prompts, *(run.rows(record, "open") for record in (first, judged)))
    manifest = {
        "schema": 1,
        "run": run.info["name"],
        "budget": "PASS" if passed else "FAIL",
        "teacher": origin,
        "config": run.info["config"],
        "judged": files[0].model.path.name if files else "hf",
        **{key: judged[key] for key in ("scores", "intervals", "rows", "verdicts")},
        "machine": run.info["machine"],
        "versions": run.info["versions"],
        "git_sha": run.info["git_sha"],
        "digests": run.info["digests"],
        "lineage": [{k: r[k] for k in LINEAGE if k in r} for r in run.records],
        "files": file_table(part),
    }
    write_json(part / "manifest.json", manifest)
    card = model_card(run, manifest, passed=passed)
    (part / "README.md").write_text(card, encoding="utf-8", errors="replace")
    table = file_table(part)
    (part / SUMS).write_text(
        "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(table.items()))
    )
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
        *[
            f"- `{(file := format.file.format(type=type))}`: {format.about.format(file=file)}"
            for format, type, _ in map(formats.parse, run.info["config"]["export"]["files"])
        ],
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
        *[
            f"{i}. `{e['slot']}` ({e['technique']}) from `{e['parent'] or 'nothing'}`, weights"
            f" sha256 `{e['digest'][:16]}`"
            for i, e in enumerate(manifest["lineage"], 1)
        ],
        "",
        "## Licences",
        "",
        (
            f"- Teacher: {origin.get('licence', 'unknown; ask its publisher')}. The student is a"
            " derived work and stays under those terms."
        ),
        *[
            f"- Training text: {name}"
            for name in [*run.info["config"]["data"]["train"], *run.info["config"]["data"]["chat"]]
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


def sums_digest(bundle: Path) -> str:
    """sha256 of SHA256SUMS, which stands for all of the bundle's bytes: to compare over another
    channel.
    """
    return sha256_file(bundle / SUMS)


def read_sums(bundle: Path) -> dict[str, str]:
    """Name -> sha256 as SHA256SUMS says. ValueError for a line that `sha256sum -c` would read
    otherwise, or not at all.
    """
    sums = bundle / SUMS
    if not stat.S_ISREG(sums.lstat().st_mode if os.path.lexists(sums) else 0):
        raise ValueError(
            f"{bundle} is no bundle: {SUMS} is missing or no plain file; give the folder bundle/ of"
            " a run"
        )
    if sums.stat().st_size > SUMS_BYTES:
        raise ValueError(
            f"{sums} has {sums.stat().st_size:,} bytes, at most {SUMS_BYTES:,} are read; copy the"
            " bundle again from its source"
        )
    *lines, rest = sums.read_bytes().split(b"\n")
    expected: dict[str, str] = {}
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        match = LINE.fullmatch(line.decode("utf-8", "surrogateescape"))
        name = match[2] if match else ""
        whole = match and number <= len(lines) and name.isprintable() and "\\" not in name
        if (
            not whole
            or str(PurePosixPath(name)) != name
            or PurePosixPath(name).is_absolute()
            or ".." in PurePosixPath(name).parts
        ):
            shown = line.decode("utf-8", "replace")[:200]
            raise ValueError(
                f"{sums}, line {number} is not 'sha256  relative/name' and a line feed: {shown!r};"
                " the bundle was damaged or made to mislead"
            )
        if name in expected or name == SUMS:
            raise ValueError(
                f"{sums}, line {number} names {name!r} again; the bundle was damaged or made to"
                " mislead"
            )
        expected[name] = line[:64].decode()
    return expected


def _strangers(bundle: Path) -> tuple[dict[str, Path], list[str]]:
    """The bundle's plain files by name, and a sentence on everything else in it."""
    files: dict[str, Path] = {}
    bad: list[str] = []
    waiting = [bundle]
    while waiting:
        folder = waiting.pop()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        if not entries and folder != bundle:
            bad.append(f"{folder.relative_to(bundle)} is an empty folder, which no bundle has")
        for entry in entries:
            name = str(Path(entry.path).relative_to(bundle))
            if entry.is_symlink():
                bad.append(f"{name} is a symbolic link")
            elif entry.is_dir():
                waiting.append(Path(entry.path))
            elif entry.is_file():
                files[name] = Path(entry.path)
            else:
                bad.append(f"{name} is no plain file")
    return files, bad


def verify_bundle(bundle: Path, sha256: str | None = None) -> dict[str, Any]:
    """Compare every byte with SHA256SUMS, and the manifest with the files and with itself. Returns
    the manifest.

    `sha256`: of SHA256SUMS, as its sender said. ValueError naming every file that differs, lacks or
    does not belong, or the key of the manifest.
    """
    expected = read_sums(bundle)
    if sha256 is not None and (got := sums_digest(bundle)) != sha256.lower():
        raise ValueError(
            f"{bundle / SUMS} has the sha256 {got}, not {sha256.lower()}: it is not the bundle that"
            " was meant; ask its sender"
        )
    files, bad = _strangers(bundle)
    files.pop(SUMS, None)
    linked = {sentence.partition(" is ")[0] for sentence in bad}
    bad += [f"{name} is missing" for name in sorted(expected.keys() - files.keys() - linked)]
    bad += [f"{name} is not in {SUMS}" for name in sorted(files.keys() - expected.keys())]
    bad += [
        f"{name} was changed"
        for name in sorted(expected.keys() & files.keys())
        if sha256_file(files[name]) != expected[name]
    ]
    if bad:
        raise ValueError(
            f"{bundle} does not verify: {'; '.join(sorted(bad))}. Copy the bundle again from its"
            " source"
        )
    if "manifest.json" not in expected:
        raise ValueError(f"{bundle} has no manifest.json; copy the bundle again from its source")
    return read_manifest(bundle, expected)
