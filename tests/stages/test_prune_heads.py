"""The `prune_heads` stage on tiny random models."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pruning_parents as parents
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.models.checkpoint import load_model, read_config, save_model
from compress.stages.prune_heads import PruneHeads

STAGE = PruneHeads(kv_groups=1, calibration_sequences=8)


def _indices(kept_RC: torch.Tensor, parent_RC: torch.Tensor) -> torch.Tensor:
    """Which rows of the parent were kept, all of them as they were."""
    index_R = (kept_RC[:, None] == parent_RC).all(-1).int().argmax(-1)
    assert torch.equal(parent_RC[index_R], kept_RC) and (index_R.diff() > 0).all()
    return index_R


@pytest.mark.parametrize("kind", parents.KINDS)
@pytest.mark.parametrize(
    "options, kv_heads, share",
    [({"kv_groups": 1}, 1, 2), ({"heads_per_group": 1}, 2, 1)],
    ids=["kv_groups", "heads_per_group"],
)
def test_every_attention_keeps_as_many_heads(tmp_path, kind, options, kv_heads, share):
    """Four query heads of 16 on two key-value heads."""
    parent = parents.make(tmp_path, kind)
    stage = PruneHeads(**options, calibration_sequences=8)
    metrics = parents.run(stage, parent, tmp_path / "out")
    heads = {"num_attention_heads": kv_heads * share, "num_key_value_heads": kv_heads}
    assert read_config(tmp_path / "out") == {**read_config(parent), **heads, "head_dim": 16}

    old, new = load_model(parent), load_model(tmp_path / "out")
    for before, after in zip(old.model.layers, new.model.layers, strict=True):
        kept, whole = after.self_attn, before.self_attn
        query_heads = _indices(kept.q_proj.weight, whole.q_proj.weight)[::16] // 16
        groups = _indices(kept.k_proj.weight, whole.k_proj.weight)[::16] // 16
        assert torch.equal(groups, _indices(kept.v_proj.weight, whole.v_proj.weight)[::16] // 16)
        assert (query_heads // 2).tolist() == [g for g in groups.tolist() for _ in range(share)]
        assert kept.o_proj.weight.shape == (64, 16 * kv_heads * share)
        assert torch.equal(before.mlp.up_proj.weight, after.mlp.up_proj.weight)
    assert metrics["kv_heads_removed_count"] == 2 - kv_heads
    assert metrics["query_heads_removed_count"] == 4 - kv_heads * share
    assert 0 < metrics["attention_error_mean_fraction"] <= metrics["attention_error_max_fraction"]
    assert metrics["attention_error_max_fraction"] < 1


def test_biases_follow_their_rows_and_norms_of_heads_stay(tmp_path):
    """Qwen2 has biases in q, k and v, Qwen3 a norm in each head."""
    parent = parents.make(tmp_path / "bias", "qwen2")
    model = load_model(parent)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in "qkv":
                bias = getattr(layer.self_attn, f"{name}_proj").bias
                bias.copy_(torch.arange(len(bias)) / 64)
    save_model(model, tmp_path / "biased", parent)
    parents.run(STAGE, tmp_path / "biased", tmp_path / "out")
    for layer, before in zip(
        load_model(tmp_path / "out").model.layers, model.model.layers, strict=True
    ):
        for name, rows in (("q", 32), ("k", 16), ("v", 16)):
            kept = getattr(layer.self_attn, f"{name}_proj")
            index_R = _indices(
                kept.weight, getattr(before.self_attn, f"{name}_proj").weight.bfloat16()
            )
            assert len(index_R) == rows and torch.equal(kept.bias * 64, index_R.float())

    parent = parents.make(tmp_path / "norm", "qwen3")
    parents.run(STAGE, parent, tmp_path / "normed")
    for name in ("q_norm", "k_norm"):
        path = f"model.layers.1.self_attn.{name}.weight"
        assert torch.equal(
            load_model(parent).get_parameter(path),
            load_model(tmp_path / "normed").get_parameter(path),
        )


def test_a_group_that_says_nothing_goes_and_nothing_is_lost(tmp_path):
    model = load_model(parents.make(tmp_path))
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.v_proj.weight[16 * (index % 2) :][:16] = 0
    save_model(model, tmp_path / "idle", tmp_path / "parent")
    metrics = parents.run(replace(STAGE, damping=1e-6), tmp_path / "idle", tmp_path / "out")
    assert metrics["attention_error_max_fraction"] < 1e-9
    ids = torch.arange(24)[None]
    with torch.no_grad():
        here, there = (load_model(tmp_path / name)(ids).logits for name in ("out", "idle"))
    assert (here - there).abs().max() < 0.02 * there.abs().max()


def test_the_width_of_a_head_is_said_where_the_family_takes_it_from_the_number_of_heads(tmp_path):
    """64 wide with four heads are 16 a head; with two heads they would be 32."""
    sizes = {key: value for key, value in parents.SIZES.items() if key != "head_dim"}
    torch.manual_seed(0)
    parent = parents.make(tmp_path)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()
    save_model(model, tmp_path / "silent", parent)
    config = read_config(tmp_path / "silent")
    for silent in (config, {key: value for key, value in config.items() if key != "head_dim"}):
        assert STAGE.check_shape(silent)["head_dim"] == 16
    parents.run(STAGE, tmp_path / "silent", tmp_path / "out")
    assert read_config(tmp_path / "out")["head_dim"] == 16


def test_the_damping_is_one_of_those_tried_and_a_given_one_acts(tmp_path):
    parent = parents.make(tmp_path)
    metrics = parents.run(replace(STAGE, calibration_sequences=16), parent, tmp_path / "auto")
    assert 0.001 <= metrics["damping_mean_relative"] <= 1.0
    errors = [
        parents.run(replace(STAGE, damping=damping), parent, tmp_path / str(damping))
        for damping in (1e-4, 0.99)
    ]
    assert [metrics["damping_mean_relative"] for metrics in errors] == [1e-4, 0.99]
    assert errors[0]["attention_error_mean_fraction"] < errors[1]["attention_error_mean_fraction"]


def test_the_plan_is_the_result_and_repeating_gives_the_same_bytes(tmp_path):
    parent = parents.make(tmp_path)
    for name in ("a", "b"):
        parents.run(STAGE, parent, tmp_path / name)
    assert parents.files(tmp_path / "a") == parents.files(tmp_path / "b")
    assert STAGE.check_shape(read_config(parent)) == read_config(tmp_path / "a")


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("kv_groups", 0, "which leaves no head: allowed is 1 or more, or null"),
        ("heads_per_group", -1, "which leaves no head"),
        ("calibration_sequences", 0, "allowed is 1"),
        ("damping", 0.0, "allowed is auto, or between 0 and 1"),
        ("damping", "best", "allowed is auto"),
    ],
)
def test_impossible_values_are_refused(key, value, allowed):
    with pytest.raises(ValueError, match=rf"prune_heads.{key} is {value}.* ?{allowed}"):
        PruneHeads(**{key: value})


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "cuts nothing: the model has 2 key-value heads with 2 query heads each"),
        ({"kv_groups": 2, "heads_per_group": 2}, "cuts nothing"),
        ({"kv_groups": 3}, "prune_heads.kv_groups is 3 and the model has 2"),
        ({"heads_per_group": 4}, "prune_heads.heads_per_group is 4 and the model has 2"),
    ],
)
def test_what_cuts_nothing_or_more_than_there_is_is_refused_naming_the_directory(
    tmp_path, options, message
):
    parent = parents.make(tmp_path)
    with pytest.raises(ValueError, match=f"{parent}: .*{message}"):
        PruneHeads(**options).run(parent, tmp_path, parents.CONTEXT)


def test_numbers_that_transformers_would_not_open_are_refused():
    """Llama wants a hidden size that is a multiple of the heads, whatever their width."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    with pytest.raises(ValueError, match="3 key-value heads with 2 query heads each can't be open"):
        PruneHeads(kv_groups=3).check_shape(config)
    with pytest.raises(ValueError, match="8 query heads can't be shared evenly by 3 key-value"):
        PruneHeads(kv_groups=1).check_shape(config | {"num_key_value_heads": 3})


def test_too_little_text_is_refused_saying_how_much_is_needed(tmp_path):
    parent = parents.make(tmp_path)
    short = SimpleNamespace(**vars(parents.CONTEXT))
    short.calibration = lambda n: torch.zeros(1, 32, dtype=torch.long)
    message = "1 sequences of 32 tokens can't weigh 64 columns: needed are {} seq"
    for damping, needed in ((0.01, 2), ("auto", 8)):
        with pytest.raises(ValueError, match=message.format(needed)):
            replace(STAGE, damping=damping).run(parent, tmp_path / "out", short)


def test_a_quantized_parent_is_refused(tmp_path):
    parent = parents.make(tmp_path)
    (parent / "quant.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{parent} is quantized .*: prune an unquantized"):
        STAGE.run(parent, tmp_path, parents.CONTEXT)
