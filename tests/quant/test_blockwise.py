"""Rounding block by block where some matrices lie on their grid already, as in a teacher that was
read from a 4-bit file.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.quant.blockwise import Blockwise
from compress.quant.codes import quantizable
from compress.quant.grids import GRIDS

IDS = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(1))
HELD = "model.layers.0.self_attn.v_proj.weight"  # on q4_1; q and k beside it are to be iq4_nl
GROUP_DOWN = "model.layers.1.mlp.down_proj.weight"  # alone in its group


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    )
    with torch.no_grad():
        for name in (HELD, GROUP_DOWN):
            w = model.get_parameter(name)
            w.copy_(GRIDS["q4_1"].decode(*GRIDS["q4_1"].encode(w.clone())))
        for layer in model.model.layers:  # channels that a balance takes hold of
            layer.input_layernorm.weight[:4] *= 9
            layer.post_attention_layernorm.weight[:4] *= 9
    return model


@pytest.mark.parametrize("method", ["gptq", "nearest"])
def test_what_lies_on_its_grid_stays_and_its_group_is_not_folded(tmp_path, method):
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layout = {
        name: "q4_1" if name in (HELD, GROUP_DOWN) else "iq4_nl" for name in quantizable(model)
    }
    work = Blockwise(model, layout, method=method, search=True, balance="awq")
    work.calibrated(IDS, tmp_path, "fp32", lambda line: None)

    # To the last bit but for rows that a balance behind them divides (v's, by o's).
    after = dict(model.named_parameters())
    assert torch.equal(after[GROUP_DOWN], before[GROUP_DOWN])
    assert work.made[HELD].grid == "q4_1"
    power_R = before[HELD].square().sum(1)
    factors_R = (after[HELD] * before[HELD]).sum(1) / power_R
    gap = after[HELD] - factors_R[:, None] * before[HELD]
    assert gap.square().sum() < 1e-6 * after[HELD].square().sum()

    # Norms before a group with such a matrix stay; those of others are balanced.
    norms = [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]
    assert torch.equal(after[norms[0]], before[norms[0]])
    assert not torch.equal(after[norms[1]], before[norms[1]])

    # What stands beside it in its group is rounded by what it receives all the same.
    beside, grid = HELD.replace("v_proj", "q_proj"), GRIDS["iq4_nl"]
    by_itself = grid.codes(before[beside], grid.search(before[beside]))
    assert not torch.equal(work.made[beside].codes, by_itself)
