"""What counts as a text that repeats itself."""

from __future__ import annotations

import pytest

from compress.text.repetition import loops

LOOPS = [
    "The following is a list of the top 1000000000000000000000000",
    "the city of the city of the city of the city of the city of",
    "Yes. Yes. Yes. Yes. Yes. Yes. Yes. Yes.",
    (
        "1. The Golden Gate Bridge is red\n2. The Golden Gate Bridge is tall\n"
        "3. The Golden Gate Bridge is big\n4. The Golden Gate Bridge is old"
    ),
    "He said that it was good and that it was bad. " * 3,
    "hahahahahahahahahahahahahahahahahahahahahahaha",
]
FINE = [
    "",
    "Paris.",
    "apple apple apple",
    "ha ha ha ha",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "| a | b |\n|---|---|\n| 1 | 2 |\n--------------------------------",
    "def add(a, b):\n                return a + b",
    "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is",
    "The capital of France is Paris. The capital of Spain is Madrid. The capital of Italy is Rome.",
]


@pytest.mark.parametrize("text", LOOPS)
def test_a_text_that_repeats_itself_loops(text):
    assert loops(text)


@pytest.mark.parametrize("text", FINE)
def test_lists_refrains_and_tables_do_not_loop(text):
    assert not loops(text)


@pytest.mark.parametrize(("repeats", "found"), [(2, False), (3, True)])
def test_a_unit_must_stand_three_times(repeats, found):
    assert loops("we went to the " * repeats + "sea") is found


def test_a_long_text_is_judged_in_well_under_a_second():
    import time

    start = time.perf_counter()
    loops(" ".join(str(i) for i in range(20_000)))
    assert time.perf_counter() - start < 2
