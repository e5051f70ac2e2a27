"""The `prune_experts` stage on tiny random mixtures."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pruning_parents as parents
import pytest
import tiny_families as tiny
import torch

from compress.models.checkpoint import load_model, read_config
from compress.stages.prune_experts import PruneExperts

STAGE = PruneExperts(experts=2, floor_tokens=1, calibration_sequences=8)
KEYS = {"Qwen3MoeForCausalLM": "num_local_experts", "OlmoeForCausalLM": "num_experts"}


@pytest.fixture(params=KEYS)
def parent(request, tmp_path):
    tokenizer = parents.make(tmp_path / "llama") / ".." / "tokenizer"
    return tiny.make(tmp_path / "parent", request.param, tokenizer)


def test_every_block_keeps_as_many_experts_with_their_rows_of_the_router(parent, tmp_path):
    stage = replace(STAGE, merge=False)
    metrics = parents.run(stage, parent, tmp_path / "out")
    config, about = read_config(tmp_path / "out"), read_config(parent)
    assert config == {**about, KEYS[about["architectures"][0]]: 2}
    assert stage.check_shape(about) == config

    note = json.loads((tmp_path / "out" / "pruning.json").read_text())["blocks"]
    old, new = load_model(parent), load_model(tmp_path / "out")
    for block, before, after in zip(note, old.model.layers, new.model.layers, strict=True):
        kept = block["experts_kept"]
        assert kept == sorted(kept) and len(kept) == 2 and len(block["worth"]) == 4
        worst = min(block["worth"][e] for e in kept)
        assert all(block["worth"][e] <= worst for e in {*range(4)} - {*kept})
        assert sum(block["tokens"]) == 2 * 7 * 32 and block["merged_into"] == {}
        assert torch.equal(after.mlp.gate.weight, before.mlp.gate.weight[kept].bfloat16().float())
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(before.mlp.experts, name)[kept].bfloat16().float()
            assert torch.equal(getattr(after.mlp.experts, name), weights)
    assert metrics["experts_removed_count"] == 2 and metrics["top_k_lowered_count"] == 0
    assert metrics["experts_below_floor_count"] == metrics["experts_merged_count"] == 0
    assert 0 < metrics["ffn_error_mean_fraction"] <= metrics["ffn_error_max_fraction"]
    assert 0.1 < metrics["params_removed_fraction"] < 0.5


def test_fewer_experts_for_a_token_by_itself(parent, tmp_path):
    stage = PruneExperts(top_k=1, calibration_sequences=8)
    metrics = parents.run(stage, parent, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert config == {**read_config(parent), "num_experts_per_tok": 1}
    old, new = load_model(parent), load_model(tmp_path / "out")
    assert metrics["top_k_lowered_count"] == 1 and metrics["params_removed_fraction"] == 0
    for layer in old.model.layers:
        layer.mlp.gate.top_k = 1
    ids = torch.arange(24)[None]
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.copy_(parameter.bfloat16())
        torch.testing.assert_close(new(ids).logits, old(ids).logits)


def test_experts_below_the_floor_are_named_and_too_few_are_refused(parent, tmp_path):
    """1,000 tokens are more than reach any."""
    lines = []
    context = SimpleNamespace(**{**vars(parents.CONTEXT), "log": lines.append})
    (tmp_path / "out").mkdir()
    stage = PruneExperts(top_k=1, floor_tokens=1000, calibration_sequences=8)
    metrics = stage.run(parent, tmp_path / "out", context)
    assert metrics["experts_below_floor_count"] == 12
    note = json.loads((tmp_path / "out" / "pruning.json").read_text())["blocks"]
    for index, block in enumerate(note):
        rarest = sorted(enumerate(block["tokens"]), key=lambda pair: pair[1])
        names = ", ".join(f"{e} ({count})" for e, count in rarest)
        reached = "fewer than 1,000 tokens of the calibration text reached"
        assert f"test: block {index}: {reached} experts {names}" in lines
        assert block["experts_below_floor"] == {str(e): n for e, n in enumerate(block["tokens"])}
    message = "block 0: 0 of 4 experts were reached by 1000 tokens .*, and prune_experts.experts=2"
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match=message):
        replace(STAGE, floor_tokens=1000).run(parent, tmp_path / "again", context)
    assert not list((tmp_path / "again").iterdir())


def test_the_plan_is_the_result_and_repeating_gives_the_same_bytes(parent, tmp_path):
    for name in ("a", "b"):
        parents.run(STAGE, parent, tmp_path / name)
    assert parents.files(tmp_path / "a") == parents.files(tmp_path / "b")
    assert STAGE.check_shape(read_config(parent)) == read_config(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "prune_experts.experts is 0: allowed is 1 or more, or null for all"),
        ({"top_k": 0}, "prune_experts.top_k is 0: allowed is 1 or more"),
        ({"experts": 2, "floor_tokens": 0}, "prune_experts.floor_tokens is 0: allowed is 1"),
        ({"calibration_sequences": 7}, "calibration_sequences is 7: allowed is 8 or more"),
        ({"top_k": 1, "merge": False}, "prune_experts.merge is False: nothing uses it with"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PruneExperts(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "cuts nothing: the model has 4 experts of which 2 see a token"),
        ({"experts": 4, "top_k": 2}, "cuts nothing"),
        ({"experts": 5}, "prune_experts.experts is 5 and the model has 4"),
        ({"top_k": 3}, "prune_experts.top_k is 3 and the model has 2"),
        ({"experts": 1}, "experts is 1 and 2 experts see a token: allowed is 2 or more, or a top"),
    ],
)
def test_what_cuts_nothing_or_more_than_there_is_is_refused_naming_the_directory(
    parent, tmp_path, options, message
):
    with pytest.raises(ValueError, match=f"{parent}: .*{message}"):
        PruneExperts(**options).run(parent, tmp_path, parents.CONTEXT)


def test_a_model_without_experts_and_a_config_that_counts_none_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM can't be pruned of experts: its FFNs"):
        STAGE.check_shape({"architectures": ["LlamaForCausalLM"]})
    config = {"architectures": ["OlmoeForCausalLM"], "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match="config.json doesn't say num_experts or num_local_expert"):
        STAGE.check_shape(config)
    published = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8}
    changed = STAGE.check_shape(published | {"num_experts_per_tok": 2})
    assert changed["num_experts"] == 2 and "num_local_experts" not in changed


def test_a_quantized_parent_is_refused(parent, tmp_path):
    (parent / "quant.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{parent} is quantized .*: prune an unquantized"):
        STAGE.run(parent, tmp_path, parents.CONTEXT)
