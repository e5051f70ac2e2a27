"""The README tells the truth: its tree is the package's, its verbs are the program's, its table is
the committed record's.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from compress.__main__ import VERBS
from compress.report.table import markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tree_names_every_file_of_the_package():
    tree = README[README.index("## The house") :]
    named, stack = set(), []
    for line in tree[tree.index("```\n") + 4 : tree.rindex("```")].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack = [*stack[:depth], name]
        named.add("/".join(part.strip("/") for part in stack))
    real = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "compress").rglob("*.py")
        if path.name != "__init__.py" or path.parent.name in ("stages", "track")
    }
    real |= {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} | {
        f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")
    }
    assert real <= named, f"the README's tree lacks {sorted(real - named)}"
    assert all((ROOT / name).exists() for name in named), [
        name for name in named if not (ROOT / name).exists()
    ]


def test_every_verb_is_in_the_readme():
    assert set(re.findall(r"`compress (\w+)", README)) >= set(VERBS)


def test_the_table_is_that_of_the_committed_record():
    records = [
        json.loads(line)
        for line in (ROOT / "results" / "demo" / "records.jsonl").read_text().splitlines()
    ]
    assert markdown_table(records) in README


def test_the_answers_are_those_of_the_committed_record():
    sys.path.insert(0, str(ROOT / "scripts"))
    from make_results import answers_block

    rows = [
        json.loads(line)
        for line in (ROOT / "results" / "demo" / "open.jsonl").read_text().splitlines()
    ]
    assert answers_block(rows) in README and answers_block(rows).count("\n") == 4


def test_no_file_of_the_package_is_long():
    lengths = {
        path: len(path.read_text().splitlines()) for path in (ROOT / "compress").rglob("*.py")
    }
    assert not [str(path) for path, length in lengths.items() if length > 400]
