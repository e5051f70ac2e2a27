"""Folds leave fp32 logits what they are; the factors are those of the paper's formula."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.models.blocks import blocks_of, row_of
from compress.quant.balance import Group, Inputs, awq_scales, fold, groups_of
from compress.quant.grids import GRIDS

KINDS = [
    *("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("phi3", "smollm3", "olmo2", "granite", "gpt_neox"),
]


def _model(kind: str, tied: bool = True, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**sizes, **changes})
    ).eval()
    with torch.no_grad():
        for parameter in (
            model.parameters()
        ):  # norms and biases that are not all ones and zeros, and logits of some size
            (
                parameter.mul_(3).add_(0.3 * torch.randn_like(parameter))
                if parameter.dim() == 1
                else parameter.mul_(4)
            )
    return model


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model(torch.arange(1, 41).view(2, 20)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_folding_any_factors_leaves_logits(kind):
    model = _model(kind)
    before = _logits(model)
    generator = torch.Generator().manual_seed(0)
    width = 24 if kind == "gpt_neox" else 32  # NeoX takes it from the number of heads
    for block in blocks_of(model):
        for group in groups_of(row_of(model), block, width):
            if group.maker is None:
                continue
            size = group.matrix().shape[1] // group.repeats
            s = torch.exp(torch.randn(size, generator=generator))
            weights = group.matrix().clone()
            s = s.view(-1, 1, group.width).expand(-1, group.repeats, -1).flatten()
            fold(group, s)
            torch.testing.assert_close(group.matrix(), weights * s)
    assert before.std() > 0.3
    torch.testing.assert_close(_logits(model), before, rtol=1e-3, atol=1e-4)


def _linear(w: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w.clone()
    return layer


def _seen(x: torch.Tensor) -> Inputs:
    inputs = Inputs()
    for part in x.split(50):
        inputs.add(part[None])
    return inputs


def test_awq_takes_the_exponent_of_least_output_error():
    torch.manual_seed(0)
    x, w, grid = torch.randn(200, 64), torch.randn(24, 64), GRIDS["q4_0"]
    x[:, :4] *= 20  # salient channels
    found = awq_scales(Group({"a": _linear(w)}, torch.nn.LayerNorm(64)), _seen(x), grid)
    errors = {}
    for step in range(20):
        s = x.abs().mean(0) ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        errors[step] = ((x @ (grid.decode(*grid.encode(w * s)) / s - w).T) ** 2).sum().item()
    best = min(errors, key=errors.__getitem__)
    s = x.abs().mean(0) ** (best / 20)
    assert best > 0 and errors[best] < 0.5 * errors[0]
    torch.testing.assert_close(found, s / (s.max() * s.min()).sqrt(), rtol=1e-4, atol=1e-5)


def test_heads_that_share_a_value_share_its_factors():
    torch.manual_seed(0)
    x, w, values = torch.randn(100, 64), torch.randn(8, 64), torch.nn.Linear(16, 32)
    x[:, 16:20] *= 20  # salient channels of the second head alone
    group = Group({"o": _linear(w)}, values, repeats=2, width=16)
    s = awq_scales(group, _seen(x), GRIDS["q4_0"]).view(2, 2, 16)
    assert torch.equal(s[:, 0], s[:, 1])
    assert s[0, 0, :4].min() > 1.4 * s[0, 0, 4:].max()
