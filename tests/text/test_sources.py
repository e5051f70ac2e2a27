"""Data as people have it: every usual kind of file and row, and one sentence with file and row for
the rest.
"""

from __future__ import annotations

import gzip
import json

import pytest

from compress.text.sources import documents

ASKED = [
    {"role": "user", "content": "What is a river?"},
    {"role": "assistant", "content": "Water."},
]


def jsonl(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.jsonl", b'{"text": "one"}\n{"text": "two"}\n'),
        ("BIG.JSONL", b'{"text": "one"}\r\n{"text": "two"}\r\n'),
        ("old.jsonl", b'{"text": "one"}\r{"text": "two"}\r'),
        ("mark.jsonl", b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}'),
        ("packed.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n', mtime=0)),
        ("array.json", b'[{"text": "one"}, {"text": "two"}]'),
        ("indented.json", b'\n[\n  {\n    "text": "one"\n  },\n  "two"\n]\n'),
        ("strings.jsonl", b'"one"\n"two"\n'),
        ("plain.TXT", b"one\r\n\r\ntwo\n"),
    ],
)
def test_files_of_every_usual_kind_hold_the_same_documents(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert documents(str(tmp_path / name)) == ["one", "two"]


def test_line_separators_inside_strings_end_no_line(tmp_path):
    path = tmp_path / "u2028.jsonl"
    path.write_text('{"text": "one\u2028more\u0085and"}\n{"text": "two"}\n', encoding="utf-8")
    assert documents(str(path)) == ["one\u2028more\u0085and", "two"]


def test_half_a_character_is_replaced_and_said_once(tmp_path):
    path, said = tmp_path / "cut.jsonl", []
    path.write_text(
        '{"text": "whole \\ud83d\\ude42"}\n{"text": "cut \\ud83d"}\n{"text": "\\udc00"}\n'
    )
    assert documents(str(path), said.append) == ["whole 🙂", "cut \ufffd", "\ufffd"]
    assert len(said) == 1 and f"{path}, line 2 holds half a character" in said[0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"text": None, "messages": [turn | {"name": None} for turn in ASKED]},
        {
            "conversations": [
                {"from": "human", "value": "What is a river?"},
                {"from": "gpt", "value": "Water."},
            ]
        },
        {"instruction": "What is a river?", "input": "", "output": "Water."},
        {"question": "What is a river?", "response": "Water."},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
        {
            "messages": [
                turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in ASKED
            ]
        },
    ],
)
def test_rows_of_every_usual_kind_are_the_same_chat(tmp_path, row):
    assert documents(jsonl(tmp_path, row)) == [ASKED]


def test_system_tools_and_calls_are_kept(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [
        ASKED[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    for given in (tools, json.dumps(tools)):
        (chat,) = documents(
            jsonl(tmp_path, {"messages": turns, "tools": given, "system": "Be short."})
        )
        assert chat.tools == tools and chat.where.endswith("rows.jsonl, line 1")
        assert chat[0] == {"role": "system", "content": "Be short."}
        assert chat[2] == {"role": "assistant", "tool_calls": [call]}
    (alpaca,) = documents(jsonl(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"}))
    assert alpaca[0]["content"] == "Add.\n\n1, 2"


def test_empty_chats_are_left_out(tmp_path):
    assert documents(jsonl(tmp_path, {"messages": []}, {"messages": ASKED})) == [ASKED]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "line 2 is a JSON list; a row is an object"),
        (7, "line 2 is a JSON int"),
        (None, "line 2 is a JSON NoneType"),
        ({"text": 7}, "line 2: the field 'text' is a int, a string is needed"),
        ({"messages": "hello"}, "line 2: the field 'messages' is a str, a list of turns is needed"),
        ({"messages": ["hello"]}, "line 2, turn 1 is a str; a turn is an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "line 2, turn 1: its content is a int"),
        ({"messages": [{"role": "user"}]}, "line 2, turn 1: its content is a null"),
        (
            {"messages": [{"role": "critic", "content": "No."}]},
            "has the role 'critic'; allowed: system,",
        ),
        ({"messages": [{"content": "No."}]}, "line 2, turn 1 has the role None; allowed"),
        ({"messages": [{"role": ["user"], "content": "No."}]}, "has the role .*; allowed"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "a part of the type 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a part of the type 'str'"),
        (
            {"messages": [*ASKED, {"role": "assistant", "tool_calls": "add"}]},
            "line 2, turn 3: tool_calls is no list of objects",
        ),
        ({"messages": ASKED, "tools": "{"}, "line 2: the field 'tools' is not JSON"),
        ({"messages": ASKED, "tools": [1]}, "line 2: the field 'tools' is no list of objects"),
        (
            {"prompt": "a", "completion": ["b"]},
            "line 2: the field 'completion' is a list, a string is needed",
        ),
        (
            {"text": None},
            r"the fields \['text'\] \(text null: leave such rows out\); needed: text",
        ),
        ({"instruction": "a"}, r"line 2 has the fields \['instruction'\]; needed: text, messages"),
    ],
)
def test_rows_that_say_nothing_are_refused_by_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        documents(jsonl(tmp_path, "fine", row))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin1.jsonl", '"fine"\n"Köln"\n'.encode("latin-1"), "latin1.jsonl, line 2 is not UTF-8"),
        ("latin1.txt", "Köln".encode("latin-1"), "latin1.txt, line 1 is not UTF-8"),
        ("torn.jsonl.gz", gzip.compress(b'"one"\n', mtime=0)[:-9], "is no whole gzip file"),
        ("deep.jsonl", b'"fine"\n' + b"[" * 100_000, "line 2 is nested too deep"),
        (
            "tools.jsonl",
            b'{"messages": [], "tools": ' + b"[" * 300 + b"]" * 300 + b"}",
            "line 1 is nested more than 100 deep; flatten it",
        ),
        (
            "digits.jsonl",
            b'{"text": ' + b"7" * 5000 + b"}",
            "digits.jsonl, line 1 can't be read as JSON",
        ),
        ("array.json", b'[{"text": "one"},]', "array.json is not JSON .*line 1"),
        ("row.json", b'[{"text": "one"}, 7]', "row.json, row 2 is a JSON int"),
        ("script.py", b"print(1)", "ends in '.py'; allowed"),
        ("only.gz", gzip.compress(b"x", mtime=0), "ends in '.gz'; allowed"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(str(tmp_path / name))


def test_sources_that_name_nothing_are_refused(tmp_path):
    for source, message in (
        (str(tmp_path), "is a directory; name the files in it"),
        ("x" * 5000, "does not exist"),
        ("generated:1x1:" * 500 + "nothing", "is what a teacher writes"),
        ("hub:./folder:train:text", "names no dataset of the hub but a path"),
    ):
        with pytest.raises(ValueError, match=message):
            documents(source)
    with pytest.raises(ValueError) as caught:
        documents("https://user:secret@host/file.jsonl")
    assert "secret" not in str(caught.value)


def test_an_indented_object_is_a_row(tmp_path):
    path = tmp_path / "one.json"
    written = json.dumps({"messages": ASKED}, indent=2)
    for text in (written, " \n" + written.replace("{\n", "{ \t\r\n", 1)):
        path.write_text(text)
        assert documents(str(path)) == [ASKED]


def test_files_that_unpack_to_many_times_their_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.doors.UNPACKED_BYTES", 1000)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 100_000, mtime=0))
    with pytest.raises(ValueError, match="bomb.txt.gz unpacks to more than"):
        documents(str(tmp_path / "bomb.txt.gz"))
    (tmp_path / "fine.txt.gz").write_bytes(gzip.compress(b"a" * 900, mtime=0))
    assert documents(str(tmp_path / "fine.txt.gz")) == ["a" * 900]
    with pytest.raises(ValueError, match="bomb.parquet unpacks to 100 times its size"):
        documents(parquet(tmp_path, "bomb.parquet", {"text": ["a" * 1000] * 2000}))


# ---- Parquet ----


def parquet(folder, name, table):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(table), folder / name)
    return str(folder / name)


def test_parquet_is_read_by_pyarrow_alone_whatever_the_file_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *given: pytest.fail("a connection"))
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **more: pytest.fail("datasets"))
    rows = {"text": ["one", "two"], "other": [b"\xff", b""]}
    assert documents(parquet(tmp_path, "part[0].parquet", rows)) == ["one", "two"]
    assert documents(parquet(tmp_path, "*.PARQUET", rows)) == ["one", "two"]
    nested = {"messages": [[turn | {"name": None} for turn in ASKED]] * 300}
    assert documents(parquet(tmp_path, "nested.parquet", nested)) == [ASKED] * 300


def test_parquet_that_holds_no_text_is_refused(tmp_path):
    empty = {"text": []}
    with pytest.raises(ValueError, match="has no usable text"):
        documents(parquet(tmp_path, "empty.parquet", empty))
    with pytest.raises(ValueError, match=r"fields.parquet has the fields \['body'\]; needed: text"):
        documents(parquet(tmp_path, "fields.parquet", {"body": ["a"]}))
    with pytest.raises(ValueError, match="numbers.parquet, row 1: the field 'text' is a int"):
        documents(parquet(tmp_path, "numbers.parquet", {"text": [1]}))
    with pytest.raises(ValueError, match="nulls.parquet, row 2 has the fields"):
        documents(parquet(tmp_path, "nulls.parquet", {"text": ["a", None]}))
    whole = (tmp_path / "numbers.parquet").read_bytes()
    for damaged in (b"", b"PAR1", whole[:-10], whole[:20] + b"\xff" * 20 + whole[40:]):
        (tmp_path / "damaged.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged.parquet"):
            documents(str(tmp_path / "damaged.parquet"))


def test_hub_rows_are_texts_or_turns_and_what_the_hub_refuses_is_a_sentence(monkeypatch):
    rows = [{"text": "one", "messages": ASKED, "tools": [{"name": "add"}]}]
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **more: rows)
    assert documents("hub:owner/name:train:text") == ["one"]
    (chat,) = documents("hub:owner/name@config:train[:1]:messages")
    assert chat == ASKED and chat.tools == [{"name": "add"}]
    with pytest.raises(
        ValueError, match=r"the dataset has the fields \['messages', 'text', 'tools'\]"
    ):
        documents("hub:owner/name:train:body")

    def refuse(*given, **more):
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ValueError, match="can't be had .*scripts are no longer supported"):
        documents("hub:owner/name:train:text")
