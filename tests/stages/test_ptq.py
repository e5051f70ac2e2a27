"""The `ptq` stage on a tiny random model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from gguf import quants
from small_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compress.models.checkpoint import load_model, save_model
from compress.quant import blockwise
from compress.quant.codes import is_quantized, load_quantized
from compress.quant.grids import GRIDS
from compress.quant.settings import BLOCK, SEARCHED, Balance, GridName, Method, Scales
from compress.stages.ptq import Ptq
from compress.stages.qat import Qat

CONTEXT = SimpleNamespace()  # ptq needs nothing of it


def _parent(path: Path, **changes) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": True, **changes})
    )
    tokenizer = path / "tokenizer"
    tokenizer.mkdir(parents=True)
    write_tokenizer(tokenizer)
    save_model(model, path / "parent", tokenizer)
    return path / "parent"


def _run(stage: Ptq, parent: Path, out: Path) -> dict[str, float]:
    out.mkdir()
    return stage.run(parent, out, CONTEXT)


def _hashes(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())
    }


@pytest.mark.parametrize(
    ("grid", "scales"),
    [
        (grid, s)
        for grid in GridName
        for s in (Scales.round, Scales.search)
        if s == "round" or grid in SEARCHED
    ],
)
def test_result_loads_plainly_and_equals_its_codes(tmp_path, grid, scales):
    wide = {"hidden_size": 256, "intermediate_size": 512}
    parent = _parent(tmp_path, **(wide if BLOCK[grid] > 64 else {}))
    before = _hashes(parent)
    metrics = _run(Ptq(grid, scales), parent, tmp_path / "out")
    assert _hashes(parent) == before
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    loaded = load_quantized(tmp_path / "out")
    assert is_quantized(tmp_path / "out")
    assert set(loaded) == {
        key for key, value in state.items() if value.dim() == 2 and key != "lm_head.weight"
    }
    for key, made in loaded.items():
        assert (
            made.grid == grid
            and state[key].dtype == torch.float32
            and torch.equal(state[key], made.decode())
        )
    bits = GRIDS[grid].bits_per_weight
    assert metrics["tensors_quantized_count"] == 15
    assert bits < metrics["bits_per_weight"] < bits + 0.2
    assert (
        0
        < metrics["weight_mse_relative"]
        < {"q8_0": 1e-4, "q6_k": 1e-3, "q5_0": 5e-3}.get(
            grid, 3e-4 if grid.startswith("int8") else 0.025
        )
    )


def test_round_writes_llama_cpps_own_bytes(tmp_path):
    parent = _parent(tmp_path)
    original = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).state_dict()
    _run(Ptq(), parent, tmp_path / "out")
    for key, made in load_quantized(tmp_path / "out").items():
        expected = quants.quantize(original[key].numpy(), gguf.GGMLQuantizationType.Q4_0)
        assert torch.equal(GRIDS["q4_0"].pack(made.codes, made.scales), torch.from_numpy(expected))


def test_searched_scales_have_less_error_than_rounding(tmp_path):
    parent = _parent(tmp_path)
    plain = _run(Ptq(), parent, tmp_path / "a")["weight_mse_relative"]
    assert (
        _run(Ptq(scales=Scales.search), parent, tmp_path / "b")["weight_mse_relative"] < 0.9 * plain
    )


def test_same_input_gives_the_same_bytes(tmp_path):
    parent = _parent(tmp_path)
    for name in "ab":
        _run(Ptq(scales=Scales.search), parent, tmp_path / name)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")


def test_a_quantized_parent_is_refused(tmp_path):
    parent = _parent(tmp_path)
    _run(Ptq(), parent, tmp_path / "out")
    with pytest.raises(ValueError, match="out is quantized already"):
        _run(Ptq(), tmp_path / "out", tmp_path / "again")


def test_a_missing_parent_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        Ptq().run(tmp_path / "nowhere", tmp_path, CONTEXT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 80},
            "hidden_size is 80: grid q4_0 .* multiple of 32; the nearest legal value is 64",
        ),
        ({"intermediate_size": 120}, "intermediate_size is 120"),
        ({"head_dim": 10}, r"num_attention_heads \* head_dim is 40"),
    ],
)
def test_rows_that_do_not_divide_are_refused_by_shape_and_by_run(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Ptq().check_shape(
            {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, **changes}
        )
    parent = _parent(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        _run(Ptq(), parent, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_k_quants_need_rows_of_256():
    with pytest.raises(
        ValueError,
        match=(
            "hidden_size is 576: grid q6_k needs rows of a multiple of 256; the nearest legal value"
            " is 512"
        ),
    ):
        Ptq(GridName.q6_k).check_shape({"hidden_size": 576, "intermediate_size": 1536})


def test_search_is_refused_where_there_is_none():
    with pytest.raises(
        ValueError,
        match=(
            "scales is search: grid q4_k has none, only q4_0, iq4_nl, q5_0, q8_0, mxfp4, .*; use"
            " scales=round"
        ),
    ):
        Ptq(GridName.q4_k, Scales.search)


def test_check_shape_returns_the_config_unchanged():
    config = {"hidden_size": 64, "intermediate_size": 128}
    assert Ptq().check_shape(dict(config)) == config


def test_names_of_the_configuration_are_the_grids_that_exist():
    assert list(GridName) == list(GRIDS)
    assert {name: grid.row or grid.block or 1 for name, grid in GRIDS.items()} == BLOCK
    assert [name for name, grid in GRIDS.items() if grid.searches] == list(SEARCHED)


def test_scales_are_learned_by_qat_alone():
    with pytest.raises(
        ValueError,
        match=(
            "ptq.scales is learned: nothing is trained there; use round or search, or the qat stage"
        ),
    ):
        Ptq(GridName.q4_0, Scales.learned)
    assert Qat(scales=Scales.learned).scales is Scales.learned


def _calibrated(folder: Path, ids: torch.Tensor | None = None, precision="fp32") -> SimpleNamespace:
    """A context with calibration text, work folder and log for stages that need them."""
    (folder / "work").mkdir(exist_ok=True)
    ids = (
        torch.randint(0, 256, (12, 48), generator=torch.Generator().manual_seed(1))
        if ids is None
        else ids
    )
    lines: list[str] = []
    return SimpleNamespace(
        calibration=lambda n: ids[:n],
        work=folder / "work",
        label="ptq",
        log=lines.append,
        lines=lines,
        seed=0,
        precision=precision,
    )


def _errors(folder: Path, parent: Path, stage: Ptq, **context) -> float:
    """How far the stage moves log-probabilities on other text, relative to their spread."""
    folder.mkdir()
    (folder / "out").mkdir()
    stage.run(parent, folder / "out", _calibrated(folder, **context))
    ids = torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, after = (
            load_model(path)(ids).logits.log_softmax(-1) for path in (parent, folder / "out")
        )
    return ((after - before).square().mean() / before.var()).item()


@pytest.mark.parametrize(
    "options",
    [
        {"method": Method.gptq},
        {"method": Method.gptq, "scales": Scales.search, "balance": Balance.awq},
        {"balance": Balance.awq, "scales": Scales.search},
        {"balance": Balance.awq, "grid": GridName.q8_0},
        {"method": Method.gptq, "grid": GridName.q4_1},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_method_writes_a_checkpoint_equal_to_its_codes_and_the_same_bytes_again(
    tmp_path, options, tied
):
    parent = _parent(tmp_path, tie_word_embeddings=tied)
    for name in "ab":
        error = _errors(tmp_path / name, parent, Ptq(**options, calibration_sequences=8))
    assert _hashes(tmp_path / "a" / "out") == _hashes(tmp_path / "b" / "out")
    assert 0 < error < 0.1
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "out").state_dict()
    loaded = load_quantized(tmp_path / "a" / "out")
    assert set(loaded) == {
        key
        for key, value in state.items()
        if value.dim() == 2 and not (tied and key == "lm_head.weight")
    }
    assert all(torch.equal(state[key], made.decode()) for key, made in loaded.items())


def test_gptq_and_awq_move_the_model_less_than_rounding(tmp_path):
    parent = _parent(tmp_path)
    model = load_model(parent)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:3] = 12.0  # salient channels
    save_model(model, parent, parent)
    plain = _errors(tmp_path / "plain", parent, Ptq())
    assert (
        _errors(tmp_path / "gptq", parent, Ptq(method=Method.gptq, calibration_sequences=12))
        < 0.9 * plain
    )
    assert (
        _errors(
            tmp_path / "bf16",
            parent,
            Ptq(method=Method.gptq, calibration_sequences=12),
            precision="bf16",
        )
        < 0.9 * plain
    )
    assert (
        _errors(tmp_path / "awq", parent, Ptq(balance=Balance.awq, calibration_sequences=12))
        < 0.9 * plain
    )


@pytest.mark.parametrize(
    "options",
    [{"method": Method.gptq}, {"balance": Balance.awq, "scales": Scales.search}],
    ids=str,
)
def test_a_killed_run_finds_its_finished_blocks_and_ends_in_the_same_bytes(
    tmp_path, monkeypatch, options
):
    parent, stage = _parent(tmp_path), Ptq(**options, calibration_sequences=8)
    metrics = {}
    for name in ("whole", "killed"):
        (tmp_path / name / "out").mkdir(parents=True)
    metrics["whole"] = stage.run(
        parent, tmp_path / "whole" / "out", _calibrated(tmp_path / "whole")
    )
    real, done = blockwise.Blockwise._block, []

    def dies_in_the_second(self, index, *rest):
        if index == 1 and not done.count(1):
            done.append(index)
            raise KeyboardInterrupt
        done.append(index)
        real(self, index, *rest)

    monkeypatch.setattr(blockwise.Blockwise, "_block", dies_in_the_second)
    monkeypatch.setattr("compress.models.walk.LINE_SECONDS", -1)
    context = _calibrated(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        stage.run(parent, tmp_path / "killed" / "out", context)
    assert done == [0, 1] and not any((tmp_path / "killed" / "out").iterdir())
    assert sorted(file.name for file in context.work.iterdir()) == [
        "block-0000.safetensors",
        "embeddings.safetensors",
    ]
    metrics["killed"] = stage.run(parent, tmp_path / "killed" / "out", context)
    assert done == [0, 1, 1]
    assert (
        _hashes(tmp_path / "whole" / "out") == _hashes(tmp_path / "killed" / "out")
        and metrics["whole"] == metrics["killed"]
    )
    assert any("block 1/2 quantized" in line and line.endswith("s left") for line in context.lines)
    assert context.lines[-1] == "ptq: block 2/2 quantized  0 s left"


def test_nan_on_the_calibration_text_is_named(tmp_path, monkeypatch):
    parent = _parent(tmp_path)
    model = load_model(parent)
    model.model.layers[1].input_layernorm.weight.data[:] = 3e38  # finite, unlike what comes of it
    save_model(model, parent, parent)
    monkeypatch.setattr(
        "compress.models.checkpoint.check_forward", lambda *_: None
    )  # which would find it on other text
    with pytest.raises(
        ValueError,
        match=(
            "the output of block 1 on the calibration text holds NaN or infinity: repair the parent"
        ),
    ):
        _errors(tmp_path / "a", parent, Ptq(method=Method.gptq, calibration_sequences=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"damping": 0.1},
            "ptq.damping is 0.1: nothing uses it with method=nearest, balance=none;"
            " leave it at 0.01",
        ),
        ({"method": Method.gptq, "damping": 1.0}, "ptq.damping is 1.0: allowed is between 0 and 1"),
        ({"calibration_sequences": 8}, "ptq.calibration_sequences is 8: nothing uses it"),
        (
            {"method": Method.gptq, "calibration_sequences": 0},
            "ptq.calibration_sequences is 0: allowed is 1 or more",
        ),
    ],
)
def test_options_that_could_not_act_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Ptq(**options)


def test_layers_of_other_names_are_refused_where_they_are_needed():
    other = {"hidden_size": 64, "architectures": ["BloomForCausalLM"]}
    assert Ptq().check_shape(other) == other
    for stage in (Ptq(method=Method.gptq), Ptq(balance=Balance.awq)):
        with pytest.raises(
            ValueError,
            match="architecture BloomForCausalLM can't be rounded by calibration text",
        ):
            stage.check_shape(other)
