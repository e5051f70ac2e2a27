"""Experts by what they add: worth by a plain loop, the cut by logits of -inf, merging by what it
is measured to give.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny_families import mixture
from torch.nn.functional import silu

from compress.models.blocks import ROWS
from compress.models.experts import below, mixture_of, sentence_of
from compress.models.walk import Walk
from compress.prune.experts import Census, Target, cut_experts, likest, matched, merged
from compress.prune.shape import HELD_OUT

BY_NAME = {row.architecture: row for row in ROWS}
KINDS = {"qwen3_moe": "Qwen3MoeForCausalLM", "olmoe": "OlmoeForCausalLM"}
IDS = torch.randint(3, 500, (16, 24), generator=torch.Generator().manual_seed(0))
CASES = [("qwen3_moe", True), ("qwen3_moe", False), ("olmoe", False)]


def walk_of(model) -> Walk:
    return Walk(model, IDS, device=torch.device("cpu"))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def cut(model, kind: str, keep: int, top_k: int = 2, floor: int = 1, merge: bool = False):
    return cut_experts(walk_of(model), BY_NAME[KINDS[kind]], Target(keep, top_k, floor, merge))


@torch.no_grad()
def by_hand(model, index: int, normed: bool, top_k: int = 2):
    """Tokens, gates and worth of each expert of a block, token by token, of rows not held out."""
    given = []
    layer = model.model.layers[index]
    hook = layer.mlp.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model(IDS)
    hook.remove()

    experts, router = layer.mlp.experts, layer.mlp.gate
    count = len(router.weight)
    tokens, gates, added = [0] * count, [0.0] * count, [0.0] * count
    for row, x_LH in enumerate(given[0]):
        for x in x_LH if row % HELD_OUT else ():
            p = (router.weight @ x).float().softmax(-1)
            best = p.argsort(descending=True)[:top_k]
            scale = p[best].sum() if normed else 1.0
            for e in best.tolist():
                gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
                out = experts.down_proj[e] @ (silu(gate) * up)
                tokens[e] += 1
                gates[e] += float(p[e] / scale)
                added[e] += float(p[e] / scale) * math.sqrt(float((out * out).sum()))
    worth = [total / max(1, n) for total, n in zip(added, tokens, strict=True)]
    return tokens, gates, worth


@pytest.mark.parametrize(("kind", "normed"), CASES)
def test_worth_is_the_mean_of_what_an_expert_adds_for_its_tokens(kind, normed):
    model = mixture(kind, normed)
    first = by_hand(model, 0, normed)
    (report, *_) = cut(model, kind, 3)
    tokens, _, worth = first
    assert report.tokens_E.tolist() == tokens and sum(tokens) == 2 * 14 * 24
    torch.testing.assert_close(report.worth_E, torch.tensor(worth).double(), rtol=1e-5, atol=0)
    assert report.kept == sorted(sorted(range(6), key=lambda e: -worth[e])[:3])


def without(router, gone, normed: bool = True) -> None:
    """A router whose logits of those experts are -inf, whatever it then chooses."""

    def forward(x):
        scores = x @ router.weight.T
        if len(router.weight) == 6:  # not once it is cut
            scores[:, gone] = -torch.inf
        top, index = scores.float().softmax(-1).sort(dim=-1, descending=True)
        top, index = top[:, : router.top_k], index[:, : router.top_k]
        gates = top / top.sum(-1, keepdim=True) if normed else top
        return scores, gates.double(), index

    router.forward = forward


@pytest.mark.parametrize("top_k", [2, 1])
@pytest.mark.parametrize(("kind", "normed"), CASES)
def test_a_cut_mixture_is_its_parent_with_logits_of_minus_infinity(kind, normed, top_k):
    model, parent = mixture(kind, normed), mixture(kind, normed)
    before = logits(model)
    reports = cut(model, kind, 3, top_k)
    for report, layer in zip(reports, parent.model.layers, strict=True):
        layer.mlp.gate.top_k = top_k
        without(layer.mlp.gate, [e for e in range(6) if e not in report.kept], normed)
    torch.testing.assert_close(logits(model), logits(parent), rtol=1e-6, atol=1e-8)
    assert (logits(model) - before).abs().max() > 0.01
    assert len({tuple(report.kept) for report in reports}) > 1


def test_fewer_experts_for_a_token_alone_cut_none():
    model, parent = mixture(), mixture(num_experts_per_tok=1)
    reports = cut(model, "qwen3_moe", 6, top_k=1)
    assert all(report.kept == list(range(6)) for report in reports)
    torch.testing.assert_close(logits(model), logits(parent))
    assert all(0 < report.error < 2 for report in reports)


@torch.no_grad()
def test_the_error_is_that_of_the_ffn_on_held_out_rows():
    model, parent = mixture(), mixture()
    given = []
    hook = parent.model.layers[0].mlp.register_forward_hook(
        lambda _, args, out: given.append((args[0], out))
    )
    parent(IDS)
    hook.remove()
    (report, *_) = cut(model, "qwen3_moe", 3)
    x, y = (part[::HELD_OUT].contiguous() for part in given[0])
    gap = model.model.layers[0].mlp(x) - y
    assert report.error == pytest.approx(float(gap.square().sum() / y.square().sum()), rel=1e-6)
    assert report.error_dropped == report.error and len(x) == 2


def test_channels_of_a_shuffled_expert_are_put_back():
    model = mixture()
    experts = model.model.layers[0].mlp.experts
    maker, down = experts.gate_up_proj[0].detach(), experts.down_proj[0].detach()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    noise = 0.01 * torch.randn_like(down)
    shuffled = maker[torch.cat([order, order + 64])], (down + noise)[:, order]
    back = matched(maker, down, *shuffled)
    assert torch.equal(order[back], torch.arange(64))

    # The mean of both, whatever the order of the one's channels.
    into, weight = {1: 0}, torch.tensor([3.0, 1.0])
    makers, downs = merged(
        torch.stack([maker, shuffled[0]]), torch.stack([down, shuffled[1]]), weight, [0], into
    )
    torch.testing.assert_close(makers[0], maker)
    torch.testing.assert_close(downs[0], down + noise / 4)


@torch.no_grad()
def twins(model, shift: float) -> None:
    """Experts 2 e and 2 e + 1 are one, shifted to either side, and the router tells them apart by
    next to nothing; channels of the second lie in another order.
    """
    for layer in model.model.layers:
        experts, router = layer.mlp.experts, layer.mlp.gate
        order = torch.randperm(64)
        for e in range(0, 6, 2):
            delta = shift * torch.randn_like(experts.down_proj[e])
            experts.gate_up_proj[e + 1] = experts.gate_up_proj[e][torch.cat([order, order + 64])]
            experts.down_proj[e + 1] = (experts.down_proj[e] - delta)[:, order]
            experts.down_proj[e] += delta
            router.weight[e + 1] = router.weight[e] + 1e-3 * torch.randn(64)


def test_what_goes_is_merged_into_its_twin_where_that_is_closer():
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(mixture(num_experts_per_tok=1))
        twins(models[-1], 0.05)
    reports = cut(models[0], "qwen3_moe", 5, top_k=1, merge=True)
    dropped = cut(models[1], "qwen3_moe", 5, top_k=1)
    assert reports[0].error_dropped == dropped[0].error
    for report in reports:
        (gone,) = set(range(6)) - set(report.kept)
        assert report.merged in ({gone: gone ^ 1}, {})
        assert (report.error < report.error_dropped) == bool(report.merged)
    assert any(report.error < 0.8 * report.error_dropped for report in reports)
    assert not all(report.merged for report in reports)  # 48 held-out tokens decide


def test_unlike_experts_are_not_merged():
    """Random ones have nothing in common: any mean of two is farther than either."""
    reports = cut(mixture(), "qwen3_moe", 3, merge=True)
    assert [report.merged for report in reports if report.error == report.error_dropped] == [
        {} for report in reports if not report.merged
    ]
    assert any(not report.merged for report in reports)


def test_an_expert_is_likest_to_the_one_whose_logits_go_with_its_own():
    model = mixture()
    twins(model, 0.1)
    walk = walk_of(model)
    census = Census(mixture_of(BY_NAME["Qwen3MoeForCausalLM"], walk.blocks[0]))
    walk.inputs(0, {"mlp": census.add})
    census.tokens_E[5] = 0  # none to merge
    assert dict(likest(census, [0, 3, 4], [1, 2, 5])) == {1: 0, 2: 3}


def test_experts_that_no_token_reached_go_first_and_too_few_are_refused():
    model = mixture()
    for layer in model.model.layers:
        without(layer.mlp.gate, [1, 4])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"block 0: 4 of 6 experts were reached by 1 tokens of the calibration text or more,"
        r" and prune_experts.experts=5 are to stay: raise prune_experts.calibration_sequences",
    ):
        cut(model, "qwen3_moe", 5)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())

    reports = cut(model, "qwen3_moe", 4)
    assert all(report.kept == [0, 2, 3, 5] for report in reports)
    assert all(below(report.tokens_E, 1) == {1: 0, 4: 0} for report in reports)
    line = "block 2: fewer than 1 tokens of the calibration text reached experts 1 (0), 4 (0)"
    assert sentence_of(2, reports[2].tokens_E, 1) == line
    assert sentence_of(2, torch.tensor([7, 9]), 7) == ""
    many = sentence_of(0, torch.arange(12).flip(0), 2000)
    assert many.endswith(
        "experts 11 (0), 10 (1), 9 (2), 8 (3), 7 (4), 6 (5), 5 (6), 4 (7) and 4 others"
    )


def test_an_expert_below_the_floor_goes_however_much_it_adds():
    model = mixture()
    (plain, *_) = cut(mixture(), "qwen3_moe", 5)
    rarest = int(plain.tokens_E.argmin())
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[rarest] *= 100
    state = model.state_dict()
    loud = mixture()
    loud.load_state_dict(state)
    floor = int(plain.tokens_E.min()) + 1
    assert rarest in cut(loud, "qwen3_moe", 5)[0].kept
    assert rarest not in cut(model, "qwen3_moe", 5, floor=floor)[0].kept


def test_blocks_with_a_plain_ffn_are_passed_and_a_model_of_them_is_refused():
    model = mixture(mlp_only_layers=[1])
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    reports = cut(model, "qwen3_moe", 3)
    assert [report.block for report in reports] == [0, 2]
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before)
    assert logits(model).isfinite().all()
    with pytest.raises(ValueError, match="no block of the model has experts"):
        cut(mixture(mlp_only_layers=[0, 1, 2]), "qwen3_moe", 3)
