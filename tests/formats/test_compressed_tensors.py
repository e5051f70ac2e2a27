"""A compressed-tensors directory opens with plain transformers and is its checkpoint to the last
bit, on every grid that it can hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gguf import quantized, tiny_checkpoint
from transformers import AutoModelForCausalLM

from compress.formats import parse
from compress.formats.compressed_tensors import ReloadedDirectory, export_compressed_tensors
from compress.formats.gguf import export_gguf
from compress.formats.torch_runtime import head as checkpoint_head
from compress.models.checkpoint import load_model
from compress.models.tokenizer import TOKENIZER_FILES
from compress.quant.codes import load_quantized
from compress.quant.settings import GridName
from compress.score.size import size
from compress.stages.ptq import Ptq

GRIDS = parse("compressed_tensors")[2].grids
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def parent(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("parent"), request.param, **SHAPE)


def student_on(parent: Path, folder: Path, grid: str) -> Path:
    (folder / "hf").mkdir()
    Ptq(grid=GridName(grid)).run(parent, folder / "hf", None)
    return folder / "hf"


@pytest.mark.parametrize("grid", GRIDS)
def test_plain_transformers_reads_the_checkpoint_bit_for_bit(parent, tmp_path, grid):
    student = student_on(parent, tmp_path, grid)
    export_compressed_tensors(student, tmp_path / "out")
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load_model(student)
    assert theirs.dtype == torch.float32
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(theirs.eval()(ids).logits, ours(ids).logits)
    assert torch.equal(
        checkpoint_head(tmp_path / "out").weight_VH, checkpoint_head(student).weight_VH
    )
    params = size(tmp_path / "out")["params"]
    assert params == size(student)["params"] == ours.num_parameters()
    assert size(tmp_path / "out")["size_bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "out").iterdir()
    )


def test_scales_that_no_encoder_would_choose_arrive_with_their_sign(parent, tmp_path):
    for grid in ("q4_0", "q8_0"):
        student = quantized(parent, tmp_path / grid, grid)
        assert any((q.scales < 0).any() for q in load_quantized(student).values())
        export_compressed_tensors(student, tmp_path / f"{grid}-out")
        ours = load_model(student).state_dict()
        reloaded = ReloadedDirectory(tmp_path / f"{grid}-out", 1).tensors()
        assert all(torch.equal(reloaded[name], ours[name]) for name in reloaded)
        assert set(ours) - set(reloaded) <= {"lm_head.weight"}


def test_the_directory_is_vllms_layout_with_the_tokenizer_byte_for_byte(parent, tmp_path):
    student, out = student_on(parent, tmp_path, "int4_asym_g64"), tmp_path / "out"
    export_compressed_tensors(student, out)
    layout = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (layout["quant_method"], layout["format"], layout["quantization_status"]) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    group = layout["config_groups"]["group_0"]
    assert group["targets"] == ["Linear", "Embedding"] and group["input_activations"] is None
    weights = {
        key: group["weights"][key]
        for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
    }
    assert weights == {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 64,
        "dynamic": False,
    }
    stem, tensors = "model.layers.0.mlp.down_proj", load_file(out / "model.safetensors")
    shapes = {
        part: tuple(tensors[f"{stem}.weight_{part}"].shape)
        for part in ("packed", "scale", "zero_point", "shape")
    }
    assert shapes == {"packed": (128, 32), "scale": (128, 4), "zero_point": (16, 4), "shape": (2,)}
    copied = [
        name for name in (*TOKENIZER_FILES, "generation_config.json") if (student / name).is_file()
    ]
    assert "tokenizer.json" in copied and all(
        (out / name).read_bytes() == (student / name).read_bytes() for name in copied
    )
    assert not (out / "quant.safetensors").exists()


def test_codes_fit_in_as_many_bits_as_the_grid_says(tmp_path):
    wide = tiny_checkpoint(
        tmp_path / "wide", hidden_size=512, intermediate_size=1024, num_hidden_layers=2
    )
    for grid, bits in (("int4_g32", 5.0), ("int4_asym_g128", 4.28125), ("int8", 8.0)):
        (tmp_path / grid).mkdir()
        export_compressed_tensors(student_on(wide, tmp_path / grid, grid), tmp_path / grid / "out")
        tensors = load_file(tmp_path / grid / "out" / "model.safetensors")
        held = sum(
            t.nbytes
            for name, t in tensors.items()
            if name.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_zero_point")
        )
        count = sum(q.codes.numel() for q in load_quantized(tmp_path / grid / "hf").values())
        assert 8 * held / count == pytest.approx(bits, abs=0.15)


def test_what_it_cannot_hold_is_refused_by_name(parent, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"compressed_tensors writes codes, and .* has none; ship a ptq or qat slot on q4_0, ",
    ):
        export_compressed_tensors(parent, tmp_path / "out")
    student = student_on(parent, tmp_path, "q4_1")
    with pytest.raises(
        ValueError,
        match=(
            r"which is on the grid q4_1, and holds only q4_0, q8_0, int4_g32, .*; export it as"
            r" gguf:Q4_1"
        ),
    ):
        export_compressed_tensors(student, tmp_path / "out")
    weights = load_file(student / "model.safetensors")
    (tmp_path / "int4").mkdir()
    other = student_on(parent, tmp_path / "int4", "int4_g64")
    with pytest.raises(
        ValueError,
        match=(
            "gguf:Q4_0 would re-round .* on the grid int4_g64, and holds only q4_0; export it as"
            " compressed_tensors"
        ),
    ):
        export_gguf(other, tmp_path / "m.gguf", "Q4_0")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model.safetensors differs from what quant.safetensors decodes to"
    ):
        export_compressed_tensors(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
