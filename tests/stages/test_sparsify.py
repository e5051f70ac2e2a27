"""Wanda, beside its definition written out by loops, and what it is refused for."""

from __future__ import annotations

from functools import partial

import pytest
import tiny_families as tiny
import torch

from compress.models.blocks import blocks_of
from compress.models.checkpoint import load_model
from compress.models.walk import Walk
from compress.prune.wanda import kept_weights, thin_blocks
from compress.stages.sparsify import Sparsify


def test_the_least_worthy_of_each_row_go():
    worth_RC = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 9.0]])
    kept = kept_weights(worth_RC, 0.5)
    assert kept.tolist() == [[True, False, False, True], [True, False, False, True]]
    assert kept_weights(worth_RC, 0.25).sum(1).tolist() == [3, 3]


def test_of_every_m_neighbours_n_stay():
    worth_RC = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    kept = kept_weights(worth_RC, 0.5, n=2, m=4)
    for row in range(5):
        for start in range(0, 12, 4):
            part = worth_RC[row, start : start + 4]
            best = set(part.topk(2).indices.tolist())
            assert {i for i in range(4) if kept[row, start + i]} == best


@pytest.mark.parametrize("settings", [{"zeros_fraction": 0.25}, {"pattern": "2:4"}])
def test_every_linear_layer_of_a_block_is_thinned_by_what_it_receives(
    settings, tiny_teacher, tmp_path, context
):
    stage = Sparsify(calibration_sequences=3, **settings)
    metrics = stage.run(tiny_teacher, tmp_path / "out", context)
    before, after = load_model(tiny_teacher), load_model(tmp_path / "out")

    # The first block's value projection, by hand: its input is the normed embedding.
    block = before.model.layers[0]
    x_NC = block.input_layernorm(before.model.embed_tokens(context.calibration(3))).flatten(0, 1)
    worth_RC = block.self_attn.v_proj.weight.abs() * x_NC.double().square().sum(0).sqrt()
    n, m = stage.kept_of()
    expected_RC = kept_weights(worth_RC, stage.zeros_fraction, n, m)
    weight_RC = after.model.layers[0].self_attn.v_proj.weight
    torch.testing.assert_close(weight_RC, block.self_attn.v_proj.weight * expected_RC)

    share = settings.get("zeros_fraction", 0.5)
    assert metrics["zeros_in_blocks_fraction"] == pytest.approx(share, abs=0.01)
    for name, weight in after.named_parameters():
        is_linear = name.endswith("_proj.weight")
        assert (weight == 0).float().mean() == pytest.approx(share if is_linear else 0, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zeros_fraction": 1.0}, "zeros_fraction is 1.0: allowed is between 0 and 1"),
        ({"pattern": "4:2"}, "pattern is '4:2': allowed is KEPT:OF, as in 2:4"),
        ({"pattern": "half"}, "pattern is 'half': allowed is KEPT:OF"),
        ({"pattern": "2:4", "zeros_fraction": 0.3}, "zeros_fraction is 0.3: the pattern 2:4 decid"),
        ({"calibration_sequences": 0}, "calibration_sequences is 0: allowed is 1 or more"),
    ],
)
def test_what_can_not_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sparsify(**settings)
    with pytest.raises(ValueError, match="hidden_size is 66: .*2:4 needs a multiple of 4"):
        Sparsify(pattern="2:4").check_shape({"hidden_size": 66})


def test_transposed_matrices_are_thinned_by_output():
    """GPT-2 stores (inputs, outputs)."""
    model = tiny.model_of("GPT2LMHeadModel")
    ids_BL = torch.randint(3, 500, (4, 16), generator=torch.Generator().manual_seed(0))
    zeros, weights = thin_blocks(Walk(model, ids_BL), partial(kept_weights, zeros_fraction=0.5))
    assert zeros * 2 == weights == 3 * (64 * 192 + 64 * 64 + 2 * 64 * 128)
    for block in blocks_of(model):
        zeros_R = (block.mlp.c_fc.weight == 0).sum(0)
        assert zeros_R.tolist() == [32] * 128


def test_a_layer_whose_weight_is_read_past_it_stays():
    """As a kernel of a state space takes its last projection's: the layer itself hears nothing."""
    model = tiny.model_of("LlamaForCausalLM")
    for block in blocks_of(model):
        linear = block.mlp.down_proj
        block.mlp.down_proj = torch.nn.Identity()
        block.mlp.down_proj.inner = linear
        block.mlp.down_proj.forward = partial(torch.nn.functional.linear, weight=linear.weight)
    thin_blocks(Walk(model, torch.arange(3, 19)[None]), partial(kept_weights, zeros_fraction=0.5))
    for block in blocks_of(model):
        assert (block.mlp.down_proj.inner.weight != 0).all()
        assert (block.mlp.gate_proj.weight == 0).sum() == 64 * 128 // 2
