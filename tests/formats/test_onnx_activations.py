"""Products of an ONNX directory in 8 bits: which ones, by what error, and what the file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_gguf import tiny_checkpoint

from compress.errors import ConfigError
from compress.formats.onnx import export_onnx
from compress.formats.onnx_activations import _Graph, round_activations, rounded
from compress.formats.onnx_weights import decode_onnx
from compress.formats.onnxruntime import OnnxRuntime, fetch, open_session
from compress.models.checkpoint import load_model
from compress.quant.settings import GridName
from compress.stages.ptq import Ptq

ROWS = torch.randint(3, 300, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a8")
    Ptq(grid=GridName.q4_0).run(tiny_checkpoint(folder), folder / "q4", None)
    return folder / "q4"


@pytest.fixture
def plain(checkpoint, tmp_path) -> Path:
    export_onnx(checkpoint, tmp_path / "onnx")
    return tmp_path / "onnx"


def levels(folder: Path) -> dict[str, int]:
    """Product -> its accuracy level."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return {
        node.name: attribute.i
        for node in graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }


def test_all_products_round_where_that_shifts_little_and_the_weights_are_the_same(
    checkpoint, plain, tmp_path
):
    figures = export_onnx(checkpoint, tmp_path / "a8", "A8", ROWS)
    assert set(levels(plain).values()) == {1} and set(levels(tmp_path / "a8").values()) == {4}
    assert figures["products_fp32_count"] == 0 and 0 < figures["rounding_kl_nats"] < 3e-3
    ours, others = decode_onnx(tmp_path / "a8"), decode_onnx(plain)
    assert ours.keys() == others.keys() and all(torch.equal(ours[n], others[n]) for n in ours)

    # The runtime takes it, states differ from fp32 and not by much.
    states = []
    for folder in (plain, tmp_path / "a8"):
        runtime = OnnxRuntime(folder, 1, 64)
        states += runtime.hidden_states(ROWS[:1].tolist())
        assert runtime.generate_ids(ROWS[0, :8].tolist(), 4)
        runtime.close()
    assert 0 < float((states[0] - states[1]).abs().max()) < 0.1 * float(states[0].abs().max())


def test_a_product_rounds_its_activations_block_by_block(checkpoint, plain):
    graph = _Graph(plain, ROWS.tolist())
    graph.with_fp32([])
    name = "model.layers.0.mlp.gate_proj"  # of the embedding's few codes many lie at a half
    node = graph.products[name]
    inside = type(graph.model)()
    inside.CopyFrom(graph.model)
    ends = (node.input[0], node.output[0])
    inside.graph.output.extend(
        onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None) for end in ends
    )
    onnx.save(inside, plain / "model.onnx")
    x, y = fetch(open_session(plain, 1), ROWS[0].tolist(), ends)
    w = load_model(checkpoint).get_parameter(f"{name}.weight").detach().numpy()
    x = x.reshape(-1, x.shape[-1])
    np.testing.assert_allclose(y.reshape(len(x), -1), rounded(x) @ w.T, rtol=1e-4, atol=1e-5)
    assert np.abs(x @ w.T - rounded(x) @ w.T).max() > 1e-3


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_fewest_products_with_the_largest_errors_stay_in_fp32(plain, share):
    everything = round_activations(plain, ROWS, kl_limit_nats=1.0)["rounding_kl_nats"]
    limit = share * everything
    figures = round_activations(plain, ROWS, kl_limit_nats=limit)
    count = int(figures["products_fp32_count"])
    assert 0 < count < len(levels(plain)) and figures["rounding_kl_nats"] <= limit

    # What is written is what was counted, and one product fewer is too few.
    graph = _Graph(plain, ROWS.tolist())
    order = graph.products_by_error()
    assert graph.with_fp32(order[: count - 1])["rounding_kl_nats"] > limit
    assert graph.with_fp32(order[:count]) == figures
    assert {name for name, level in levels(plain).items() if level == 1} == set(order[:count])


def test_no_limit_that_can_be_met_leaves_every_product_in_fp32(plain):
    figures = round_activations(plain, ROWS, kl_limit_nats=0.0)
    assert figures["rounding_kl_nats"] == figures["rounding_turned_share"] == 0
    assert figures["products_fp32_count"] == len(levels(plain))
    assert set(levels(plain).values()) == {1}


def test_errors_are_those_of_float64_in_transformers(checkpoint, plain):
    model, inputs = load_model(checkpoint), {}
    linears = {
        name: module for name, module in model.named_modules() if hasattr(module, "in_features")
    }
    for name, module in linears.items():
        module.register_forward_pre_hook(
            lambda _, given, name=name: inputs.update({name: given[0][0].double()})
        )
    with torch.no_grad():
        model(ROWS[:1])

    errors = {}
    for name, module in linears.items():
        x, w = inputs[name], module.weight.double()
        step = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        near = ((x.unflatten(-1, (-1, 32)) / step).round() * step).flatten(-2)
        errors[name] = float(((x - near) @ w.T).square().sum() / (x @ w.T).square().sum())
    order = _Graph(plain, ROWS.tolist()).products_by_error()
    assert set(order) == set(errors)
    values = [errors[name] for name in order]
    assert all(a >= b * (1 - 1e-2) for a, b in zip(values, values[1:], strict=False))
    assert values[0] > 2 * values[-1]


def test_without_text_or_codes_it_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="onnx:A8 needs rows of training text"):
        export_onnx(checkpoint, tmp_path / "a8", "A8")
    (tmp_path / "parent").mkdir()
    other = tiny_checkpoint(tmp_path / "parent")
    with pytest.raises(ConfigError, match=r"export.files=onnx:A8 writes codes"):
        export_onnx(other, tmp_path / "a8", "A8", ROWS)
    Ptq(grid=GridName.q8_0).run(other, tmp_path / "q8", None)
    with pytest.raises(ConfigError, match="holds only q4_0"):
        export_onnx(tmp_path / "q8", tmp_path / "a8", "A8", ROWS)
    assert not (tmp_path / "a8").exists()
