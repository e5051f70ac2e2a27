"""The house stays as it is drawn: arrows go down, no circles, and code that can be read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import count_house  # noqa: E402

PACKAGE = count_house.sources(ROOT / "compress")
ARROWS = count_house.imports(PACKAGE)
FUNCTIONS = [function for source in PACKAGE for function in source.functions()]


def test_imports_only_go_down():
    assert count_house.upward_arrows(ARROWS) == []


def test_no_modules_import_each_other_in_a_circle():
    assert count_house.circles(ARROWS) == []


def test_every_room_has_a_floor():
    floors = {name for names in count_house.FLOORS for name in names}
    rooms = {count_house.room(module) for module in ARROWS} - {""}
    assert rooms - {"confined_child"} <= floors and floors <= rooms


@pytest.mark.parametrize("folder", ["compress", "tests", "scripts"])
def test_lines_and_files_fit(folder):
    sources = count_house.sources(ROOT / folder)
    assert not [str(source.file) for source in sources if source.long_lines()]
    if folder == "compress":
        assert not [str(source.file) for source in sources if len(source.lines) > 401]


def test_functions_fit():
    assert not [function for function in FUNCTIONS if function.lines > 80]
    assert not [function for function in FUNCTIONS if function.nodes > 300]


def test_a_line_holds_one_idea():
    figures = count_house.counts(ROOT / "compress")
    assert figures["tokens_per_code_line"] <= 9.0
    assert figures["share_with_paragraphs"] >= 0.85
    assert figures["share_with_empty_names"] <= 0.01


def test_the_counters_see_what_they_count(tmp_path):
    file = tmp_path / "a.py"
    body = "\n".join(f"    x{i} = {i}" for i in range(12))
    file.write_text(f'"""Doc."""\n\n\ndef f():\n{body}\n    found = [i for i in range(3)]\n')
    function = next(count_house.Source(file).functions())
    assert function.code_lines == 14 and not function.paragraphs
    assert function.empty_names == ("found",)
    assert count_house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [
        ["a", "b", "c"]
    ]
    assert count_house.upward_arrows({"store": {"config"}}) == ["store -> config"]
