"""The schema of a record names every key that records have."""

from __future__ import annotations

import json
from pathlib import Path

from compress.budget import LIMIT_METRICS
from compress.report.schema import RECORD, SCORES, explained, figure_of
from compress.report.table import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [
    json.loads(line)
    for line in (ROOT / "results" / "demo" / "records.jsonl").read_text().splitlines()
]


def test_every_key_of_the_committed_records_is_in_the_schema():
    assert {key for record in RECORDS for key in record} <= RECORD.keys()
    scores = {key for record in RECORDS for key in record["scores"]}
    assert not [key for key in scores if figure_of(key) is None]


def test_intervals_are_those_of_figures_that_have_one():
    with_interval = {key for record in RECORDS for key in record["intervals"]}
    assert with_interval and all(figure_of(key).interval for key in with_interval)
    exact = {key for key, figure in SCORES.items() if not figure.interval}
    assert not with_interval & exact


def test_every_limit_is_on_a_figure_with_a_direction():
    assert all(figure_of(metric).better for metric in LIMIT_METRICS)
    assert all(explained(column.key) for column in COLUMNS if column.group == "scores")


def test_a_key_is_explained_in_a_sentence():
    assert explained("kl_to_teacher/topics") == (
        "KL(teacher || model), mean over tokens, nats; less is better;"
        " 95% interval over rows of held-out text"
    )
    assert explained("nothing/at/all") == ""
