"""Blocks by influence and by KL, and what may be cut."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compress.models.blocks import Work, row_for
from compress.models.walk import Walk
from compress.prune.importance import block_influence, drop_blocks
from compress.prune.shape import snap, without_blocks


def test_block_influence_by_hand():
    h_in = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    h_out = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])  # cosines 1, 0, -1
    assert block_influence(h_in, h_out) == pytest.approx(1.0)
    assert block_influence(h_in, 2 * h_in) == pytest.approx(0.0, abs=1e-7)


class _Step(nn.Module):
    """A block that is one function of its states."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, h_BLH, **_):
        return self.function(h_BLH)


class _Decoder(nn.Module):
    """As much of a language model as a walk needs: ids are looked up, blocks follow."""

    def __init__(self, functions, width: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, width)
        self.layers = nn.ModuleList(_Step(function) for function in functions)
        self.config = SimpleNamespace(num_hidden_layers=len(functions))

    def get_decoder(self):
        return self

    def forward(self, ids_BL, use_cache):
        h_BLH = self.embedding(ids_BL)
        for block in self.layers:
            h_BLH = block(h_BLH)
        return h_BLH


def _walk(functions, h_BLH: torch.Tensor | None = None, **options) -> Walk:
    torch.manual_seed(0)
    decoder = _Decoder(functions)
    if h_BLH is not None:
        decoder.embedding.weight.data[: h_BLH[..., 0].numel()] = h_BLH.flatten(0, -2)
    ids_BL = torch.arange(24).view(6, 4)
    return Walk(decoder, ids_BL, device=torch.device("cpu"), **options)


def _turn(degrees: float):
    angle = torch.tensor(degrees).deg2rad()
    matrix = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    return lambda h_BLH: h_BLH @ matrix.T


def _scores(functions, h_BLH: torch.Tensor) -> list[float]:
    """The influence of every block of a model, by one pass through it."""
    scores = []
    for function in functions:
        scores.append(block_influence(h_BLH, function(h_BLH)))
        h_BLH = function(h_BLH)
    return scores


def test_the_least_influential_block_goes_first_and_the_ends_are_kept():
    blocks = [_turn(a) for a in (1.0, 40.0, 10.0, 20.0, 2.0)]
    dropped = drop_blocks(_walk(blocks), 2, keep_first=1, keep_last=1)
    assert [index for index, _ in dropped] == [2, 3]
    assert dropped[0][1] == pytest.approx(1 - torch.tensor(10.0).deg2rad().cos().item(), abs=1e-5)


def test_blocks_are_scored_again_after_a_removal():
    """What a block receives changes when an earlier one goes,
    so its first score must not be used.
    """

    def set_second(value: float):
        return lambda h: torch.stack([h[..., 0], torch.full_like(h[..., 1], value)], -1)

    h = torch.ones(6, 4, 2)
    blocks = [_turn(0.0), set_second(1.1), set_second(1.15), set_second(0.8), _turn(0.0)]
    first = _scores(blocks, h)[1:4]
    assert sorted(range(3), key=first.__getitem__) == [1, 0, 2]
    dropped = drop_blocks(_walk(blocks, h), 2, 1, 1)
    assert [index for index, _ in dropped] == [2, 1]
    blocks[3] = set_second(1.0)  # does nothing once blocks 1 and 2 are gone
    dropped = drop_blocks(_walk(blocks, h), 3, 1, 1)
    assert dropped[-1] == (3, pytest.approx(0.0, abs=1e-6))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 3, 6])
def test_blocks_go_in_the_order_of_a_search_that_runs_the_whole_model_each_time(seed, count):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(9, 2, 2, generator=generator) * 0.5

    def block(matrix):
        return lambda h: h + (h @ matrix).tanh()

    functions = [block(matrix) for matrix in matrices]
    walk = _walk(functions)
    h_BLH, kept, expected = torch.cat(walk.states).double(), list(range(9)), []
    oracles = [block(matrix.double()) for matrix in matrices]
    for _ in range(count):
        scores = _scores([oracles[i] for i in kept], h_BLH)
        at = min(range(1, len(kept) - 2), key=scores.__getitem__)
        expected.append((kept.pop(at), pytest.approx(scores[at], abs=1e-6)))
    assert drop_blocks(walk, count, keep_first=1, keep_last=2) == expected


def test_no_more_states_are_kept_than_blocks_are_to_go():
    """Each block turns less than the one before it: all of them could go one after the other."""
    walk = _walk([_turn(20.0 - index) for index in range(12)])
    entered: list[weakref.ref] = []
    present, advance = [], walk.advance

    def counted(index: int) -> None:
        entered.append(weakref.ref(walk.states[0]))
        advance(index)
        present.append(sum(state() is not None for state in entered))

    walk.advance = counted
    assert [index for index, _ in drop_blocks(walk, 2, 0, 0)] == [11, 10]
    assert max(present) <= 2 + 1


def test_the_lines_say_how_many_blocks_are_gone_and_the_last_one_comes_at_the_end(monkeypatch):
    monkeypatch.setattr("compress.models.walk.LINE_SECONDS", -1)
    lines: list[str] = []
    drop_blocks(_walk([_turn(a) for a in (1.0, 40.0, 10.0, 20.0, 2.0)], log=lines.append), 2, 1, 1)
    texts = [line.split("  ")[0] for line in lines[::2]]  # two groups of rows a block
    first = [f"block {i}/5 weighed, 0 of 2 gone" for i in (1, 2, 3, 4)]
    assert texts == [*first, "block 4/5 weighed, 1 of 2 gone"]
    assert lines[-1].endswith("  0 s left")


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
        ValueError, match="architecture BloomForCausalLM can't .*allowed are LlamaForCausalLM"
    ):
        row_for({"architectures": ["BloomForCausalLM"]}, Work.width)
