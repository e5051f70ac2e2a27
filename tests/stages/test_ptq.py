"""The `ptq` stage on a tiny random model."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from gguf import quants
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compress.checkpoint import save_model
from compress.quant.codes import is_quantized, load_quantized
from compress.quant.grids import GRIDS
from compress.stages.ptq import BLOCK, SEARCHED, GridName, Ptq, Scales
from compress.stages.qat import Qat

CONTEXT = SimpleNamespace()  # ptq needs nothing of it


def _parent(path: Path, **changes) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": True, **changes}))
    tokenizer = path / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    save_model(model, path / "parent", tokenizer)
    return path / "parent"


def _run(stage: Ptq, parent: Path, out: Path) -> dict[str, float]:
    out.mkdir()
    return stage.run(parent, out, CONTEXT)


def _hashes(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@pytest.mark.parametrize(
    ("grid", "scales"), [(grid, s) for grid in GridName for s in (Scales.round, Scales.search) if s == "round" or grid in SEARCHED]
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
    assert set(loaded) == {key for key, value in state.items() if value.dim() == 2 and key != "lm_head.weight"}
    for key, made in loaded.items():
        assert made.grid == grid and state[key].dtype == torch.float32 and torch.equal(state[key], made.decode())
    bits = GRIDS[grid].bits_per_weight
    assert metrics["tensors_quantized_count"] == 15
    assert bits < metrics["bits_per_weight"] < bits + 0.2
    assert 0 < metrics["weight_mse_relative"] < {"q8_0": 1e-4, "q6_k": 1e-3, "q5_0": 5e-3}.get(grid, 3e-4 if grid.startswith("int8") else 0.025)


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
    assert _run(Ptq(scales=Scales.search), parent, tmp_path / "b")["weight_mse_relative"] < 0.9 * plain


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


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_size": 80}, "hidden_size is 80: grid q4_0 .* multiple of 32; the nearest legal value is 64"),
    ({"intermediate_size": 120}, "intermediate_size is 120"),
    ({"head_dim": 10}, r"num_attention_heads \* head_dim is 40"),
])  # fmt: skip
def test_rows_that_do_not_divide_are_refused_by_shape_and_by_run(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Ptq().check_shape({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, **changes})
    parent = _parent(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        _run(Ptq(), parent, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_k_quants_need_rows_of_256():
    with pytest.raises(ValueError, match="hidden_size is 576: grid q6_k needs rows of a multiple of 256; the nearest legal value is 512"):
        Ptq(GridName.q6_k).check_shape({"hidden_size": 576, "intermediate_size": 1536})


def test_search_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="scales is search: grid q4_k has none, only q4_0, q5_0, q8_0, int4_g32, .*; use scales=round"):
        Ptq(GridName.q4_k, Scales.search)


def test_check_shape_returns_the_config_unchanged():
    config = {"hidden_size": 64, "intermediate_size": 128}
    assert Ptq().check_shape(dict(config)) == config


@pytest.mark.parametrize(("field", "value"), [("grid", "q9_0"), ("scales", "best")])
def test_unknown_choices_are_refused_with_the_allowed_ones(field, value):
    with pytest.raises(ValueError, match=f"ptq.{field} is '{value}': choose one of "):
        dataclasses.replace(Ptq(), **{field: value})


def test_names_of_the_configuration_are_the_grids_that_exist():
    assert list(GridName) == list(GRIDS)
    assert {name: grid.block or 1 for name, grid in GRIDS.items()} == BLOCK
    assert [name for name, grid in GRIDS.items() if grid.searches] == list(SEARCHED)


def test_scales_are_learned_by_qat_alone():
    with pytest.raises(ValueError, match="ptq.scales is learned: nothing is trained there; use round or search, or the qat stage"):
        Ptq(GridName.q4_0, Scales.learned)
    assert Qat(scales=Scales.learned).scales is Scales.learned
