"""Task files that somebody else wrote: a row that the task can't take is named by file, line and
field.
"""

from __future__ import annotations

import json

import pytest
from test_tasks import ROWS, local, write

from compress.score import task_files

ABC = {"text": ["a", "b"], "label": ["A", "B"]}


@pytest.mark.parametrize("name", ROWS)
def test_rows_as_the_hub_has_them_are_read(tmp_path, name):
    local(tmp_path, name)
    assert task_files.load_task(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("arc_easy", {"choices": ["a", "b"]}),
        ("arc_easy", {"choices": ABC | {"label": ["A"]}}),
        ("arc_easy", {"choices": ABC | {"text": [1, 2]}}),
        ("arc_easy", {"choices": {"text": [], "label": []}}),
        ("arc_easy", {"choices": None}),
        ("arc_easy", {"answerKey": "Z"}),
        ("arc_easy", {"answerKey": ["A"]}),
        ("arc_easy", {"question": 5}),
        ("arc_easy", {"question": None}),
        ("openbookqa", {"question_stem": {}}),
        ("boolq", {"label": 2}),
        ("boolq", {"label": "yes"}),
        ("boolq", {"label": 0.5}),
        ("hellaswag", {"endings": "cries"}),
        ("hellaswag", {"endings": []}),
        ("hellaswag", {"label": "7"}),
        ("hellaswag", {"label": {}}),
        ("piqa", {"label": 10**30}),
        ("winogrande", {"answer": "4"}),
        ("winogrande", {"option1": 1}),
        ("lambada_openai", {"text": ["a"]}),
        ("blimp", {"UID": ["x"]}),
        ("mmlu", {"choices": ["a"]}),
        ("mmlu", {"answer": 4}),
        ("mmlu", {"subject": {}}),
        ("wikitext", {"page": 1}),
        ("gsm8k", {"answer": 4}),
        ("truthfulqa_mc1", {"mc1_targets": {"choices": ["a"], "labels": [1, 0]}}),
        ("truthfulqa_mc1", {"mc1_targets": []}),
        ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a"], "labels": [0]}}),
        ("crows_pairs_english", {"sent_more": 1}),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, name, change):
    split, row = ROWS[name]
    write(tmp_path / name, split, [row(0), row(1) | change])
    [field] = change
    with pytest.raises(
        ValueError, match=rf"{split}\.jsonl, line 2: the field '{field}' is .*; task {name} needs"
    ):
        task_files.load_task(name, tmp_path)


def test_labels_that_nobody_tells_are_as_on_the_hub(tmp_path):
    for name, hidden in (
        ("hellaswag", {"label": ""}),
        ("piqa", {"label": -1}),
        ("winogrande", {"answer": ""}),
    ):
        split, row = ROWS[name]
        write(tmp_path / name, split, [row(0)])
        write(tmp_path / name, "test", [row(0) | hidden])
        assert task_files._local(name, {}, tmp_path)


def test_a_task_without_known_fields_fails_in_a_sentence(tmp_path):
    write(tmp_path / "sciq", "test", [{"question": "q", "correct_answer": 5}])
    with pytest.raises(ValueError, match="task 'sciq' can't read the rows in .*sciq"):
        task_files.load_task("sciq", tmp_path)
    write(tmp_path / "sciq", "test", [{"question": "q"}, {"question": 5}])
    with pytest.raises(
        ValueError, match=r"test\.jsonl, line 2: the field 'question' is a int, a str above"
    ):
        task_files.load_task("sciq", tmp_path)


@pytest.mark.parametrize(
    "text", ["[1]", "5", "[" * 50_000, "{", '{"a": ' + "9" * 5000 + "}", '\n\n{"a"']
)
def test_a_line_that_is_no_object_is_named(tmp_path, text):
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"test\.jsonl, line [13]"):
        task_files.load_task("arc_easy", tmp_path)


def test_lines_end_at_a_line_feed_alone(tmp_path):
    row = ROWS["lambada_openai"][1](0) | {"text": "one\u2028two\u0085three words"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert task_files.read_jsonl(tmp_path / "t.jsonl") == [row]
