"""Commit-sized record of a run: `python scripts/make_results.py runs/demo/<time> results/demo`
copies run.json and every record.json, writes the table as Markdown and both sides' open
answers, and puts the same table and three of the answers between the README's markers. Weights,
items and paths of this machine stay behind. The README's table has the columns that a first reader
asks for; results/demo/table.md has them all. Only the demo's record, in results/demo, is in the
README.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from compress.report.records import load_run
from compress.report.table import markdown_table, verdict_lines
from compress.score.open import worst_first

README = Path(__file__).resolve().parents[1] / "README.md"
COLUMNS = (
    "slot",
    "params (M)",
    "size (MB)",
    "KL to teacher",
    "open kept",
    "loops",
    "kept",
    "tok/s",
    "verdict",
)
SENTENCES = ("size_bytes", "open/kept", "open/loops_gained", "kept")  # limits told in the README
LONGEST_ANSWER = 160  # characters of an answer in the README
SHOWN_KINDS = ("facts", "lists", "arithmetic")  # a prompt of each is in the README


def main(run_dir: str, out: str) -> None:
    """Write `out`/run.json, `out`/records.jsonl, `out`/table.md, and the README's table."""
    run, folder = load_run(run_dir), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run.info, indent=1, sort_keys=True) + "\n")
    (folder / "records.jsonl").write_text(
        "".join(json.dumps(record, sort_keys=True) + "\n" for record in run.records)
    )
    table = "\n".join(
        [markdown_table(run.records), "", *[f"- {line}" for line in verdict_lines(run.records)]]
    )
    (folder / "table.md").write_text(table + "\n")
    said = (
        worst_first(run.rows(run.final, "open"), run.rows(run.teacher, "open"))
        if run.teacher
        else []
    )
    (folder / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    if folder.resolve() == README.parent / "results" / "demo":
        write_readme(run.records, said)


def write_readme(records: list[dict], said: list[dict]) -> None:
    """The README with the table of these records and some of their answers."""
    text = README.read_text()
    for name, content in (("table", table_block(records)), ("answers", answers_block(said))):
        pattern = re.compile(
            rf"(<!-- {name}: made by scripts/make_results.py -->\n).*?(<!-- end of {name} -->)",
            re.DOTALL,
        )
        found = pattern.search(text)
        assert found, f"the README has lost the markers of its {name}"
        text = text[: found.start()] + found[1] + content + "\n" + found[2] + text[found.end() :]
    README.write_text(text)


def table_block(records: list[dict]) -> str:
    """The run's table with the README's columns, and what the budget says of SENTENCES."""
    lines = [line.strip("| ").split(" | ") for line in markdown_table(records).splitlines()]
    places = [lines[0].index(name) for name in COLUMNS if name in lines[0]]
    rows = ["| " + " | ".join(line[place] for place in places) + " |" for line in lines]
    verdicts = [
        f"- {' '.join(line.split())}"
        for line in verdict_lines(records)
        if line.split(": ", 1)[1].split()[0] in SENTENCES
    ]
    return "\n".join([*rows, "", *verdicts])


def answers_block(said: list[dict]) -> str:
    """Both answers to a prompt of each of SHOWN_KINDS, as Markdown: the first of the reported half
    (even numbers) that the teacher answers rightly, whatever the student says.
    """
    lines = ["| asked | teacher | student |", "|---|---|---|"]
    for kind in SHOWN_KINDS:
        asked = [
            row
            for row in sorted(said, key=lambda row: row["id"])
            if row["kind"] == kind and row["teacher_right"] and int(row["id"][-3:]) % 2 == 0
        ]
        for row in asked[:1]:
            cells = [_short(row[side]) for side in ("prompt", "teacher", "student")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(text: str) -> str:
    """A cell of the table of answers, cut at LONGEST_ANSWER."""
    line = " ".join(text.split())
    if len(line) > LONGEST_ANSWER:
        line = line[:LONGEST_ANSWER].rpartition(" ")[0] + " …"
    return line.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/make_results.py RUN_DIRECTORY OUT_DIRECTORY")
    main(sys.argv[1], sys.argv[2])
