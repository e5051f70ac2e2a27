"""The `prune_depth` stage on tiny random models."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pruning_parents as parents
import pytest
import torch
from safetensors.torch import load_file

from compress.models.blocks import row_of
from compress.models.checkpoint import load_model, read_config, save_model
from compress.models.walk import Walk
from compress.prune.folding import fold_dropped
from compress.stages.prune_depth import PruneDepth


@pytest.mark.parametrize("kind", parents.KINDS)
def test_blocks_go_and_the_rest_is_untouched(tmp_path, kind):
    parent = parents.make(tmp_path, kind)
    stage = PruneDepth(blocks=2, fold=False, calibration_sequences=2)
    metrics = parents.run(stage, parent, tmp_path / "out")
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
    stage = PruneDepth(blocks=1, calibration_sequences=2, fold_sequences=8)
    metrics = parents.run(stage, idle, tmp_path / "out")
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
    weighed, folded = [line for line in lines if line.endswith("  0 s left")]
    assert weighed.startswith("test: block ") and "weighed, " in weighed
    assert folded.startswith("test: block 4/4 folded")
    assert lines[-1].endswith("  0 s left")


@pytest.mark.parametrize(
    "key, value",
    [("blocks", 0), ("calibration_sequences", 0), ("fold_sequences", 7), ("keep_first", -1)],
)
def test_impossible_values_are_refused(key, value):
    with pytest.raises(ValueError, match=f"prune_depth.{key} is {value}: allowed is [018] or more"):
        PruneDepth(**{key: value})


def test_rows_that_nothing_uses_are_refused():
    with pytest.raises(ValueError, match="fold_sequences is 16: nothing uses it with fold=false"):
        PruneDepth(fold=False, fold_sequences=16)


def test_a_fold_is_the_least_squares_fit_to_what_leaves_the_dropped_blocks(tmp_path):
    """Two gaps: the second is fitted on what the first sends, to what the parent would."""
    parent = parents.make(tmp_path, "llama_bias")
    model = load_model(parent)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.bias.normal_(0, 0.1)
            layer.self_attn.o_proj.weight.mul_(5)
    dense = copy.deepcopy(model)
    ids_BL = parents.CONTEXT.calibration(24)
    walk = Walk(model, ids_BL)
    folds = fold_dropped(walk, row_of(model), {1, 3})
    assert [(fold.block, fold.dropped) for fold in folds] == [(0, [1]), (2, [3])]

    # Streams of parent and student as transformers has them, block by block.
    rotary = model.model.rotary_emb(dense.model.embed_tokens(ids_BL), torch.arange(32)[None])

    def passed(h_BLH, whose, *blocks: int) -> torch.Tensor:
        for index in blocks:
            h_BLH = whose.model.layers[index](h_BLH, position_embeddings=rotary)
        return h_BLH

    entering_BLH = parent_BLH = dense.model.embed_tokens(ids_BL)
    for fold in folds:
        old, new = (m.model.layers[fold.block].mlp.down_proj for m in (dense, model))
        seen = []
        hook = old.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            leaving_BLH = passed(entering_BLH, dense, fold.block)
            hook.remove()
            parent_BLH = passed(parent_BLH, dense, fold.block, *fold.dropped)
            entering_BLH = passed(entering_BLH, model, fold.block)
            target_BLH = parent_BLH - (leaving_BLH - old(seen[0])) - old.bias
        x_NF, y_NH = (t.flatten(0, 1).double() for t in (seen[0], target_BLH))
        pull_FF = (fold.damping * x_NF.square().sum(0).mean()).sqrt() * torch.eye(192).double()
        rows_NH = torch.cat([y_NH, pull_FF @ old.weight.double().T])
        expected_FH = torch.linalg.lstsq(torch.cat([x_NF, pull_FF]), rows_NH).solution
        torch.testing.assert_close(new.weight.double(), expected_FH.T, rtol=1e-3, atol=1e-5)
        assert fold.error < fold.error_before
    torch.testing.assert_close(torch.cat(walk.states), entering_BLH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in parents.KINDS if kind != "gemma3"])
def test_folded_blocks_are_missed_less(tmp_path, kind):
    parent = parents.make(tmp_path, kind)
    model = load_model(parent)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(10)
    save_model(model, tmp_path / "loud", parent)
    ids_BL = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))
    errors = []
    for fold in (True, False):
        stage = PruneDepth(blocks=2, fold=fold, calibration_sequences=2)
        metrics = parents.run(stage, tmp_path / "loud", tmp_path / str(fold))
        with torch.no_grad():
            here, there = (
                load_model(tmp_path / name)(ids_BL).logits for name in (str(fold), "loud")
            )
        errors.append((here - there).square().mean().item())
        assert ("fold_error_mean_fraction" in metrics) == fold
    assert errors[0] < errors[1]
    folds = json.loads((tmp_path / "True" / "pruning.json").read_text())["folds"]
    assert folds[0]["error"] < folds[0]["error_before"]


def test_blocks_at_the_front_are_dropped_unfolded_and_that_is_said(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(parents.CONTEXT, "log", lines.append)
    stage = PruneDepth(blocks=3, keep_first=0, keep_last=1, calibration_sequences=2)
    parents.run(stage, parents.make(tmp_path), tmp_path / "out")
    assert "test: blocks 0 to 2 are dropped with none in front of them to fold them into" in lines
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["folds"] == []


def test_a_family_with_a_norm_behind_the_mlp_is_refused_with_folding(tmp_path):
    parent = parents.make(tmp_path, "gemma3")
    with pytest.raises(ValueError, match="Gemma3ForCausalLM .* normalize .*; set fold=false"):
        PruneDepth(blocks=1).run(parent, tmp_path, parents.CONTEXT)


def test_too_little_text_for_a_fold_is_refused_saying_how_much_is_needed(tmp_path):
    parent = parents.make(tmp_path)
    short = SimpleNamespace(**vars(parents.CONTEXT))
    short.calibration = lambda n: torch.zeros(5, 32, dtype=torch.long)
    message = "fold_sequences: 5 sequences of 32 tokens can't weigh 192 columns: needed are 8"
    with pytest.raises(ValueError, match=message):
        PruneDepth(blocks=1).run(parent, tmp_path, short)


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
