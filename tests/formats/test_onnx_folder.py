"""A directory for ONNX Runtime that somebody else wrote: refused before ONNX Runtime sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest

from compress import ask
from compress.__main__ import main
from compress.formats import onnxruntime
from compress.formats.onnx import ARCHITECTURES, export_onnx
from compress.formats.onnx_folder import MODEL_TYPES, check_folder
from compress.formats.onnxruntime import OnnxRuntime
from compress.formats.onnxruntime import head as onnx_head
from compress.models.checkpoint import Model
from compress.quant.settings import GridName
from compress.score.latency import Timing, measure
from compress.stages.ptq import Ptq


@pytest.fixture(scope="module", params=["q4_0", "q8_0", None])
def exported(request, tiny_teacher, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("onnx")
    if request.param:
        Ptq(grid=GridName(request.param)).run(tiny_teacher, out / "hf", None)
    export_onnx(out / "hf" if request.param else tiny_teacher, out / "onnx")
    return out / "onnx"


@pytest.fixture(scope="module")
def plain(tiny_teacher, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "onnx"
    export_onnx(tiny_teacher, out)
    return out


@pytest.fixture
def received(plain, tmp_path, monkeypatch) -> Path:
    """A copy to change; whoever hands it to ONNX or ONNX Runtime fails the test."""
    shutil.copytree(plain, tmp_path / "onnx")
    monkeypatch.setattr(onnxruntime, "wheel", lambda name: pytest.fail(f"{name} was asked"))
    return tmp_path / "onnx"


def change(folder: Path, *path: str, value: object) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    table = config
    for key in path[:-1]:
        table = table.setdefault(key, {})
    table[path[-1]] = value
    (folder / "genai_config.json").write_text(json.dumps(config))


def test_what_compress_writes_is_read(exported):
    assert check_folder(exported)["model"]["decoder"]["filename"] == "model.onnx"


def test_every_architecture_that_is_exported_is_read():
    assert set(ARCHITECTURES) <= set(MODEL_TYPES)


SESSION = ("model", "decoder", "session_options")
STRANGE = [
    ((*SESSION, "custom_ops_library"), "ops.so", "session_options: the key 'custom_ops_library'"),
    ((*SESSION, "provider_options"), [{"cuda": {}}], "the key 'provider_options'"),
    ((*SESSION, "log_id"), "x", "the key 'log_id' is not known here"),
    (("model", "decoder", "provider_options"), [], "model.decoder: the key 'provider_options'"),
    (("model", "decoder", "filename"), "../other.onnx", "'filename' is \"../other.onnx\""),
    (("model", "decoder", "filename"), "/tmp/other.onnx", "needed: model.onnx"),
    (("model", "decoder", "pipeline"), [], "the key 'pipeline'"),
    (("model", "vision"), {"filename": "v.onnx"}, "model: the key 'vision'"),
    (("model", "type"), "whisper", "'type' is \"whisper\", needed: one of llama"),
    (("model", "vocab_size"), 0, "'vocab_size' is 0, needed: a whole number"),
    (("model", "vocab_size"), True, "'vocab_size' is true"),
    (("model", "vocab_size"), 2**31 - 1, "'vocab_size' is 2147483647, needed: a whole number"),
    (("model", "eos_token_id"), [], "'eos_token_id' is []"),
    (("model", "eos_token_id"), [2**31 - 1], "eos_token_id is [2147483647], and vocab_size"),
    (("search", "max_length"), 1e400, "'max_length' is Infinity"),
    (("model", "decoder", "inputs", "input_ids"), "../x", "'input_ids' is \"../x\""),
    (("engine",), {}, "genai_config.json: the key 'engine'"),
    (("search",), [], "'search' is [], needed: a JSON object"),
]


@pytest.mark.parametrize(("path", "value", "message"), STRANGE, ids=[one[2] for one in STRANGE])
def test_a_strange_key_or_value_is_refused_by_name(received, path, value, message):
    change(received, *path, value=value)
    for read in (check_folder, onnx_head, lambda folder: OnnxRuntime(folder, 1, 64)):
        with pytest.raises(ValueError) as error:
            read(received)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="genai_config.json"):
        ask.context_of(Model(received, "", "onnxruntime"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ("{", "is not JSON"),
        ("[]", "holds a JSON list"),
        (
            '{"model": {"decoder": {"session_options": {"custom_ops_library": "x"}}}, "model": {}}',
            "twice",
        ),
        ("", "is not JSON"),
    ],
)
def test_a_damaged_config_is_one_sentence(received, text, message):
    (received / "genai_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        OnnxRuntime(received, 1, 64)


def _custom(model):
    model.graph.node[0].domain = "evil.ops"


def _custom_opset(model):
    model.opset_import.append(onnx.helper.make_opsetid("evil.ops", 1))


def _operator(model):
    model.graph.node[0].op_type = "Loop"


def _function(model):
    model.functions.append(onnx.helper.make_function("", "Add", ["a"], ["b"], [], []))


def _subgraph(model):
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", model.graph))


def _outside(model, place="../secret"):
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.external_data[0].value = place


def _absolute(model):
    _outside(model, "/dev/zero")


def _missing(model):
    _outside(model, "elsewhere.data")


def _settings(model):
    model.metadata_props.add(key="ort_config", value="{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_custom, "operators of the domain 'evil.ops'"),
        (_custom_opset, "operators of the domain 'evil.ops'"),
        (_operator, "the operator 'Loop'"),
        (_function, "model has field 25"),
        (_subgraph, "attribute has field 6"),
        (_outside, "keeps tensors in '../secret'"),
        (_absolute, "keeps tensors in '/dev/zero'"),
        (_missing, "keeps tensors in 'elsewhere.data'"),
        (_settings, "model has field 14"),
    ],
)
def test_a_graph_that_compress_does_not_write_is_refused(received, spoil, message):
    model = onnx.load(received / "model.onnx", load_external_data=False)
    spoil(model)
    (received / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="model.onnx") as error:
        OnnxRuntime(received, 1, 64)
    assert message in str(error.value)


def test_a_graph_cut_anywhere_is_refused_or_read(received):
    whole = (received / "model.onnx").read_bytes()
    for size in range(0, len(whole), 997):
        (received / "model.onnx").write_bytes(whole[:size])
        try:
            check_folder(received)
        except ValueError as error:
            assert "model.onnx" in str(error)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_beside_the_model_is_never_loaded(plain, tmp_path, monkeypatch, capfd):
    """By `score`, `ask` and the process that measures times."""
    monkeypatch.chdir(tmp_path)
    folder, canary = tmp_path / "onnx", tmp_path / "canary"
    shutil.copytree(plain, folder)
    source = (
        f'#include <stdio.h>\n__attribute__((constructor)) void f(void) {{ fclose(fopen("{canary}",'
        ' "w")); }\n'
    )
    (tmp_path / "ops.c").write_text(source)
    library = folder / "ops.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "ops.c"], check=True)
    for name in ("ops.so", str(library)):
        change(folder, *SESSION, "custom_ops_library", value=name)
        assert main(["ask", str(folder), "hi", "--alone"]) == 3
        assert (
            main(
                [
                    "score",
                    str(folder),
                    "--teacher",
                    "random",
                    "eval=smoke",
                    "eval.tasks=[]",
                    "data.seq_len=64",
                ]
            )
            == 3
        )
        assert "the key 'custom_ops_library' is not known here" in capfd.readouterr().err
        with pytest.raises(ValueError, match="custom_ops_library"):
            measure(folder, "onnxruntime", Timing(1, 2, 1, 1, 1))
    assert not canary.exists()


def test_another_vocabulary_than_the_heads_is_refused(plain, tmp_path):
    folder = tmp_path / "onnx"
    shutil.copytree(plain, folder)
    rows = len(onnx_head(folder).weight_VH)
    for forged in (rows + 1, rows - 1):
        change(folder, "model", "vocab_size", value=forged)
        message = f"'vocab_size' is {forged}, and the head of model.onnx has {rows} rows"
        with pytest.raises(ValueError, match="genai_config.json, model: ") as error:
            onnx_head(folder)
        assert message in str(error.value)
