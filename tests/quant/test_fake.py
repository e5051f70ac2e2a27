"""Fake-quant: gradients against a float64 oracle written by hand, ties, names, and what is left
when it is finished.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compress.models.checkpoint import load_model
from compress.models.tokenizer import copy_tokenizer
from compress.quant import codes, fake
from compress.quant.codes import Quantized
from compress.quant.grids import GRIDS
from compress.quant.grids.nonlinear import E2M1, NUMBERS

EMBED, UP = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"


def _model(tied: bool = True, width: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def _ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def _loss(model) -> torch.Tensor:
    return model(_ids(), labels=_ids()).loss


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


def _levels(name: str, scales: torch.Tensor, row: int, column: int) -> tuple[float, float]:
    """Step and floor of one weight, read off the formulas of the formats."""
    stored = (
        scales.view(len(scales), -1, GRIDS[name].stored)[
            row, column // (GRIDS[name].block or 1 << 30)
        ]
        .double()
        .tolist()
    )
    if "asym" in name:
        return stored[0], -stored[1] * stored[0]
    if name == "q4_1":
        return stored[0], stored[1]
    if name == "q4_k":
        return (
            stored[0] * stored[2 + column % 256 // 32],
            -stored[1] * stored[10 + column % 256 // 32],
        )
    if name == "mxfp4":
        return 2.0 ** (stored[0] - 128), 0.0
    if name == "nvfp4":
        exponent, mantissa = divmod(int(stored[0]), 8)
        return (2.0 ** (exponent - 8) * (1 + mantissa / 8) if exponent else mantissa / 1024), 0.0
    return stored[0] * (stored[1 + column % 256 // 16] if name == "q6_k" else 1), 0.0


def _oracle(w: torch.Tensor, scales: torch.Tensor, grad: torch.Tensor, name: str):
    """Value and master gradient of the clipped straight-through estimator,
    one element at a time.
    """
    value, back = torch.zeros_like(w, dtype=torch.float64), torch.zeros_like(w, dtype=torch.float64)
    low, high = GRIDS[name].low, GRIDS[name].high
    numbers = {"iq4_nl": NUMBERS, "mxfp4": E2M1, "nvfp4": E2M1}.get(name, range(low, high + 1))
    below, above = {"iq4_nl": (11.5, 12.0), "mxfp4": (2.0, 2.0), "nvfp4": (2.0, 2.0)}.get(
        name, (0.5, 0.5)
    )  # half the gap to the next number inside
    for row in range(w.shape[0]):
        for column in range(w.shape[1]):
            s, floor = _levels(name, scales, row, column)
            q = (w[row, column].item() - floor) / s
            value[row, column] = s * min(numbers, key=lambda n: abs(n - q)) + floor
            back[row, column] = (
                grad[row, column].item() if low - below <= q <= high + above else 0.0
            )
    return value, back


@pytest.mark.parametrize("name", GRIDS)
def test_value_and_gradient_equal_the_oracle(name):
    torch.manual_seed(0)
    width = max(64, GRIDS[name].block)
    layer = nn.Linear(width, 24, bias=False)
    fake.attach(layer, name)
    with torch.no_grad():
        layer._parameters["weight"].mul_(1.3)  # as training would: some codes now saturate
    x, target = torch.randn(5, width), torch.randn(5, 24)
    (layer(x) - target).square().sum().backward()
    master = layer._parameters["weight"]
    value, _ = _oracle(master.detach(), layer.quant_scales, torch.zeros(24, width), name)
    out = x.double() @ value.T
    upstream = (2 * (out - target.double())).T @ x.double()
    _, expected = _oracle(master.detach(), layer.quant_scales, upstream, name)
    assert torch.allclose(
        layer.weight.double(),
        value,
        rtol=1e-6,
        atol=1e-8 if name in ("q4_1", "q4_k") or "asym" in name else 0,
    )
    assert 0 < (expected == 0).sum() < expected.numel() / (2 if name == "mxfp4" else 3)
    assert torch.equal(master.grad == 0, expected == 0)
    assert torch.allclose(master.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.learns])
def test_learned_scales_get_the_gradient_of_lsq_written_with_autograd_in_float64(name):
    torch.manual_seed(0)
    grid = GRIDS[name]
    layer = nn.Linear(2 * (grid.block or 32), 24, bias=False)
    fake.attach(layer, name, "learned")
    with torch.no_grad():
        layer._parameters["weight"].mul_(1.3)  # some codes saturate
        layer.quant_shift.copy_(0.1 * torch.randn_like(layer.quant_shift))
    upstream = torch.randn_like(layer.weight)
    (layer.weight * upstream).sum().backward()
    master, shift = layer._parameters["weight"], layer.quant_shift

    w = master.detach().double().view(-1, grid.length(master.shape[1])).requires_grad_()
    moved = (layer.quant_scales.float() * shift.detach().exp()).half().double().view(-1, 1)
    t = torch.zeros_like(moved).requires_grad_()
    scale = moved * t.exp()
    ratio = w / scale
    numbers = torch.tensor(NUMBERS if name == "iq4_nl" else range(grid.low, grid.high + 1)).double()
    nearest = numbers[(ratio.detach()[..., None] - numbers).abs().argmin(-1)]
    ends = (-138.5, 125.0) if name == "iq4_nl" else (grid.low - 0.5, grid.high + 0.5)
    inside = (ratio >= ends[0]) & (ratio <= ends[1])
    value = scale * torch.where(inside, ratio + (nearest - ratio).detach(), nearest)
    (value * upstream.double().view(w.shape)).sum().backward()
    assert torch.allclose(layer.weight.double(), value.detach().view_as(master), rtol=1e-6, atol=0)
    assert torch.allclose(master.grad.double(), w.grad.view_as(master), rtol=1e-5, atol=1e-7)
    assert torch.allclose(shift.grad.double(), t.grad.view(shift.shape), rtol=1e-4, atol=1e-5)


def test_learned_scales_end_in_the_file_as_fp16_and_leave_nothing_behind():
    model = _model()
    fake.attach(model, "q4_0", "learned")
    start = model.get_input_embeddings().quant_scales.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    first = _loss(model).item()
    for _ in range(5):
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    last = _loss(model).item()
    made = fake.finish(model)
    assert last < first
    assert made[EMBED].scales.dtype == torch.float16 and not torch.equal(made[EMBED].scales, start)
    assert not any(
        "quant" in name for name in [*model.state_dict(), *dict(model.named_parameters())]
    )
    assert _loss(model).item() == last


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.learns])
def test_scales_alone_get_the_gradient_of_autograd_in_float64_and_codes_stay(name):
    torch.manual_seed(0)
    grid = GRIDS[name]
    layer = nn.Linear(2 * (grid.block or 32), 24, bias=False)
    scales = grid.search(layer.weight)
    codes = grid.codes(layer.weight, scales).flip(1)  # not the nearest ones
    start = {"weight": Quantized(name, codes, scales)}
    fake.attach(layer, name, "learned", start=start, fixed=True)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["quant_shift"]
    with torch.no_grad():
        layer.quant_shift.copy_(0.1 * torch.randn_like(layer.quant_shift))
    upstream = torch.randn_like(layer.weight)
    (layer.weight * upstream).sum().backward()
    shift = layer.quant_shift

    length = grid.length(layer.weight.shape[1])
    moved = (scales.float() * shift.detach().exp()).half()
    t = torch.zeros(moved.shape, dtype=torch.float64, requires_grad=True)
    units = grid.decode(codes, torch.ones_like(scales)).double()
    value = units * (moved.double() * t.exp()).repeat_interleave(length, 1)
    (value * upstream.double()).sum().backward()
    assert torch.allclose(layer.weight.double(), value.detach(), rtol=1e-6, atol=0)
    assert torch.allclose(shift.grad.double(), t.grad, rtol=1e-4, atol=1e-5)

    made = fake.finish(layer)["weight"]
    assert torch.equal(made.codes, codes) and torch.equal(made.scales, moved)
    assert torch.equal(layer.weight, made.decode())


def test_the_largest_weight_of_a_block_still_learns():
    layer = nn.Linear(32, 4, bias=False)
    fake.attach(layer, "q4_0")
    layer(torch.ones(1, 32)).sum().backward()
    master = layer._parameters["weight"]
    assert (master.grad.gather(1, master.abs().argmax(1, keepdim=True)) != 0).all()


def test_micro_batches_quantize_once_and_accumulate(monkeypatch):
    model = _model()
    calls = []
    snap = type(GRIDS["q4_0"]).snap
    monkeypatch.setattr(type(GRIDS["q4_0"]), "snap", lambda *a: (calls.append(1), snap(*a))[1])
    fake.attach(model, "q4_0")
    _loss(model).backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    _loss(model).backward()
    weights = len(codes.quantizable(model))
    assert len(calls) == weights == 1 + 2 * 7
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, 2 * once[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_every_kind_of_optimizer_step_is_seen(options):
    model = _model()
    fake.attach(model, "q4_0")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    for _ in range(2):
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        for home in (matrix.home for matrix in codes.quantizable(model).values()):
            grid, master = GRIDS["q4_0"], home._parameters["weight"]
            expected = grid.decode(grid.codes(master, home.quant_scales), home.quant_scales)
            assert torch.equal(home.weight, expected)


def test_evaluation_between_steps_keeps_gradients_flowing():
    model = _model()
    fake.attach(model, "q8_0")
    with torch.inference_mode():
        before = _loss(model).item()
    loss = _loss(model)
    loss.backward()
    assert loss.item() == pytest.approx(before)
    assert all(p.grad is not None for p in model.parameters())


def test_tied_weights_stay_tied_and_get_both_gradients():
    model = _model()
    fake.attach(model, "q8_0")
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hidden = model.model(_ids()).last_hidden_state.detach()
    model.lm_head(hidden).sum().backward()
    head = model.lm_head._parameters["weight"].grad.clone()
    model.zero_grad()
    model.model(_ids()).last_hidden_state.square().sum().backward()
    body = model.lm_head._parameters["weight"].grad.clone()
    model.zero_grad()
    states = model.model(_ids()).last_hidden_state
    (model.lm_head(hidden).sum() + states.square().sum()).backward()
    assert torch.allclose(
        model.lm_head._parameters["weight"].grad, head + body, rtol=1e-4, atol=1e-5
    )


def test_names_and_parameters_are_those_of_the_plain_model():
    model = _model()
    parameters = dict(model.named_parameters())
    plain = set(model.state_dict())
    fake.attach(model, "q4_0")
    assert all(parameters[name] is p for name, p in model.named_parameters())
    extra = set(model.state_dict()) - plain
    assert plain <= set(model.state_dict())
    assert extra == {
        name.removesuffix("weight") + "quant_scales" for name in codes.quantizable(model)
    }
    assert torch.equal(model.state_dict()[UP], parameters[UP])


def test_restoring_training_state_restores_the_quantized_weights():
    model = _model()
    fake.attach(model, "q4_0")
    before, state = _loss(model).item(), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    assert _loss(model).item() != before
    model.load_state_dict(state)
    assert _loss(model).item() == before


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", GRIDS)
def test_finished_model_is_plain_and_equals_its_codes(tmp_path, tiny_teacher, name, tied):
    model = _model(tied, max(64, GRIDS[name].block))
    kinds = [type(m) for m in model.modules()]
    fake.attach(model, name, "search" if GRIDS[name].searches else "round")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.001 * torch.randn_like(p))
        trained = model(_ids()).logits
    made = fake.finish(model)
    assert [type(m) for m in model.modules()] == kinds
    assert set(model.state_dict()) == set(_model(tied).state_dict())
    assert ("lm_head.weight" in made) == (not tied) and EMBED in made
    assert torch.equal(model(_ids()).logits, trained)
    parent = tmp_path / "parent"
    parent.mkdir()
    copy_tokenizer(tiny_teacher, parent)
    out = tmp_path / "out"
    out.mkdir()
    codes.save_quantized(model, out, parent, made)
    loaded = codes.load_quantized(out)
    again = load_model(out).state_dict()
    assert codes.is_quantized(out) and not codes.is_quantized(parent)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    for key, quantized in loaded.items():
        assert quantized.grid == name
        decoded = quantized.decode()
        assert torch.equal(_bits(decoded), _bits(again[key]))
        assert torch.equal(_bits(decoded), _bits(model.state_dict()[key]))
    assert {key for key in again if again[key].dim() == 2} - {"lm_head.weight"} == set(loaded) - {
        "lm_head.weight"
    }


def test_a_weight_that_does_not_divide_is_refused_by_name_and_the_model_untouched():
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8))
    with pytest.raises(ValueError, match=r"1\.weight has shape \(8, 48\)"):
        fake.attach(model, "q4_0")
    assert type(model[0]) is nn.Linear and "0.quant_scales" not in model.state_dict()


def test_attaching_twice_and_half_precision_masters_are_refused():
    layer = nn.Linear(32, 8)
    fake.attach(layer, "q4_0")
    with pytest.raises(ValueError, match="already"):
        fake.attach(layer, "q4_0")
    with pytest.raises(
        ValueError, match=r"weight is torch\.bfloat16: .* load the model as torch\.float32"
    ):
        fake.attach(nn.Linear(32, 8).bfloat16(), "q4_0")


def test_what_no_grid_can_hold_stays_and_is_refused_by_name_where_files_are_packed():
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv1d(32, 32, 1))
    assert codes.unquantized(model) == ["1.weight"]
    kernel = model[1].weight.detach().clone()
    fake.attach(model, "q4_0")
    assert list(fake.finish(model)) == ["0.weight"] and torch.equal(model[1].weight, kernel)
    with pytest.raises(
        ValueError, match=r"1\.weight with shape .* belongs to no Linear or Embedding"
    ):
        codes.check_packable(model)


class _Experts(nn.Module):
    """Two stacks in one module, as transformers has experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 64, 32))
        self.down = nn.Parameter(torch.randn(3, 32, 64))

    def forward(self, x_NH):
        return sum(x_NH @ up.T @ down.T for up, down in zip(self.up, self.down, strict=True))


@pytest.mark.parametrize("rank", [0, 2])
def test_stacked_experts_learn_under_their_grid_like_as_many_linear_layers(rank):
    torch.manual_seed(0)
    experts, x_NH = _Experts(), torch.randn(8, 32)
    layers = nn.ModuleList(nn.Linear(32, 64, bias=False) for _ in range(3))
    for layer, up in zip(layers, experts.up, strict=True):
        layer.weight.data = up.detach().clone()
    fake.attach(experts, "q4_0", "learned", rank)
    fake.attach(layers, "q4_0", "learned")
    assert experts.up.shape == (3, 64, 32) and experts.quant_scales_up.shape == (192, 1)
    torch.testing.assert_close(experts.up, torch.stack([layer.weight for layer in layers]))

    # Gradients of the three upper matrices and their shifts are those of linear layers.
    down = experts.down.detach()
    experts(x_NH).sum().backward()
    sum(layer(x_NH) @ one.T for layer, one in zip(layers, down, strict=True)).sum().backward()
    shift = torch.cat([layer.quant_shift.grad for layer in layers])
    torch.testing.assert_close(experts.quant_shift_up.grad.flatten(0, 1), shift)
    if not rank:
        master = experts._parameters["up"].grad
        expected = torch.stack([layer._parameters["weight"].grad for layer in layers])
        torch.testing.assert_close(master, expected)
    finished = fake.finish(experts)
    assert finished["up"].codes.shape == (192, 32) and type(experts) is _Experts
    torch.testing.assert_close(finished["up"].decode().view(3, 64, 32), experts.up)
    assert set(experts.state_dict()) == {"up", "down"}


def test_damaged_or_missing_codes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not quantized; run ptq or qat"):
        codes.load_quantized(tmp_path)
    (tmp_path / codes.FILE).write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="can't be read"):
        codes.load_quantized(tmp_path)
    from safetensors.torch import save_file

    one = {"a.codes": torch.zeros(1, 32, dtype=torch.uint8)}
    for tensors in (one, one | {"b.scales": torch.zeros(1, 1)}):
        save_file(tensors, tmp_path / codes.FILE, metadata={"grids": '{"a": "q4_0"}'})
        with pytest.raises(
            ValueError, match="does not hold a grid, codes and scales of each matrix"
        ):
            codes.load_quantized(tmp_path)
    save_file(
        one | {"a.scales": torch.zeros(1, 1)},
        tmp_path / codes.FILE,
        metadata={"grids": '{"a": "q9"}'},
    )
    with pytest.raises(
        ValueError,
        match=(
            "a says grid 'q9': known grids are q4_0, iq4_nl, q4_1, q5_0, q8_0, q4_k, q6_k, mxfp4,"
            " nvfp4, int4_g32"
        ),
    ):
        codes.load_quantized(tmp_path)


def test_each_matrix_may_have_a_grid_of_its_own():
    model = _model(True, 256)
    layout = {
        name: ["q4_0", "q8_0", "q6_k", "q4_1"][i % 4]
        for i, name in enumerate(codes.quantizable(model))
    }
    fake.attach(model, layout, "learned")
    assert {name for name, _ in model.named_parameters() if "quant_shift" in name} == {
        name.replace("weight", "quant_shift")
        for name, grid in layout.items()
        if GRIDS[grid].searches
    }
    with torch.no_grad():
        trained = model(_ids()).logits
    made = fake.finish(model)
    assert {name: q.grid for name, q in made.items()} == layout and torch.equal(
        model(_ids()).logits, trained
    )


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_get_the_gradient_of_the_merged_weight_on_the_grid(tied):
    whole, adapted = _model(tied), _model(tied)
    torch.manual_seed(5)
    fake.attach(adapted, "q4_0", "learned", rank=3)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if name.endswith("quant_b"):
                p.normal_(std=0.002)
    fake.attach(whole, "q4_0", "learned")
    homes = [
        (snapped.home, adapted.fake_quant.snaps[name].home)
        for name, snapped in whole.fake_quant.snaps.items()
    ]
    with torch.no_grad():
        for (
            home,
            other,
        ) in homes:  # the same weights, merged by hand, under the unmerged one's scales
            home._parameters["weight"].addmm_(other.quant_b, other.quant_a)
    losses = [_loss(model) for model in (whole, adapted)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for home, other in homes:
        master, grad = other._parameters["weight"], home._parameters["weight"].grad.double()
        assert master.grad is None and not master.requires_grad
        a, b = other.quant_a.double(), other.quant_b.double()
        for got, expected in (
            (other.quant_a.grad, b.T @ grad),
            (other.quant_b.grad, grad @ a.T),
            (other.quant_shift.grad, home.quant_shift.grad),
        ):
            assert torch.allclose(
                got.double(), expected.double(), rtol=1e-4, atol=1e-6 * float(expected.abs().max())
            )
    made = [fake.finish(model) for model in (whole, adapted)]
    for name, quantized in made[0].items():
        assert torch.equal(quantized.codes, made[1][name].codes) and torch.equal(
            quantized.scales, made[1][name].scales
        )
    assert not any("quant" in name for name in adapted.state_dict()) and all(
        p.requires_grad for p in adapted.parameters()
    )
    assert torch.equal(adapted(_ids()).logits, whole(_ids()).logits)
