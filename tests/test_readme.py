"""The README and docs/ tell the truth: the tree is the package's, verbs are the program's, the
table is the committed record's, commands compose, links lead somewhere.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from compress.__main__ import VERBS
from compress.launch import launch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "results").rglob("*.md"),
    )
}
RUNS = sorted(
    {
        shlex.join(shlex.split(line, comments=True)[2:])
        for text in PAGES.values()
        for line in re.findall(r"^(?:\| [^|]+\| `)?(compress run [^`|\n]+)", text, re.MULTILINE)
        if "RECIPE" not in line
    }
)


def records(name):
    lines = (ROOT / "results" / "demo" / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_readme_is_read_to_its_end():
    assert len(README.encode()) <= 9000


def test_the_tree_names_every_file_of_the_package():
    tree = PAGES["docs/house.md"].partition("## Every file")[2]
    named, stack = set(), []
    for line in tree[tree.index("```\n") + 4 : tree.rindex("```")].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack = [*stack[:depth], name]
        named.add("/".join(part.strip("/") for part in stack))
    real = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "compress").rglob("*.py")
        if path.name != "__init__.py" or path.parent.name in ("stages", "track", "formats")
    }
    real |= {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    real |= {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")}
    assert real <= named, f"the tree lacks {sorted(real - named)}"
    assert all((ROOT / name).exists() for name in named), [
        name for name in named if not (ROOT / name).exists()
    ]


def test_every_verb_is_in_the_readme():
    assert set(re.findall(r"`compress (\w+)", README)) >= set(VERBS)


def test_table_and_answers_are_those_of_the_committed_record():
    sys.path.insert(0, str(ROOT / "scripts"))
    from make_results import answers_block, table_block

    table, answers = table_block(records("records.jsonl")), answers_block(records("open.jsonl"))
    assert table in README and answers in README
    assert answers.count("\n") == 4 and table.count("PASS") + table.count("FAIL") == 5


def test_the_tables_of_families_are_those_of_the_rows():
    sys.path.insert(0, str(ROOT / "scripts"))
    import make_families

    page = PAGES["docs/models.md"]
    assert make_families.BEGIN + make_families.table() + make_families.END in page
    begin, end = make_families.BRIEF_BEGIN, make_families.BRIEF_END
    assert begin + make_families.brief() + end in README


@pytest.mark.parametrize("command", RUNS)
def test_every_command_of_the_pages_composes(command, tmp_path, monkeypatch):
    for folder in ("my_recipes", "my_files"):
        (tmp_path / folder).mkdir()
    recipe = README[README.index("```yaml\n") + 8 :].partition("```")[0]
    (tmp_path / "my_recipes" / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(command.replace("PATH_OR_HUB_ID", "somebody/a-model"))
    recipes = []

    def task(recipe, run_dir, line):
        recipes.append(recipe)
        return 0

    plain = [argument for argument in arguments if argument != "--plan"]
    assert launch(name, plain, task) == 0 and recipes[0].pipeline


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_path_that_a_page_names_is_there(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    here = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in link or (here / link).exists(), link
    for path in re.findall(
        r"`((?:compress|configs|recipes|scripts|tests|results)/[\w./-]+)`", text
    ):
        assert (ROOT / path).exists() or re.search(r"/(test_)?x\.", path), path
