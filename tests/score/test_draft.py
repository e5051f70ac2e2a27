"""A student as the draft of its teacher: what is timed, and which pairs are refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from compress.formats.gguf import export_gguf
from compress.models.checkpoint import model_of
from compress.models.model import Model
from compress.report.schema import figure_of
from compress.score import draft
from compress.score.draft import Timed, _figures, check_draft, drafted
from compress.score.prompts import Prompt

ASKED = [Prompt(f"own-{n}", f"Tell me of the number {n}.", must_contain=["x"]) for n in range(9)]


@pytest.fixture(scope="module")
def files(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    for kind in ("F16", "Q8_0"):
        export_gguf(tiny_teacher, folder / f"{kind}.gguf", kind)
    return folder / "F16.gguf", folder / "Q8_0.gguf"


def test_the_target_keeps_what_it_would_have_said(files, monkeypatch):
    monkeypatch.setattr(draft, "LENGTHS", (3,))
    target, other = files
    scores, intervals = drafted(target, target, ASKED, 1, lambda line: None)
    assert scores["draft_same/3"] == 1.0
    # Itself it keeps, up to the place behind an answer's end.
    assert scores["draft_accepted/3"] > 0.9
    low, high = intervals["draft_speedup/3"]
    assert low < scores["draft_speedup/3"] < high
    assert all(figure_of(name) for name in scores)

    # Of one that is rounded it keeps what it would have said, no more.
    rounded, _ = drafted(target, other, ASKED, 1, lambda line: None)
    assert rounded["draft_accepted/3"] <= scores["draft_accepted/3"]
    assert rounded["draft_same/3"] == 1.0


def test_both_servers_are_asked_the_same_in_turn(files, monkeypatch):
    asked = []

    def timed(server, prompt):
        asked.append((server, prompt))
        return Timed([1], 10.0, 0, 0)

    monkeypatch.setattr(draft, "_timed", timed)
    monkeypatch.setattr(draft, "LENGTHS", (2,))
    drafted(*files, ASKED, 1, lambda line: None)
    warm, rest = asked[:2], asked[2:]
    assert len({server for server, _ in warm}) == 2
    assert len(rest) == 2 * 3  # numbers 0, 4 and 8: the fixed quarter
    assert [rest[i][0] is warm[0][0] for i in range(6)] == [False, True, True, False, False, True]
    assert all(rest[i][1] == rest[i + 1][1] for i in (0, 2, 4))


def test_figures_are_ratios_of_sums():
    pairs = [
        (Timed([1, 2], 30.0, 0, 0), Timed([1, 2], 10.0, 8, 6)),
        (Timed([1, 3], 10.0, 0, 0), Timed([1, 4], 10.0, 2, 0)),
    ]
    figures = {name: (value, interval) for name, value, interval in _figures(pairs)}
    assert figures["speedup"][0] == 2.0
    assert figures["accepted"] == (0.6, None)
    assert figures["same"] == (0.5, None)
    assert figures["speedup"][1] is not None
    assert {name: i for name, _, i in _figures(pairs[:1])}["speedup"] is None


def test_a_pair_that_can_not_draft_is_refused(files, tiny_teacher, tmp_path):
    target, student = files[0], Model(files[1], "", "llama.cpp")
    assert check_draft(target, student, ASKED) == target
    with pytest.raises(ValueError, match=r"can't be a draft: llama.cpp drafts by .gguf files"):
        check_draft(target, model_of(tiny_teacher), ASKED)
    with pytest.raises(ValueError, match=r"this teacher is a checkpoint; give --teacher FILE.gguf"):
        check_draft(None, student, ASKED)
    with pytest.raises(ValueError, match="divisible by 4, and there is none"):
        check_draft(target, student, [dataclasses.replace(ASKED[0], id="own-1")])


def test_a_draft_of_another_vocabulary_is_refused(files, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs.gguf"
    shutil.copy(files[0], theirs)
    of_gguf = draft.of_gguf

    def swapped(file: Path):
        vocabulary = of_gguf(file)
        if file == theirs:
            tokens = vocabulary.tokens
            tokens[5], tokens[6] = tokens[6], tokens[5]
        return vocabulary

    monkeypatch.setattr(draft, "of_gguf", swapped)
    with pytest.raises(ValueError, match="they differ at 2 ids: a draft speaks in its target's"):
        check_draft(theirs, Model(files[1], "", "llama.cpp"), ASKED)
