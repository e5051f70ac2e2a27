"""Experts on a grid: each by the moments of what is sent to it, filled up to a floor."""

from __future__ import annotations

import json

import pytest
import tiny_families as tiny
import torch
from conftest import make_context
from tiny_families import mixture
from torch.nn.functional import silu

from compress.distill.settings import SchemeName, Signal
from compress.models.blocks import ROWS, row_of_block
from compress.models.checkpoint import load_model, read_config
from compress.models.experts import mixture_of
from compress.models.walk import Walk
from compress.quant.blockwise import Blockwise
from compress.quant.codes import load_quantized, quantizable
from compress.quant.experts import Stacks
from compress.quant.gptq import gptq
from compress.quant.grids import GRIDS
from compress.quant.settings import Balance, GridName, Method, Scales
from compress.stages.ptq import Ptq
from compress.stages.qat import Qat

BY_NAME = {row.architecture: row for row in ROWS}
QWEN = BY_NAME["Qwen3MoeForCausalLM"]
IDS = torch.randint(3, 500, (8, 24), generator=torch.Generator().manual_seed(0))
GPTQ = Ptq(
    grid=GridName.int4_g32,
    method=Method.gptq,
    balance=Balance.awq,
    scales=Scales.search,
    calibration_sequences=4,
    floor_tokens=64,
)


def stacks_of(model, floor: int, index: int = 0) -> Stacks:
    walk = Walk(model, IDS, device=torch.device("cpu"))
    block = walk.blocks[index]
    row = row_of_block(BY_NAME[type(model).__name__], block)
    return Stacks(walk, index, row, mixture_of(row, block), floor)


@torch.no_grad()
def moments_by_hand(model, normed: bool, floor: int, inner: bool):
    """G of each expert in float64, token by token."""
    given = []
    layer = model.model.layers[0]
    hook = layer.mlp.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model(IDS)
    hook.remove()
    x_NH = given[0].flatten(0, 1)
    experts, router = layer.mlp.experts, layer.mlp.gate

    def received(e, x):
        gate, up = experts.gate_up_proj[e][:64] @ x, experts.gate_up_proj[e][64:] @ x
        return silu(gate) * up if inner else x

    sent = {e: [] for e in range(6)}
    for x in x_NH:
        p = (router.weight @ x).softmax(-1)
        best = p.argsort(descending=True)[:2].tolist()
        total = sum(p[e] for e in best) if normed else 1.0
        for e in best:
            sent[e].append((float(p[e] / total), x))
    squares = [g * g for pairs in sent.values() for g, _ in pairs]
    mean_square = sum(squares) / len(squares)

    grams = []
    for e, pairs in sent.items():
        gram = torch.zeros(64, 64, dtype=torch.float64)
        for g, x in pairs:
            z = received(e, x)
            gram += g * g * torch.outer(z, z)
        for x in x_NH if len(pairs) < floor else ():
            z = received(e, x)
            gram += (floor - len(pairs)) / len(x_NH) * mean_square * torch.outer(z, z)
        grams.append(gram)
    return [len(pairs) for pairs in sent.values()], torch.stack(grams)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    ("kind", "normed", "floor"),
    [("qwen3_moe", True, 1), ("qwen3_moe", True, 60), ("olmoe", False, 60)],
)
def test_moments_are_of_the_tokens_sent_there_filled_up_to_the_floor(kind, normed, floor, inner):
    model = mixture(kind, normed, moe_intermediate_size=64, intermediate_size=64)
    tokens, grams = moments_by_hand(model, normed, floor, inner)
    stacks = stacks_of(model, floor)
    assert stacks.tokens_E.tolist() == tokens and sum(tokens) == 2 * 8 * 24
    assert 0 < sum(count < 60 for count in tokens) < 6  # some are below, some not
    received = stacks.inputs(inner=inner)
    assert received.tokens_E.tolist() == tokens
    torch.testing.assert_close(received.gram_ECC.double(), grams, rtol=1e-4, atol=1e-4)


def test_an_expert_that_no_token_reached_is_rounded_by_all_tokens_of_the_block():
    model = mixture()
    layer = model.model.layers[0]
    plain = layer.mlp.gate.forward

    def forward(x):
        scores, gates, chosen = plain(x)
        return scores, gates, torch.where(chosen == 4, 3, chosen)

    layer.mlp.gate.forward = forward
    stacks = stacks_of(model, 50)
    received = stacks.inputs(inner=False)
    assert stacks.tokens_E[4] == 0 and 4 in received.rare
    gram = received.all_gram[0]
    share = received.gram_ECC[4] / gram
    torch.testing.assert_close(share, share.mean().expand_as(share), rtol=1e-4, atol=0)
    assert received.gram_ECC[4].trace() > 0 and received.total_EC[4].min() > 0


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe"])
def test_balance_leaves_logits_and_moves_weights(kind):
    model = mixture(kind)
    with torch.no_grad():
        before = model(IDS).logits
        experts = model.model.layers[0].mlp.experts
        gates, downs = experts.gate_up_proj.clone(), experts.down_proj.clone()
        router = model.model.layers[0].mlp.gate.weight.clone()
        model.model.layers[0].post_attention_layernorm.weight[:4] *= 9  # channels to balance
        before = model(IDS).logits
        grid = GRIDS["int4_g32"]
        norm = model.model.layers[0].post_attention_layernorm
        stacks_of(model, 20).balance(norm, (grid, grid), ("makers", "downs"))
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-6)
    assert (experts.gate_up_proj - gates).abs().max() > 0.01
    assert (experts.down_proj - downs).abs().max() > 0.001
    assert (model.model.layers[0].mlp.gate.weight - router).abs().max() > 0.01


def rounded(model, folder, **options) -> Blockwise:
    folder.mkdir(exist_ok=True)
    layout = dict.fromkeys(quantizable(model), "int4_g32")
    work = Blockwise(model, layout, **options)
    work.calibrated(IDS, folder, "fp32", lambda line: None)
    return work


def test_each_expert_gets_the_codes_of_gptq_on_its_moments(tmp_path):
    """Of the first block's gates and ups: in front of them lies attention, rounded before."""
    model = mixture().float()
    weights = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    work = rounded(model, tmp_path / "a", method="gptq", floor_tokens=50)

    # The same model with all of the first block's attention rounded, and nothing else.
    other = mixture().float()
    other.load_state_dict(state)
    with torch.no_grad():
        names = [name for name in state if "layers.0.self_attn" in name or "embed" in name]
        for name in names:
            other.get_parameter(name).copy_(model.get_parameter(name))
    grams = stacks_of(other, 50).inputs(inner=False).gram_ECC
    codes = torch.cat(
        [gptq(w, gram, GRIDS["int4_g32"], 0.01)[0] for w, gram in zip(weights, grams, strict=True)]
    )
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert (codes == work.made[name].codes).float().mean() > 0.999
    assert torch.equal(model.get_parameter(name).flatten(0, 1), work.made[name].decode())


def test_gptq_of_experts_is_closer_than_rounding_to_the_nearest(tmp_path):
    errors = {}
    with torch.no_grad():
        plain = mixture().float()(IDS).logits
    for method in ("nearest", "gptq"):
        model = mixture().float()
        work = rounded(model, tmp_path / method, method=method, floor_tokens=20)
        assert set(work.made) == set(quantizable(model))
        with torch.no_grad():
            errors[method] = float((model(IDS).logits - plain).square().mean())
    assert errors["gptq"] < 0.9 * errors["nearest"]


def test_a_killed_run_finds_its_blocks_with_router_and_tokens(tmp_path):
    states, tokens = [], []
    for _ in range(2):
        model = mixture().float()
        work = rounded(model, tmp_path / "w", balance="awq", floor_tokens=20)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        tokens.append({index: each.tolist() for index, each in work.tokens.items()})
    assert tokens[0] == tokens[1] and set(tokens[0]) == {0, 1, 2}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_blocks_with_a_plain_ffn_are_rounded_too(tmp_path):
    model = mixture(mlp_only_layers=[1]).float()
    work = rounded(model, tmp_path / "w", method="gptq", balance="awq", floor_tokens=20)
    assert set(work.made) == set(quantizable(model)) and set(work.tokens) == {0, 2}
    assert "model.layers.1.mlp.up_proj.weight" in work.made


@pytest.fixture
def parent(tiny_teacher, tmp_path):
    return tiny.make(tmp_path / "parent", "OlmoeForCausalLM", tiny_teacher)


def test_the_record_names_experts_below_the_floor(parent, tiny_teacher, tmp_path):
    lines, out = [], tmp_path / "out"
    out.mkdir()
    metrics = GPTQ.run(parent, out, make_context(tiny_teacher, tmp_path, log=lines.append))
    note = json.loads((out / "experts.json").read_text())["blocks"]
    rare = 0
    for index, block in enumerate(note):
        names = {str(e): n for e, n in enumerate(block["tokens"]) if n < 64}
        assert block["experts_below_floor"] == names and sum(block["tokens"]) == 2 * 4 * 32
        rarest = sorted(names.items(), key=lambda pair: pair[1])
        listed = ", ".join(f"{e} ({n})" for e, n in rarest)
        assert any(line.endswith(f"reached experts {listed}") for line in lines) or not names
        assert block["block"] == index
        rare += len(names)
    assert metrics["experts_below_floor_count"] == rare > 0
    assert metrics["experts_unseen_count"] == 0
    assert read_config(out)["num_experts"] == 4
    assert set(load_quantized(out)) == set(quantizable(load_model(out)))


def test_training_under_rounding_starts_from_balanced_experts(parent, tiny_teacher, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    stage = Qat(
        grid=GridName.int4_g32,
        balance=Balance.awq,
        scales=Scales.search,
        tokens=64,
        batch_sequences=2,
        micro_batch_sequences=2,
        calibration_sequences=2,
        signal=Signal(scheme=SchemeName.hidden),
    )
    metrics = stage.run(parent, out, make_context(parent, tmp_path))
    assert metrics["experts_below_floor_count"] == 12
    assert set(load_quantized(out)) == set(quantizable(load_model(out)))


@pytest.mark.parametrize(
    ("options", "about", "message"),
    [
        (
            {"floor_tokens": 9},
            "Olmoe",
            "ptq.floor_tokens is 9: no text calibrates it; leave it at null",
        ),
        ({"floor_tokens": 9, "method": Method.gptq}, "Llama", "9: the model has no experts"),
        ({"floor_tokens": 0, "method": Method.gptq}, "Olmoe", "is 0: allowed is 1 or more"),
        ({"balance": Balance.awq}, "Olmoe", "clip_qkv is 8.0: attention clips its values"),
    ],
)
def test_a_floor_that_nothing_uses_and_clipped_values_are_refused(options, about, message):
    config = {"architectures": [f"{about}ForCausalLM"], "hidden_size": 64, "clip_qkv": 8.0}
    with pytest.raises(ValueError, match=message):
        Ptq(**options).check_shape(config)


def test_few_tokens_filled_up_are_closer_on_other_text_than_by_themselves():
    """On text that no expert was calibrated by, the block's output; 4 a column is the default."""
    generator = torch.Generator().manual_seed(7)
    other = torch.randint(3, 500, (16, 24), generator=generator)
    grid, errors = GRIDS["int4_g32"], {}
    for floor in (1, None):
        model = mixture().float()
        given = []
        Walk(model, other, device=torch.device("cpu")).inputs(0, {"mlp": given.append})
        stacks = stacks_of(model, floor)
        assert 32 < stacks.tokens_E.double().mean() <= 64 < 4 * 64
        with torch.no_grad():
            before = stacks.mixture(torch.cat(given))
            for inner in (False, True):
                weights = stacks.mixture.downs if inner else stacks.mixture.makers
                grams = stacks.inputs(inner=inner).gram_ECC
                for w, gram in zip(weights, grams, strict=True):
                    w.copy_(grid.decode(*gptq(w, gram, grid, 0.01)))
            gap = stacks.mixture(torch.cat(given)) - before
        errors[floor] = float(gap.square().sum())
    assert errors[None] < 0.8 * errors[1]
