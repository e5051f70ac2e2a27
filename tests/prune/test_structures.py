"""Cuts of fused, transposed and scaled matrices are those of the same model written plainly."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import tiny_families as tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.models.blocks import ROWS, blocks_of
from compress.models.walk import Walk
from compress.prune.compensation import Inputs
from compress.prune.folding import fold_dropped
from compress.prune.heads import Heads, cut_heads
from compress.prune.importance import cut_ffn, cut_ffns
from compress.prune.linears import matrix_of, narrow, refit

BY_NAME = {row.architecture: row for row in ROWS}
LLAMA, PHI, GRANITE, GPT2 = (
    BY_NAME[name]
    for name in (
        "LlamaForCausalLM",
        "Phi3ForCausalLM",
        "GraniteForCausalLM",
        "GPT2LMHeadModel",
    )
)
IDS = torch.randint(3, 500, (8, 24), generator=torch.Generator().manual_seed(0))


def _model(kind: str, **changes):
    sizes = tiny.SIZES | {"rms_norm_eps": 1e-6} | changes
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).double().eval()


def _copy_into(model, state: dict[str, torch.Tensor]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "rotary" not in name]


def _fused_and_plain():
    """The same function as a Phi-3 and as a Llama, in float64."""
    fused, plain = _model("phi3"), _model("llama")
    state = {}
    for name, tensor in fused.state_dict().items():
        if "qkv_proj" in name:
            for letter, part in zip("qkv", tensor.split([64, 32, 32]), strict=True):
                state[name.replace("qkv_proj", f"{letter}_proj")] = part
        elif "gate_up_proj" in name:
            for word, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                state[name.replace("gate_up_proj", f"{word}_proj")] = part
        else:
            state[name] = tensor
    _copy_into(plain, state)
    torch.testing.assert_close(_logits(fused), _logits(plain))
    return fused, plain


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model(IDS).logits


def _walk(model) -> Walk:
    return Walk(model, IDS, device=torch.device("cpu"))


def test_a_fused_ffn_is_cut_as_the_same_model_with_separate_gates_and_ups():
    fused, plain = _fused_and_plain()
    before = _logits(fused)
    cuts = [cut_ffns(_walk(model), row, 48, 0.01) for model, row in ((fused, PHI), (plain, LLAMA))]
    for one, other in zip(*cuts, strict=True):
        assert torch.equal(one.keep_K, other.keep_K)
    torch.testing.assert_close(_logits(fused), _logits(plain), rtol=1e-5, atol=1e-6)
    assert (_logits(fused) - before).abs().max() > 0.01
    assert blocks_of(fused)[0].mlp.gate_up_proj.weight.shape == (96, 64)


@pytest.mark.parametrize("keep", [Heads(1, 2), Heads(2, 1)])
def test_fused_attention_is_cut_as_the_same_model_with_separate_projections(keep):
    fused, plain = _fused_and_plain()
    cuts = [
        cut_heads(_walk(model), row, Heads(2, 2), keep, 0.01)
        for model, row in ((fused, PHI), (plain, LLAMA))
    ]
    for one, other in zip(*cuts, strict=True):
        assert torch.equal(one.keep_K, other.keep_K)
    torch.testing.assert_close(_logits(fused), _logits(plain), rtol=1e-5, atol=1e-6)
    assert fused.config.num_attention_heads == 4  # the stage's to say, once all blocks are cut


def test_transposed_matrices_are_cut_as_linear_layers_are():
    model = tiny.model_of("GPT2LMHeadModel").double()
    block = blocks_of(model)[0]
    plain = copy.deepcopy(block)
    for name in ("c_fc", "c_proj"):
        stored = getattr(block.mlp, name)
        linear = nn.Linear(stored.nx, stored.nf).double()
        linear.weight.data, linear.bias.data = stored.weight.T.clone(), stored.bias.clone()
        setattr(plain.mlp, name, linear)
    inputs = Inputs()
    inputs.add(torch.randn(8, 40, 128))
    cuts = [cut_ffn(GPT2, each, inputs, 48, 0.01) for each in (block, plain)]
    assert torch.equal(cuts[0].keep_K, cuts[1].keep_K)
    for name, shape in (("c_fc", (64, 48)), ("c_proj", (48, 64))):
        stored, linear = getattr(block.mlp, name), getattr(plain.mlp, name)
        assert stored.weight.shape == shape and stored.weight.shape == (stored.nx, stored.nf)
        torch.testing.assert_close(stored.weight, linear.weight.T)
        torch.testing.assert_close(stored.bias, linear.bias)


def test_narrowing_and_refitting_say_the_new_sizes():
    linear = nn.Linear(6, 4)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    rows = torch.tensor([0, 3])
    narrow(linear, rows)
    assert torch.equal(linear.weight, weight[rows]) and torch.equal(linear.bias, bias[rows])
    refit(linear, torch.ones(2, 5))
    assert (linear.out_features, linear.in_features) == (2, 5)
    assert torch.equal(matrix_of(linear), torch.ones(2, 5))


def test_a_fold_of_a_scaled_stream_is_that_of_the_model_with_the_scale_in_its_weights():
    """Granite adds 0.5 times what a block makes: a Llama with half of o and down does the same."""
    plainly = {"attention_multiplier": 0.25, "embedding_multiplier": 1.0, "logits_scaling": 1.0}
    scaled = _model("granite", residual_multiplier=0.5, **plainly).float()
    plain = _model("llama").float()
    state = dict(scaled.state_dict())
    for name in state:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name] = 0.5 * state[name]
    _copy_into(plain, state)
    torch.testing.assert_close(_logits(scaled), _logits(plain))

    walks = [_walk(model) for model in (scaled, plain)]
    folds = [
        fold_dropped(walk, row, {1}) for walk, row in zip(walks, (GRANITE, LLAMA), strict=True)
    ]
    assert folds[0][0].damping == folds[1][0].damping and folds[0][0].damping is not None
    one, other = (blocks_of(model)[0].mlp.down_proj.weight for model in (scaled, plain))
    torch.testing.assert_close(0.5 * one, other, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        torch.cat(walks[0].states), torch.cat(walks[1].states), rtol=1e-3, atol=1e-4
    )


def test_a_family_whose_blocks_know_their_numbers_keeps_them():
    from compress.stages.prune_depth import PruneDepth

    config = dataclasses.asdict(tiny.config_of("GPT2LMHeadModel")) | {
        "architectures": ["GPT2LMHeadModel"],
        "num_hidden_layers": 3,
    }
    stage = PruneDepth(blocks=1, fold=False)
    assert stage.check_shape(config)["n_layer"] == 2
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx is True: blocks of GPT2"):
        stage.check_shape(config | {"scale_attn_by_inverse_layer_idx": True})
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 3}
    with pytest.raises(ValueError, match="decoder_sparse_step is 2"):
        stage.check_shape(config | {"decoder_sparse_step": 2})
