"""The `prune_width` stage on tiny random models."""

from __future__ import annotations

import json

import pruning_parents as parents
import pytest
import torch

from compress.models.checkpoint import load_model, read_config, save_model
from compress.stages.prune_width import PruneWidth


@pytest.mark.parametrize("kind", parents.KINDS)
def test_every_ffn_gets_the_same_narrower_width(tmp_path, kind):
    parent = parents.make(tmp_path, kind)
    metrics = parents.run(PruneWidth(ffn=140, calibration_sequences=8), parent, tmp_path / "out")
    assert read_config(tmp_path / "out") == {**read_config(parent), "intermediate_size": 128}
    old, new = load_model(parent), load_model(tmp_path / "out")
    for before, after in zip(old.model.layers, new.model.layers, strict=True):
        kept_KH, whole_FH = after.mlp.up_proj.weight, before.mlp.up_proj.weight
        index_K = (kept_KH[:, None] == whole_FH).all(-1).int().argmax(-1)
        assert torch.equal(whole_FH[index_K], kept_KH) and (index_K.diff() > 0).all()
        assert torch.equal(before.mlp.gate_proj.weight[index_K], after.mlp.gate_proj.weight)
        assert after.mlp.down_proj.weight.shape == (64, 128)
        assert torch.equal(before.self_attn.k_proj.weight, after.self_attn.k_proj.weight)
    assert metrics["ffn_channels_removed_count"] == 64
    assert 0 < metrics["down_error_mean_fraction"] <= metrics["down_error_max_fraction"] < 1


def test_channels_that_do_nothing_are_free(tmp_path):
    """Two thirds of the channels are dead: the third that is left says the same."""
    model = load_model(parents.make(tmp_path))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[torch.arange(192) % 3 != 1] = 0
    save_model(model, tmp_path / "redundant", tmp_path / "parent")
    stage = PruneWidth(ffn=64, calibration_sequences=32, damping=1e-6)
    metrics = parents.run(stage, tmp_path / "redundant", tmp_path / "out")
    assert metrics["down_error_max_fraction"] < 1e-6
    ids = torch.arange(24)[None]
    with torch.no_grad():
        here, there = (
            load_model(tmp_path / "out")(ids).logits,
            load_model(tmp_path / "redundant")(ids).logits,
        )
    assert (
        here - there
    ).abs().max() < 0.02 * there.abs().max()  # bf16 rounding of the fitted weights


def test_fitting_beats_the_plain_cut_and_damping_acts(tmp_path):
    parent = parents.make(tmp_path)
    errors = [
        parents.run(PruneWidth(ffn=64, damping=d), parent, tmp_path / str(d))[
            "down_error_mean_fraction"
        ]
        for d in (1e-4, 0.99)
    ]
    assert errors[0] < errors[1] and parents.files(tmp_path / "0.0001") != parents.files(
        tmp_path / "0.99"
    )


def test_a_block_is_fitted_to_what_the_cut_blocks_before_it_send(tmp_path):
    parent = parents.make(tmp_path)
    stage = PruneWidth(ffn=64, calibration_sequences=16, damping=1e-6)
    parents.run(stage, parent, tmp_path / "out")
    dense, cut = load_model(parent).double(), load_model(tmp_path / "out").double()
    index_K = (
        (
            cut.model.layers[3].mlp.up_proj.weight[:, None]
            == dense.model.layers[3].mlp.up_proj.weight
        )
        .all(-1)
        .int()
        .argmax(-1)
    )

    # Inputs of the last down projection: behind cut blocks, and in the model as it was.
    errors, seen = {}, []
    mixed = load_model(tmp_path / "out").double()
    mixed.model.layers[3] = dense.model.layers[3]
    for name, model in (("cut", mixed), ("dense", dense)):
        with torch.no_grad():
            hook = model.model.layers[3].mlp.down_proj.register_forward_pre_hook(
                lambda _, args: seen.append(args[0].flatten(0, -2))
            )
            model(parents.CONTEXT.calibration(16))
            hook.remove()
            x_NF, weight_HF = seen.pop(), dense.model.layers[3].mlp.down_proj.weight
            fitted_KH = torch.linalg.lstsq(x_NF[:, index_K], x_NF @ weight_HF.T).solution
            gap_HK = cut.model.layers[3].mlp.down_proj.weight - fitted_KH.T
            errors[name] = (gap_HK.norm() / fitted_KH.norm()).item()
    assert errors["cut"] < 0.005 < errors["dense"]  # the checkpoint is bf16


def test_the_plan_is_the_result_and_repeating_gives_the_same_bytes(tmp_path):
    parent, stage = (
        parents.make(tmp_path),
        PruneWidth(ffn=100, multiple=32, calibration_sequences=8),
    )
    for name in ("a", "b"):
        parents.run(stage, parent, tmp_path / name)
    assert parents.files(tmp_path / "a") == parents.files(tmp_path / "b")
    assert stage.check_shape(read_config(parent)) == read_config(tmp_path / "a")
    assert read_config(tmp_path / "a")["intermediate_size"] == 96


def test_progress_and_time_left_are_shown(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(parents.CONTEXT, "log", lines.append)
    parents.run(
        PruneWidth(ffn=64, calibration_sequences=8), parents.make(tmp_path), tmp_path / "out"
    )
    assert lines[-1].startswith("test: block ") and "cut  " in lines[-1]
    assert lines[-1].endswith("  0 s left")


@pytest.mark.parametrize(
    "key, value",
    [
        ("ffn", 0),
        ("multiple", 0),
        ("calibration_sequences", 0),
        ("damping", 0.0),
        ("damping", "on"),
    ],
)
def test_impossible_values_are_refused(key, value):
    with pytest.raises(ValueError, match=f"prune_width.{key} is {value}: allowed is"):
        PruneWidth(**{key: value})


def test_without_a_damping_it_is_chosen_on_held_out_rows(tmp_path):
    parent = parents.make(tmp_path)
    metrics = parents.run(PruneWidth(ffn=64), parent, tmp_path / "out")
    assert 0.001 <= metrics["damping_mean_relative"] <= 1.0


def test_too_little_text_is_refused_saying_how_much_is_needed(tmp_path):
    parent = parents.make(tmp_path)
    for damping, needed in ((0.01, 6), ("auto", 8)):
        stage = PruneWidth(ffn=64, calibration_sequences=5, damping=damping)
        message = f"5 sequences of 32 tokens can't weigh 192 columns: needed are {needed} seq"
        with pytest.raises(ValueError, match=message):
            stage.run(parent, tmp_path / "out", parents.CONTEXT)


@pytest.mark.parametrize("ffn", [1000, 192, 180])
def test_a_width_that_cuts_nothing_is_refused_with_those_that_do(tmp_path, ffn):
    parent = parents.make(tmp_path)
    message = (
        f"{parent}: prune_width.ffn is {ffn} .* the model has 192 FFN channels, so that nothing"
        " would be cut: allowed are 64 to 128 in steps of 64, or a smaller multiple"
    )
    with pytest.raises(ValueError, match=message):
        PruneWidth(ffn=ffn).run(parent, tmp_path, parents.CONTEXT)

    # The largest that is named cuts, and where none does that is said.
    config = read_config(parent)
    assert PruneWidth(ffn=128).check_shape(config)["intermediate_size"] == 128
    with pytest.raises(ValueError, match="no multiple of 256 does; give a smaller multiple"):
        PruneWidth(ffn=100, multiple=256).check_shape(config)


def test_other_architectures_and_quantized_parents_are_refused(tmp_path):
    parent = parents.make(tmp_path)
    config = read_config(parent)
    (parent / "config.json").write_text(
        json.dumps({**config, "architectures": ["BloomForCausalLM"]})
    )
    with pytest.raises(
        ValueError, match=f"{parent}: architecture BloomForCausalLM can't be narrowed"
    ):
        PruneWidth(ffn=64).run(parent, tmp_path, parents.CONTEXT)
    (parent / "quant.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{parent} is quantized"):
        PruneWidth(ffn=64).run(parent, tmp_path, parents.CONTEXT)
