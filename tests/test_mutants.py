"""Every mutant of mutants.py still meets its line, and a guard that fails by itself is reported."""

import ast
from functools import cache

import mutants
import pytest
from mutants import MUTANTS, ROOT, Mutant, changed


@cache
def parsed(file: str) -> tuple[str, str]:
    """A file of the package and its syntax tree."""
    text = (ROOT / "compress" / file).read_text()
    return text, ast.dump(ast.parse(text))


def fault(mutant: Mutant) -> str:
    """Why a mutant could not be run, or would change nothing; empty where it can."""
    text, tree = parsed(mutant.file)
    made_wrong = changed(text, mutant.old, mutant.new)
    if made_wrong is None:
        return "its line is not in its file exactly once"
    try:
        tree_made_wrong = ast.parse(made_wrong)
        compile(tree_made_wrong, mutant.file, "exec")
    except SyntaxError as error:
        return f"made wrong, its file does not compile: {error}"
    return "it changes nothing" if ast.dump(tree_made_wrong) == tree else ""


def test_every_mutant_is_in_its_file_once_and_compiles_to_another_program():
    faults = [(mutant.file, mutant.old, fault(mutant)) for mutant in MUTANTS]
    assert not [row for row in faults if row[-1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = f(x, y)\n", "a = g(x)\n"),
        ("a = f(\n    x,\n    y,\n)\n", "a = g(x)\n"),
        ("a = f(x,y )\nb = ff(x, y)\n", "a = g(x)\nb = ff(x, y)\n"),
        ("a = f(x, y)\nb = f(x, y)\n", None),
        ("a = f(x, z)\n", None),
        ("a = f(x, yy)\n", None),
    ],
)
def test_a_line_is_met_however_it_is_laid_out_but_only_once(text, expected):
    assert changed(text, "f(x, y)", "g(x)") == expected


def test_mutants_of_a_guard_that_fails_by_itself_are_not_run(monkeypatch, tmp_path, capsys):
    """One guard passes and notices its mutants, the other fails on the package as it is."""
    ran = []

    def pytest_code(folder, tests, output):
        output.write_text("what pytest said")
        changed_now = (folder / "compress" / "models/ends.py").read_text() != text
        ran.append((tests, changed_now))
        return int(tests == "bad" or changed_now)

    text, _ = parsed("models/ends.py")
    (word,) = [row for row in MUTANTS if row.file == "models/ends.py"]
    monkeypatch.setattr(
        mutants, "MUTANTS", [word._replace(tests=t) for t in ("good", "bad", "good")]
    )
    monkeypatch.setattr(mutants, "IMPORTED", ())
    monkeypatch.setattr(mutants, "pytest_code", pytest_code)
    assert mutants.main(["models/ends.py"]) == 1
    assert ran == [("good", False), ("bad", False), ("good", True), ("good", True)]
    shown = capsys.readouterr().out
    assert "pytest bad ended with 1 without a mutant: what pytest said" in shown
    assert "3 mutants, 2 killed (66.7%), 0 survived, 0 stale, 1 whose guard fails" in shown
