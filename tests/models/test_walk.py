"""`models/walk.py`: a text that goes block by block receives and gives what the whole model in
float64 does, one block on the device at a time.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from pruning_parents import KINDS
from torch import nn
from transformers import AutoModelForCausalLM

from compress.models import walk as walking
from compress.models.walk import Moments, Pace, Walk

CPU = torch.device("cpu")
OTHER = torch.device("cpu:0")  # another device by name, where tensors of CPU can be computed with


def _model(kind: str = "llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(KINDS[kind]()).eval()


def _ids(rows: int = 7) -> torch.Tensor:
    """Longer than the sliding windows; 7 rows end in a group of 3."""
    return torch.randint(256, (rows, 24), generator=torch.Generator().manual_seed(1))


def _through(walk: Walk) -> torch.Tensor:
    for index in range(len(walk.blocks)):
        walk.advance(index)
    return walk.final_states()


def _received(model, ids: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Inputs (N, C) of modules in one forward of the whole model in float64."""
    whole, seen = copy.deepcopy(model).double(), {}
    for name in names:
        whole.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)})
        )
    with torch.no_grad():
        whole(ids)
    return seen


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_states_in_front_of_every_block_and_at_the_end_are_the_models(kind, rows):
    model, ids = _model(kind), _ids(rows)
    with torch.no_grad():
        decoder = copy.deepcopy(model).double().get_decoder()
        entering = decoder(ids, output_hidden_states=True).hidden_states[:4]
        final = decoder(ids).last_hidden_state.flatten(0, 1)
    walk = Walk(model, ids, device=CPU)
    assert [len(x) for x in walk.states] == [4] * (rows // 4) + [rows % 4] * bool(rows % 4)
    for index, expected in enumerate(entering):
        torch.testing.assert_close(torch.cat(walk.states).double(), expected, rtol=1e-4, atol=1e-5)
        walk.advance(index)
    torch.testing.assert_close(walk.final_states().double(), final, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(block) for block in walk.blocks)


def test_second_moments_of_inputs_are_those_of_the_whole_model():
    model, ids = _model("gemma3"), _ids()
    walk = Walk(model, ids, device=CPU)
    walk.advance(0)
    moments = {name: Moments() for name in ("self_attn.o_proj", "mlp.down_proj")}
    walk.inputs(1, {name: taken.add for name, taken in moments.items()})
    seen = _received(model, ids, [f"model.layers.1.{name}" for name in moments])
    for name, taken in moments.items():
        x_NC = seen[f"model.layers.1.{name}"]
        assert taken.gram_CC.dtype == torch.float64
        torch.testing.assert_close(taken.gram_CC, x_NC.T @ x_NC, rtol=1e-4, atol=1e-6)


def test_text_goes_no_further_than_to_the_last_that_is_listened_to():
    model, called = _model(), []
    mlp = model.model.layers[2].mlp
    mlp.down_proj.register_forward_pre_hook(lambda *_: called.append("down"))
    mlp.gate_proj.register_forward_pre_hook(lambda *_: called.append("gate"))
    walk, heard = Walk(model, _ids(), device=CPU), []
    walk.inputs(2, {"mlp.up_proj": heard.append, "self_attn.q_proj": heard.append})
    assert (
        called == ["gate"] * 2 and [x.shape for x in heard] == [(4, 24, 64)] * 2 + [(3, 24, 64)] * 2
    )
    walk.advance(2)
    assert len(heard) == 4 and called.count("down") == 2


def test_outputs_are_what_modules_give():
    model, given = _model(), {"self_attn": [], "mlp": []}
    walk = Walk(model, _ids(), device=CPU)
    entering = list(walk.states)
    walk.outputs(0, {name: taken.append for name, taken in given.items()})
    walk.advance(0)
    for at, x in enumerate(entering):
        attended = x + given["self_attn"][at]
        torch.testing.assert_close(attended + given["mlp"][at], walk.states[at])


def test_what_is_changed_in_front_of_a_block_reaches_those_behind_it():
    model, ids = _model(), _ids()
    walk = Walk(model, ids, device=CPU)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    changed = _through(walk)
    with torch.no_grad():
        expected = copy.deepcopy(model).double().model(ids).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(changed.double(), expected, rtol=1e-4, atol=1e-5)

        # Embeddings too, from the entrance on.
        model.model.embed_tokens.weight.mul_(2)
        walk.enter()
        expected = model.model.embed_tokens(ids)
    assert torch.equal(torch.cat(walk.states), expected)


def test_a_branch_goes_its_way_and_the_walk_stays():
    model, ids = _model(), _ids()
    walk = Walk(model, ids, device=CPU)
    walk.advance(0)
    before = list(walk.states)
    branch = walk.branch()
    for index in (2, 3):
        branch.advance(index)
    assert all(x is y for x, y in zip(walk.states, before, strict=True))
    shorter = copy.deepcopy(model)
    del shorter.model.layers[1]
    with torch.no_grad():
        expected = shorter.model(ids).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(branch.final_states(), expected)
    assert walk.pace.done == 1


def test_two_walks_over_one_text_receive_what_two_models_do():
    dense, ids = _model(), _ids()
    cut = copy.deepcopy(dense)
    cut.model.layers[0].mlp.down_proj.weight.data.mul_(0.5)
    walks = [Walk(model, ids, device=CPU) for model in (dense, cut)]
    for walk in walks:
        walk.advance(0)
    assert not torch.equal(walks[0].states[0], walks[1].states[0])
    for walk, model in zip(walks, (dense, cut), strict=True):
        with torch.no_grad():
            expected = model.model(ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(torch.cat(walk.states), expected)


def test_a_call_lets_gradients_through():
    walk = Walk(_model(), _ids(), device=CPU)
    walk.call(0, walk.states[0]).sum().backward()
    assert walk.blocks[0].self_attn.q_proj.weight.grad is not None


def test_products_are_bf16_and_states_stay_fp32():
    model, given = _model(), []
    walks = {p: Walk(model, _ids(), precision=p, device=CPU) for p in ("bf16", "fp32")}
    for walk in walks.values():
        walk.outputs(0, {"self_attn.q_proj": given.append})
        walk.advance(0)
        assert walk.states[0].dtype == torch.float32
    assert [x.dtype for x in given] == [torch.bfloat16] * 2 + [torch.float32] * 2
    gap = (walks["bf16"].states[0] - walks["fp32"].states[0]).abs().max()
    assert 0 < gap < 0.01


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_output_that_is_not_finite_is_refused_by_its_block(value):
    model = _model()
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = value
    walk = Walk(model, _ids(), device=CPU, advice="ask for help")
    for index in (0, 1):
        walk.advance(index)
    message = "the output of block 2 on the calibration text holds NaN or infinity: ask for help"
    with pytest.raises(ValueError, match=message):
        walk.advance(2)


def test_blocks_are_sent_to_the_device_one_at_a_time_and_back(monkeypatch):
    """By the calls of `to`: this machine may have one device only."""
    model, moves = _model(), []
    names = {id(block): f"block {i}" for i, block in enumerate(model.model.layers)}
    names[id(model.model.norm)] = "norm"
    real = nn.Module.to

    def noted(module, device):
        moves.append((names[id(module)], str(device)))
        return real(module, device)

    monkeypatch.setattr(nn.Module, "to", noted)
    walk = Walk(model, _ids(), device=OTHER)
    assert moves == []
    walk.inputs(1, {"mlp.down_proj": lambda x: None})
    walk.advance(1)
    assert moves == [("block 1", "cpu:0"), ("block 1", "cpu")]
    walk.call(2, walk.states[0])
    walk.branch().call(3, walk.states[0])
    walk.advance(0)
    walk.final(lambda h: None)
    expected = [name for name in ("block 2", "block 3", "block 0", "norm") for _ in range(2)]
    assert [name for name, _ in moves[2:]] == expected
    assert [device for _, device in moves[2:]] == ["cpu:0", "cpu"] * 4


def test_nothing_moves_where_the_model_is_already(monkeypatch):
    monkeypatch.setattr(nn.Module, "to", lambda *_: pytest.fail("moved"))
    _through(Walk(_model(), _ids(), device=CPU))


def test_lines_come_now_and_then_and_at_the_end(monkeypatch):
    lines: list[str] = []
    walk = Walk(_model(), _ids(), device=CPU, log=lines.append)
    walk.task = "measured"
    _through(walk)
    assert len(lines) == 1 and lines[0] == "block 4/4 measured  0 s left"

    monkeypatch.setattr(walking, "LINE_SECONDS", -1)
    walk.pace.steps = 8
    walk.enter()
    walk.advance(0)
    assert [line.split("  ")[0] for line in lines[1:]] == ["block 1/4 measured"] * 2
    assert all(line.endswith(" s left") for line in lines)


def test_the_time_left_is_that_of_the_steps_to_come(monkeypatch):
    lines, clock = [], SimpleNamespace(now=100.0)
    monkeypatch.setattr(walking.time, "monotonic", lambda: clock.now)
    pace = Pace(lines.append, 10)
    for done, seconds in ((1, 19.0), (2, 21.0), (3, 23.0), (4, 100.0)):
        clock.now = 100.0 + seconds
        pace.reach(done, f"step {done}")
    assert lines == ["step 2  84 s left", "step 4  150 s left"]

    # What was done before a restart took no time that counts.
    pace.restart()
    clock.now += 30
    pace.reach(5, "step 5")
    assert lines[-1] == "step 5  150 s left"
