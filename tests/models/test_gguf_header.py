"""Damaged, cut and hostile GGUF files are refused in one sentence before any reader allocates what
they claim.
"""

from __future__ import annotations

import resource
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from compress.formats.gguf import export_gguf
from compress.models.checkpoint import model_of
from compress.models.gguf_header import check_file, read_fields, read_header, read_metadata
from compress.score.size import size
from compress.store import Store
from compress.teacher import check_importable, import_gguf, open_teacher


@pytest.fixture(scope="module")
def whole(tiny_teacher, tmp_path_factory) -> Path:
    """The tiny teacher as a GGUF."""
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    export_gguf(tiny_teacher, file, "Q8_0")
    return file


def refused(file: Path, message: str) -> None:
    """Every way in refuses it in a sentence, quickly and in little memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for door in (
        model_of,
        check_importable,
        lambda path: open_teacher(str(path), None, Store(path.parent / "store"), print),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            door(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert not list(file.parent.glob("store/entries/*"))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def array(kind: int, count: int, rest: bytes = b"") -> bytes:
    return text("general.list") + struct.pack("<IIQ", 9, kind, count) + rest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no GGUF file"),
        (b"\x80\x04pickle" * 9, "is no GGUF file"),
        (header(1, 0, version=1), "version 1 where 2 or 3 is read"),
        (header(0, 0, version=3 << 24), "version 50331648 where"),
        (header(1 << 60, 0), "tensors .* are claimed, at most"),
        (header(0, 1 << 60), "keys are claimed, at most"),
        (header(0, 1), "a key claims 8 bytes"),
        (header(0, 1, struct.pack("<Q", 1 << 62)), "a key claims 4,611,686,018,427,387,904 bytes"),
        (
            header(0, 1, text("general.name") + struct.pack("<IQ", 8, 1 << 60)),
            "key 'general.name' claims",
        ),
        (
            header(0, 1, text("general.name") + struct.pack("<I", 77)),
            "is of type 77, which is unknown",
        ),
        (header(0, 1, array(4, 1 << 60)), "claims 1,152,921,504,606,846,976 elements"),
        (header(0, 1, array(4, 1000)), "claims 4,000 bytes"),
        (header(0, 1, array(8, 3_000_000, text("a"))), "key 'general.list' claims 8 bytes"),
        (header(0, 1, array(0, 5_000_000, bytes(5_000_000))), "at most 4,000,000 are read"),
        (
            header(0, 1, array(9, 1, struct.pack("<IQ", 9, 1) * 1000)),
            "arrays of arrays are not read",
        ),
        (header(0, 1, text("\x00") + struct.pack("<IQ", 8, 1) + b"\xff"), "is not UTF-8"),
        (header(0, 2, (text("a") + struct.pack("<II", 4, 1)) * 2), "key 'a' is there twice"),
        (header(1, 0, text("t") + struct.pack("<I", 99)), "tensor 't' has 99 dimensions"),
        (
            header(1, 0, text("t") + struct.pack("<IQQIQ", 2, 32, 1 << 50, 0, 0)),
            "tensor 't' ends at byte",
        ),
        (
            header(1, 0, text("t") + struct.pack("<IQIQ", 1, 32, 777, 0)),
            "tensor 't' is of type 777",
        ),
        (
            header(1, 0, text("t") + struct.pack("<IQIQ", 1, 33, 2, 0)),
            r"tensor 't' of shape \(33,\) can't begin",
        ),
        (
            header(1, 0, text("t") + struct.pack("<IQIQ", 1, 32, 0, 1 << 63)),
            "tensor 't' ends at byte",
        ),
        (
            header(
                2,
                0,
                b"".join(text(name) + struct.pack("<IQIQ", 1, 8, 0, 0) for name in "ab")
                + bytes(99),
            ),
            "'b' overlaps another",
        ),
        (header(0, 0, bytes(64)), "names no general.architecture"),
    ],
)
def test_counts_beyond_the_file_and_damaged_headers_are_refused_before_work(
    tmp_path, data, message
):
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", message)


def test_a_file_cut_short_anywhere_is_refused(whole, tmp_path):
    data, file = whole.read_bytes(), tmp_path / "m.gguf"
    for share in (0.0001, 0.01, 0.1, 0.5, 0.999):
        file.write_bytes(data[: int(len(data) * share)])
        refused(file, "GGUF")
        with pytest.raises(ValueError, match="m.gguf"):
            read_fields(file)
        with pytest.raises(ValueError, match="m.gguf"):
            size(file)


def test_a_random_byte_of_the_header_never_ends_in_anything_but_a_sentence(whole, tmp_path):
    data, file, draw = bytearray(whole.read_bytes()), tmp_path / "m.gguf", np.random.default_rng(0)
    for _ in range(60):
        at, to = int(draw.integers(4, 12_000)), int(draw.integers(256))
        damaged = data.copy()
        damaged[at] = to
        file.write_bytes(damaged)
        try:
            check_importable(file)
            read_fields(file)
        except ValueError as error:
            assert "\n" not in str(error)


def written(
    file: Path, blocks: int = 2, drop: str = "", rows: int = 3, types: int = 3, **how
) -> Path:
    """A Llama's GGUF made by hand, as `how` and the arguments bend it."""
    writer = gguf.GGUFWriter(file, how.pop("family", "llama"))
    numbers = {
        "block_count": blocks,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
    }
    for key, value in {**numbers, **how.pop("numbers", {})}.items():
        getattr(writer, "add_string" if isinstance(value, str) else "add_uint32")(
            f"llama.{key}", value
        )
    writer.add_layer_norm_rms_eps(how.pop("eps", 1e-5))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_types([1] * types)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(how.pop("eos", 0))
    for key, value in how.pop("keys", {}).items():
        writer.add_uint16(key, value)
    shapes = {"token_embd": (rows, 32), "output_norm": (32,)} | how.pop("tensors", {})
    for i in range(blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.{i}.{name}"] = (32, 32)
        shapes |= {f"blk.{i}.attn_norm": (32,), f"blk.{i}.ffn_norm": (32,)}
    for name, shape in shapes.items():
        if not drop or drop not in name:
            writer.add_tensor(f"{name}.weight", np.ones(shape, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"drop": "blk.1.ffn_up"}, "has 2 blocks by its metadata and lacks blk.1.ffn_up.weight"),
        ({"drop": "blk.1."}, "lacks blk.1.attn_norm.weight, .* and 6 more"),
        ({"drop": "token_embd"}, "lacks token_embd.weight"),
        (
            {"numbers": {"block_count": 10**9}},
            "llama.block_count is 1000000000; needed is a whole number",
        ),
        ({"numbers": {"block_count": "two"}}, "llama.block_count is 'two'"),
        ({"keys": {"split.count": 3, "split.no": 1}}, "is part 2 of 3 of a model; join them with"),
    ],
)
def test_a_file_that_is_not_a_whole_model_is_refused(tmp_path, how, message):
    refused(written(tmp_path / "m.gguf", **how), message)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"tensors": {"rope_freqs": (16,)}}, "has rope_freqs.weight, scaled rotary positions"),
        ({"tensors": {"foreign": (16,)}}, "GGUF tensor foreign.weight is unknown"),
        ({"numbers": {"attention.head_count": 0}}, "llama.attention.head_count is 0"),
        ({"numbers": {"attention.head_count": 3}}, "embedding_length is no multiple"),
        ({"numbers": {"context_length": "long"}}, "llama.context_length is 'long'"),
        ({"numbers": {"embedding_length": 64}}, "token_embd.weight|by the file's metadata"),
        ({"eps": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"rows": 5}, "3 tokens, 3 token types and 5 rows"),
        ({"types": 2}, "3 tokens, 2 token types and 3 rows"),
        ({"eos": 9}, "eos_token_id is 9, its vocabulary has 3 ids"),
    ],
)
def test_what_an_import_would_stumble_over_is_refused_by_its_key(tmp_path, how, message):
    file = written(tmp_path / "m.gguf", **how)
    check_file(file)
    with pytest.raises(ValueError, match=message) as caught:
        import_gguf(file, tmp_path / "out")
    assert str(file) in str(caught.value) and not (tmp_path / "out" / "model.safetensors").exists()


def test_whole_files_pass(whole, tmp_path):
    fields, tensors = read_header(whole)
    assert fields["general.architecture"] == "llama" and len(tensors) == len(read_fields(whole)[1])
    check_importable(whole)
    import_gguf(written(tmp_path / "m.gguf"), tmp_path / "out")
    named = tmp_path / "checkpoint.gguf"
    named.mkdir()
    for file in (tmp_path / "out").iterdir():
        (named / file.name).write_bytes(file.read_bytes())
    assert open_teacher(str(named), None, Store(tmp_path / "store"), print).path == named


def test_metadata_that_are_kept_are_those_of_the_file_as_it_is(tmp_path):
    file = written(tmp_path / "m.gguf")
    first = read_metadata(file)
    assert first == read_fields(file)[0] and first["tokenizer.ggml.tokens"] == ["a", "b", "ab"]

    # A caller's changes are its own, and what is written over the file is read.
    first.clear()
    assert read_metadata(file)["llama.context_length"] == 64
    size_before = file.stat().st_size
    written(file, numbers={"context_length": 128})
    assert file.stat().st_size == size_before
    assert read_metadata(file)["llama.context_length"] == 128
    with pytest.raises(ValueError, match="no such GGUF file"):
        read_metadata(tmp_path / "absent.gguf")
