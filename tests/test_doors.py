"""Each door refuses what is damaged in one sentence that names the file,
and reads what is whole.
"""

import gzip
import json
import re
import struct

import pytest
import torch
from safetensors.torch import save_file

from compress.doors import (
    is_number,
    is_real,
    json_lines,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
)
from compress.models.gguf_header import read_header
from compress.models.shapes import tensor_places


def test_text_comes_without_its_byte_order_mark_and_unpacked(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"hello", mtime=0))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "b.txt.gz") == "hello"


def test_other_encodings_are_refused_with_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(
        ValueError, match=r"a\.txt, line 2 is not UTF-8 text \(byte 0xe9\).*iconv -f latin1"
    ):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-16", r"it begins as UTF-16\).* -f utf-16 "),
        ("utf-32", r"it begins as UTF-32\).* -f utf-32 "),
        ("utf-16-le", r"byte 0x00\).* -f utf-16-le "),
        ("utf-16-be", r"byte 0x00\).* -f utf-16-be "),
    ],
)
def test_the_way_out_of_another_encoding_is_its_own(tmp_path, encoding, told):
    (tmp_path / "a.txt").write_bytes("hello\nworld".encode(encoding))
    with pytest.raises(ValueError, match=rf"a\.txt, line 1 is not UTF-8 text \({told}") as refusal:
        read_text(tmp_path / "a.txt")
    named = re.search(r"-f (\S+) -t", str(refusal.value))[1]
    assert (tmp_path / "a.txt").read_bytes().decode(named) == "hello\nworld"


def test_a_nul_in_a_text_is_named_by_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\0\n" + b"three\n" * 100)
    with pytest.raises(ValueError, match=r"a\.txt, line 2 is not .*0x00.*tr -d '\\000' < a\.txt"):
        read_text(tmp_path / "a.txt")


def test_what_git_lfs_has_not_fetched_is_no_file(tmp_path):
    (tmp_path / "a").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    for door in (read_text, tensor_places, read_header):
        with pytest.raises(ValueError, match="a is a Git LFS pointer.*git lfs pull"):
            door(tmp_path / "a")


def test_numbers_that_no_float_holds_are_none():
    assert is_number(10**300) and is_number(-1.5) and is_real(float("nan"))
    assert not any(map(is_number, (10**400, float("inf"), True, "1"))) and not is_real(10**400)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"hello" * 100, mtime=0)[:-12])
    with pytest.raises(ValueError, match="a.jsonl.gz is no whole gzip file"):
        read_text(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "9" * 5000, ""])
def test_json_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match="^here "):
        parse_json(text, "here")


def test_json_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list, needed: dict"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json", list) == []


def test_json_lines_end_at_a_line_feed_alone(tmp_path):
    rows = [{"text": "a\u2028b\u2029c\u0085d"}, {"text": "e"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(text + "\r\n\n", encoding="utf-8")
    assert [value for _, value in json_lines(tmp_path / "a.jsonl")] == rows
    assert [where for where, _ in json_lines(tmp_path / "a.jsonl")][1].endswith("a.jsonl, line 2")


def test_yaml_that_multiplies_holds_itself_or_is_too_deep_is_refused():
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)
    )
    for text in (bomb, "a: &a [*a]", "[" * 20_000, "a: [", "a: !!python/name:os.system"):
        with pytest.raises(ValueError, match="^here "):
            parse_yaml(text, "here")
    assert parse_yaml("a: &x [1, 2]\nb: *x\n", "here") == {"a": [1, 2], "b": [1, 2]}


def test_a_safetensors_header_is_read_without_the_tensors(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.zeros(0),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    places = tensor_places(tmp_path / "m.safetensors")
    assert {name: (place.dtype, place.shape) for name, place in places.items()} == {
        "a": ("F32", (2, 3)), "b": ("BF16", (4,)), "c": ("F32", (0,)),
    }  # fmt: skip


def _file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04pickle",
        struct.pack("<Q", 1 << 60) + b"{}",
        _file(b"\xff\xfe"),
        _file(b"[" * 50_000),
        _file([]),
        _file({"a": 1}),
        _file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0000"),
        _file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
        _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"000"),
        _file(
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            b"0000",
        ),
        _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000"),
    ],
)
def test_damaged_safetensors_are_refused_by_file(tmp_path, data):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="m.safetensors"):
        tensor_places(tmp_path / "m.safetensors")
