"""Block influence and what may be cut."""

from __future__ import annotations

import pytest
import torch

from compress.prune.importance import block_influence, drop_blocks
from compress.prune.shape import check_architecture, snap, without_blocks


def test_block_influence_by_hand():
    h_in = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    h_out = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])  # cosines 1, 0, -1
    assert block_influence(h_in, h_out) == pytest.approx(1.0)
    assert block_influence(h_in, 2 * h_in) == pytest.approx(0.0, abs=1e-7)


def _turn(degrees: float):
    angle = torch.tensor(degrees).deg2rad()
    matrix = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    return lambda h_BLH: h_BLH @ matrix.T


def _entering(blocks, h_BLH):
    states = [h_BLH]
    for block in blocks[:-1]:
        states.append(block(states[-1]))
    return states


def test_the_least_influential_block_goes_first_and_the_ends_are_kept():
    blocks = [_turn(a) for a in (1.0, 40.0, 10.0, 20.0, 2.0)]
    dropped = drop_blocks(
        blocks, _entering(blocks, torch.randn(2, 3, 2)), 2, keep_first=1, keep_last=1
    )
    assert [index for index, _ in dropped] == [2, 3]
    assert dropped[0][1] == pytest.approx(1 - torch.tensor(10.0).deg2rad().cos().item(), abs=1e-5)


def test_blocks_are_scored_again_after_a_removal():
    """What a block receives changes when an earlier one goes,
    so its first score must not be used.
    """

    def set_second(value: float):
        return lambda h: torch.stack([h[..., 0], torch.full_like(h[..., 1], value)], -1)

    h = torch.ones(1, 4, 2)
    blocks = [_turn(0.0), set_second(1.1), set_second(1.15), set_second(0.8), _turn(0.0)]
    first = [
        block_influence(a, b)
        for a, b in zip(_entering(blocks, h)[1:4], _entering(blocks, h)[2:5], strict=True)
    ]
    assert sorted(range(3), key=first.__getitem__) == [1, 0, 2]
    dropped = drop_blocks(blocks, _entering(blocks, h), 2, 1, 1)
    assert [index for index, _ in dropped] == [2, 1]
    blocks[3] = set_second(1.0)  # does nothing once blocks 1 and 2 are gone
    dropped = drop_blocks(blocks, _entering(blocks, h), 3, 1, 1)
    assert dropped[-1] == (3, pytest.approx(0.0, abs=1e-6))


def test_snap_goes_to_the_nearest_multiple_and_never_to_zero():
    assert [snap(w, 64) for w in (1, 31, 95, 96, 900, 960)] == [64, 64, 64, 128, 896, 960]
    assert snap(5, 1) == 5


def test_config_lists_follow_the_blocks():
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "eos_token_id": [1, 2, 3],
        "hidden_size": 8,
    }
    assert without_blocks(config, {1}) == {
        **config,
        "num_hidden_layers": 2,
        "layer_types": ["a", "c"],
    }


def test_an_unsupported_architecture_is_named_with_what_is_allowed():
    with pytest.raises(
        ValueError, match="architecture GPT2LMHeadModel can't .*allowed are LlamaForCausalLM"
    ):
        check_architecture({"architectures": ["GPT2LMHeadModel"]})
