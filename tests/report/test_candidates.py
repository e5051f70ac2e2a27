"""The picture of several runs: what each ships, by name, with its interval, and their teacher."""

from __future__ import annotations

import re

import pytest
from fake_records import ROWS, write_run

from compress.report.html import write_html
from compress.report.picture import candidates
from compress.report.records import open_run
from compress.report.table import measure_of

SIZES = {"solved_90": 1.0, "solved_70": 0.8, "solved_58": 0.6}


@pytest.fixture
def runs(tmp_path):
    """Three runs of three recipes; what ships is smaller and keeps less from run to run."""
    made = []
    for hour, (recipe, share) in enumerate(SIZES.items()):
        path = write_run(tmp_path / recipe, f"2026-11-21T0{hour}-00-00", ROWS)
        run = open_run(str(path))
        run.info["recipe"] = recipe
        scores = run.final["scores"]
        scores["size_bytes"] *= share
        scores["kept"] = kept = 0.5 + 0.4 * share
        run.final["intervals"] = {"kept": [kept - 0.03, kept + 0.03]}
        made.append(run)
    return made


def titles(svg):
    """What every point says, once for each of both drawings."""
    return re.findall(r"<title>([^<]*)</title>", svg)


def test_what_ships_of_every_run_is_drawn_by_name_with_its_interval_and_one_teacher(runs):
    wide, narrow = candidates(runs).split("</svg>")[:2]
    assert titles(wide) == titles(narrow)
    assert sorted(titles(wide), key=titles(wide).index) == [
        "teacher: 98.1 MB, kept 100.0%, 24.30 ms per token in torch",
        "solved_90: 56.4 MB, kept 90.0% (87.0% to 93.0%), 7.20 ms per token in llama.cpp",
        "solved_70: 45.1 MB, kept 82.0% (79.0% to 85.0%), 7.20 ms per token in llama.cpp",
        "solved_58: 33.8 MB, kept 74.0% (71.0% to 77.0%), 7.20 ms per token in llama.cpp",
    ]
    for recipe in SIZES:
        assert re.search(rf">{recipe}<", narrow)


def test_a_line_reaches_from_end_to_end_of_each_interval(runs):
    wide = candidates(runs).partition("</svg>")[0]
    upright = re.findall(r'd="M ([\d.]+) ([\d.]+)L \1 ([\d.]+)"', wide)
    lines = [(float(x), float(low), float(high)) for x, low, high in upright]
    places = re.findall(r'<title>solved_.*?<use [^>]*x="([\d.]+)" y="([\d.]+)"', wide)
    assert len(places) == len(SIZES)

    # The axis is linear and intervals here are even, so that bubbles are in the middle.
    heights = set()
    for x, y in [(float(x), float(y)) for x, y in places]:
        line = next(line for line in lines if abs(line[0] - x) < 0.2)
        assert (line[1] + line[2]) / 2 == pytest.approx(y, abs=0.2)
        heights.add(round(abs(line[1] - line[2])))
    assert len(heights) == 1 and heights.pop() > 20


def test_runs_without_intervals_have_no_lines(runs):
    for run in runs:
        del run.final["intervals"]
    assert "(" not in "".join(titles(candidates(runs)))


def test_open_answers_come_first_and_bits_replace_kl_between_different_tokens(runs):
    finals = [run.final for run in runs]
    assert measure_of(finals, between_runs=True).key == "kept"
    for final in finals:
        final["scores"]["open/kept"] = 0.5
    assert measure_of(finals, between_runs=True).key == "open/kept"
    assert "open answers kept" in candidates(runs)
    assert measure_of(finals).key == "kept"

    # Where nothing was answered.
    for final in finals:
        final["scores"] |= {"kept": None, "open/kept": None, "bytes_per_token": 4.0}
    assert measure_of(finals, between_runs=True).key == "kl_to_teacher"
    finals[0]["scores"]["bytes_per_token"] = 3.9
    assert measure_of(finals, between_runs=True).key == "bits_per_byte/heldout"
    assert "bits per byte (less is better)" in candidates(runs)


def test_runs_of_one_recipe_are_named_by_what_differs(runs):
    for run in runs:
        run.info["recipe"] = "demo"
    assert [title.partition(":")[0] for title in titles(candidates(runs))][1:4] == [
        "2026-11-21T00-00-00",
        "2026-11-21T01-00-00",
        "2026-11-21T02-00-00",
    ]


def test_slots_of_one_run_are_candidates_too_and_every_run_keeps_its_own_picture(runs, tmp_path):
    slots = [open_run(f"{runs[0].path}/{slot}") for slot in ("heal", "gguf")]
    assert [title.partition(":")[0] for title in titles(candidates(slots))][1:3] == ["heal", "gguf"]
    write_html(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("size, closeness and latency of every candidate") == 2
    assert page.count("size, closeness and latency of every slot") == 2 * len(runs)
