"""Commit-sized record of a run: `python scripts/make_results.py runs/demo/<time> results/demo` copies run.json and every record.json,
writes the table as Markdown, and puts the same table between the README's markers. Weights, items and paths of this machine stay behind.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from compress.report.records import load_run
from compress.report.table import markdown_table, verdict_lines

README = Path(__file__).resolve().parents[1] / "README.md"


def main(run_dir: str, out: str) -> None:
    """Write `out`/run.json, `out`/records.jsonl, `out`/table.md and the README's table."""
    run, folder = load_run(run_dir), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run.info, indent=1, sort_keys=True) + "\n")
    (folder / "records.jsonl").write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in run.records))
    table = "\n".join([markdown_table(run.records), "", *[f"- {line}" for line in verdict_lines(run.records)]])
    (folder / "table.md").write_text(table + "\n")
    text = README.read_text()
    pattern = re.compile(r"(<!-- table: made by scripts/make_results.py -->\n).*?(<!-- end of table -->)", re.DOTALL)
    assert pattern.search(text), "the README has lost the markers of its table"
    README.write_text(pattern.sub(lambda match: match[1] + table + "\n" + match[2], text))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/make_results.py RUN_DIRECTORY OUT_DIRECTORY")
    main(sys.argv[1], sys.argv[2])
