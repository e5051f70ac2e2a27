"""llama.cpp's grids against the `gguf` package, which equals llama.cpp's own quantizer byte for byte on these two."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf import quants

from compress.quant.grids import GRIDS

TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}


def _weights(kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    w = torch.randn(300, 160, generator=g) * 0.05
    if kind == "heavy":
        w = w / torch.rand(w.shape, generator=g).clamp(min=1e-3)
    elif kind == "zero":
        w[::2, 32:96] = 0
    elif kind == "subnormal":  # scales below fp16's smallest normal and smallest subnormal number
        w = w * torch.logspace(-2, -9, 300)[:, None]
    elif kind == "negative_max":
        w[:, ::32] = -1.0
    elif kind == "tied_max":  # both signs of the largest magnitude: the first one decides the sign of the scale
        w = w.clamp(-0.02, 0.02)
    elif kind == "halves":  # exact ties of rounding
        w = torch.randint(-254, 255, w.shape, generator=g) / 2.0
        w[:, ::32] = 127.0
    return w


KINDS = ("random", "heavy", "zero", "subnormal", "negative_max", "tied_max", "halves")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRIDS)
def test_bytes_equal_llama_cpp(name, kind):
    grid, w = GRIDS[name], _weights(kind)
    codes, scales = grid.encode(w)
    expected = torch.from_numpy(quants.quantize(w.numpy(), TYPES[name]))
    packed = grid.pack(codes, scales)
    assert packed.shape[1] * 8 / w.shape[1] == grid.bits_per_weight
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["encode", "search"])
@pytest.mark.parametrize("name", GRIDS)
def test_decode_equals_the_reader_bit_for_bit(name, how, kind):
    grid, w = GRIDS[name], _weights(kind)
    codes, scales = grid.encode(w)
    if how == "search":
        scales = grid.search(w)
        codes = grid.codes(w, scales)
    ours = grid.decode(codes, scales)
    theirs = quants.dequantize(grid.pack(codes, scales).numpy(), TYPES[name])
    assert torch.equal(ours.view(torch.int32), torch.from_numpy(theirs).view(torch.int32))


def _error(grid, w, codes, scales, h=1.0):
    gap = (grid.decode(codes, scales).double() - w.double()).square() * h
    return gap.view(w.shape[0], -1, 32).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_search_is_never_worse_than_round(name, weighted, kind):
    grid, w = GRIDS[name], _weights(kind)
    h = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) if weighted else None
    scales = grid.search(w, h)
    found = _error(grid, w, grid.codes(w, scales), scales, 1.0 if h is None else h)
    plain = _error(grid, w, *grid.encode(w), 1.0 if h is None else h)
    assert (found <= plain * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize(("name", "share"), [("q4_0", 0.9), ("q8_0", 0.9)])
def test_search_gains_on_gaussian_weights(name, share):
    grid, w = GRIDS[name], _weights("random")
    scales = grid.search(w)
    assert _error(grid, w, grid.codes(w, scales), scales).sum() < share * _error(grid, w, *grid.encode(w)).sum()


def test_importance_by_row_equals_importance_by_column_when_rows_agree():
    grid, w = GRIDS["q4_0"], _weights("heavy")
    h = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1))
    assert torch.equal(grid.search(w, h), grid.search(w, h.expand_as(w)))


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_the_nearest_for_scales_of_either_sign(name):
    grid, w = GRIDS[name], _weights("random")[:8]
    scales = grid.encode(w)[1] * torch.tensor([1, -1]).repeat(20)[: 8 * 5].view(8, 5).half()
    got = _error(grid, w, grid.codes(w, scales), scales)
    levels = torch.arange(grid.low, grid.high + 1).view(1, 1, 1, -1) * scales.double()[:, :, None, None]
    best = (w.double().view(8, 5, 32, 1) - levels).square().amin(-1).sum(-1)
    assert torch.allclose(got, best, rtol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_of_decoded_weights_are_the_same_codes(name):
    grid, w = GRIDS[name], _weights("heavy")
    codes, scales = grid.encode(w)
    assert torch.equal(grid.codes(grid.decode(codes, scales), scales), codes)


@pytest.mark.parametrize("name", GRIDS)
def test_zero_and_underflowing_blocks_decode_to_zero(name):
    grid = GRIDS[name]
    w = torch.cat([torch.zeros(1, 32), torch.full((1, 32), 1e-39), torch.full((1, 32), -1e-12)])
    codes, scales = grid.encode(w)
    assert not scales.any() and not grid.decode(codes, scales).any()
    found = grid.search(w)
    assert not grid.decode(grid.codes(w, found), found).any()
    assert (grid.codes(w, found) == grid.offset).all()


def test_result_does_not_depend_on_threads():
    grid, w = GRIDS["q4_0"], torch.randn(1500, 96, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((*grid.encode(w), grid.search(w)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("method", ["encode", "search"])
def test_rows_that_do_not_divide_are_refused_with_tensor_rule_and_nearest(method):
    message = r"up_proj\.weight has shape \(4, 60\): q4_0 .* multiples of 32 .* nearest legal row length is 64"
    with pytest.raises(ValueError, match=message):
        getattr(GRIDS["q4_0"], method)(torch.zeros(4, 60), name="up_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_with_the_tensor(value):
    w = torch.zeros(4, 64)
    w[2, 5] = value
    with pytest.raises(ValueError, match=r"up_proj\.weight holds NaN or infinity"):
        GRIDS["q8_0"].encode(w, name="up_proj.weight")


def test_values_whose_scale_overflows_fp16_are_refused():
    with pytest.raises(ValueError, match=r"up_proj\.weight holds a value beyond"):
        GRIDS["q4_0"].encode(torch.full((1, 32), 1e6), name="up_proj.weight")
