"""The `prune_depth` stage on tiny random models."""

from __future__ import annotations

import json

import pruning_parents as parents
import pytest
import torch
from safetensors.torch import load_file

from compress.models.checkpoint import load_model, read_config, save_model
from compress.stages.prune_depth import PruneDepth


@pytest.mark.parametrize("kind", parents.KINDS)
def test_blocks_go_and_the_rest_is_untouched(tmp_path, kind):
    parent = parents.make(tmp_path, kind)
    metrics = parents.run(PruneDepth(blocks=2, calibration_sequences=2), parent, tmp_path / "out")
    removed = json.loads((tmp_path / "out" / "pruning.json").read_text())["blocks_removed_in_order"]
    gone = [entry["block"] for entry in removed]
    assert len(set(gone)) == 2 and set(gone) <= {1, 2}
    old, new = (
        load_file(parent / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    for new_index, old_index in enumerate(i for i in range(4) if i not in gone):
        for name in (n for n in new if n.startswith(f"model.layers.{new_index}.")):
            assert torch.equal(new[name], old[name.replace(f".{new_index}.", f".{old_index}.", 1)])
    assert metrics["blocks_removed_count"] == 2 and 0 < metrics["params_removed_fraction"] < 1
    assert metrics["influence_removed_sum"] == pytest.approx(
        sum(entry["influence"] for entry in removed)
    )


def test_a_block_that_does_nothing_goes_first_and_layer_types_follow(tmp_path):
    parent = parents.make(tmp_path, "qwen3")
    model = load_model(parent)
    with torch.no_grad():
        for matrix in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            matrix.weight.zero_()
    model.config.layer_types = [
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    model.config.sliding_window, model.config.use_sliding_window = 8, True
    idle = tmp_path / "idle"
    save_model(model, idle, parent)
    metrics = parents.run(PruneDepth(blocks=1, calibration_sequences=2), idle, tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "pruning.json").read_text())["blocks_removed_in_order"][0][
            "block"
        ]
        == 2
    )
    assert metrics["influence_removed_sum"] == pytest.approx(0, abs=1e-5)
    config = read_config(tmp_path / "out")
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "out")(ids).logits, load_model(idle)(ids).logits
        )


def test_the_kept_ends_can_be_zero(tmp_path):
    parent = parents.make(tmp_path)
    parents.run(
        PruneDepth(blocks=3, keep_first=0, keep_last=0, calibration_sequences=2),
        parent,
        tmp_path / "out",
    )
    assert read_config(tmp_path / "out")["num_hidden_layers"] == 1


def test_the_plan_is_the_result_and_repeating_gives_the_same_bytes(tmp_path):
    parent, stage = parents.make(tmp_path), PruneDepth(blocks=2, calibration_sequences=2)
    for name in ("a", "b"):
        parents.run(stage, parent, tmp_path / name)
    assert parents.files(tmp_path / "a") == parents.files(tmp_path / "b")
    assert stage.check_shape(read_config(parent)) == read_config(tmp_path / "a")


def test_progress_and_time_left_are_shown(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(parents.CONTEXT, "log", lines.append)
    parents.run(
        PruneDepth(blocks=2, calibration_sequences=6), parents.make(tmp_path), tmp_path / "out"
    )
    assert lines[-1].startswith("test: block ") and "weighed, " in lines[-1]
    assert lines[-1].endswith("  0 s left")


@pytest.mark.parametrize(
    "key, value", [("blocks", 0), ("calibration_sequences", 0), ("keep_first", -1)]
)
def test_impossible_values_are_refused(key, value):
    with pytest.raises(ValueError, match=f"prune_depth.{key} is {value}: allowed is [01] or more"):
        PruneDepth(**{key: value})


def test_more_blocks_than_there_are_is_refused_naming_the_directory(tmp_path):
    parent = parents.make(tmp_path)
    (tmp_path / "out").mkdir()
    message = f"{parent}: prune_depth.blocks is 3 and the model has 4 blocks: allowed is at most 2"
    with pytest.raises(ValueError, match=message):
        PruneDepth(blocks=3).run(parent, tmp_path / "out", parents.CONTEXT)
    with pytest.raises(
        ValueError, match="blocks is 4 and the model has 4 blocks: allowed is at most 3"
    ):
        PruneDepth(blocks=4, keep_first=0, keep_last=0).check_shape(read_config(parent))
    assert not list((tmp_path / "out").iterdir())


def test_a_quantized_parent_is_refused(tmp_path):
    parent = parents.make(tmp_path)
    (parent / "quant.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=f"{parent} is quantized .*: prune an unquantized checkpoint"
    ):
        PruneDepth(blocks=1).run(parent, tmp_path, parents.CONTEXT)
