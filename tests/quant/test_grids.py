"""llama.cpp's grids against three others: the quantizer inside xllamacpp's shared library,
`gguf`'s, and golden bytes; the integer grids against compressed-tensors' own `quantize` and
`dequantize`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from itertools import product
from pathlib import Path

import gguf
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from gguf import quants
from safetensors import safe_open

from compress.quant.grids import GRIDS
from compress.quant.grids.grid import CELL_MARGIN
from compress.quant.grids.nonlinear import E2M1, NUMBERS

TYPES = {
    name: gguf.GGMLQuantizationType[name.upper()] for name in GRIDS if not name.startswith("int")
}
INTEGER = [name for name in GRIDS if name not in TYPES]
SIMPLE = [
    name for name in TYPES if GRIDS[name].block == 32 and name != "iq4_nl"
]  # which the gguf package only reads
# Of the codes whose values do not follow one another.
FLOATS = ("mxfp4", "nvfp4")  # whose steps are floats of a byte
UNEVEN = {"iq4_nl": NUMBERS} | dict.fromkeys(FLOATS, E2M1)
GOLDEN = [
    name for name in TYPES if name not in UNEVEN
]  # they came after the golden file, and are held to llama.cpp's own bytes above
SEARCHED = [name for name, grid in GRIDS.items() if grid.searches]


def _weights(kind: str, name: str = "q4_0") -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    w = torch.randn(300, 5 * 32 if GRIDS[name].block == 32 else 512, generator=g) * 0.05
    if kind == "heavy":
        w = w / torch.rand(w.shape, generator=g).clamp(min=1e-3)
    elif kind == "zero":
        w[::2, 32:96] = 0
    elif kind == "subnormal":  # scales below fp16's smallest normal and smallest subnormal number
        w = w * torch.logspace(-2, -9, 300)[:, None]
    elif kind == "negative_max":
        w[:, ::32] = -1.0
    elif (
        kind == "tied_max"
    ):  # both signs of the largest magnitude: the first one decides the sign of the scale
        w = w.clamp(-0.02, 0.02)
    elif kind == "halves":  # exact ties of rounding
        w = torch.randint(-254, 255, w.shape, generator=g) / 2.0
        w[:, ::32] = 127.0
    elif kind == "signed_zero":
        w[::2] *= 0.0
    elif kind == "one_sided":
        w = w.abs() + 0.01
        w[::2] *= -1
    elif kind == "nearly_constant":  # the fit's sums cancel: any other order of additions shows
        w = w * 1e-5 - 0.3
        w[::2] *= -1
    elif kind == "constant":
        w[:] = torch.linspace(-0.5, 0.5, 300)[:, None]
    return w


KINDS = (
    "random",
    "heavy",
    "zero",
    "subnormal",
    "negative_max",
    "tied_max",
    "halves",
    "signed_zero",
    "one_sided",
    "nearly_constant",
    "constant",
)


@pytest.fixture(scope="module")
def llama_cpp():
    """(w, name) -> the bytes of ggml_quantize_chunk, without importance matrix, in the library
    that xllamacpp installs.
    """
    found = importlib.util.find_spec("xllamacpp")
    library = ctypes.CDLL(str(next(Path(found.submodule_search_locations[0]).glob("*.so"))))
    if not hasattr(library, "ggml_quantize_chunk"):
        pytest.skip("xllamacpp's library does not export ggml_quantize_chunk")
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]

    def quantize(w: torch.Tensor, name: str) -> torch.Tensor:
        block, size = gguf.GGML_QUANT_SIZES[TYPES[name]]
        out = torch.zeros(len(w), w.shape[1] // block * size, dtype=torch.uint8)
        assert (
            chunk(int(TYPES[name]), w.contiguous().data_ptr(), out.data_ptr(), 0, *w.shape, None)
            == out.numel()
        )
        return out

    return quantize


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TYPES)
def test_bytes_equal_llama_cpp(name, kind, llama_cpp):
    grid, w = GRIDS[name], _weights(kind, name)
    packed = grid.pack(*grid.encode(w))
    assert packed.shape[1] * 8 / w.shape[1] == grid.bits_per_weight
    assert torch.equal(packed, llama_cpp(w, name))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "signed_zero"]
)  # gguf's own d has the sign of the first zero
@pytest.mark.parametrize("name", SIMPLE)
def test_bytes_equal_the_gguf_package(name, kind):
    grid, w = GRIDS[name], _weights(kind)
    assert torch.equal(
        grid.pack(*grid.encode(w)), torch.from_numpy(quants.quantize(w.numpy(), TYPES[name]))
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_equal_the_golden_file(name):
    with safe_open(
        Path(__file__).parents[1] / "golden" / "grids.safetensors", framework="pt"
    ) as golden:
        assert golden.metadata()["llama.cpp"] == "b9190"
        w, expected = golden.get_tensor("weight").float(), golden.get_tensor(name)
    assert torch.equal(GRIDS[name].pack(*GRIDS[name].encode(w)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["encode", "search"])
@pytest.mark.parametrize("name", TYPES)
def test_decode_equals_the_reader_bit_for_bit(name, how, kind):
    grid = GRIDS[name]
    codes, scales = _coded(name, how, _weights(kind, name))
    ours = grid.decode(codes, scales)
    theirs = quants.dequantize(grid.pack(codes, scales).numpy(), TYPES[name])
    assert torch.equal(ours.view(torch.int32), torch.from_numpy(theirs).view(torch.int32))


def _coded(name, how, w):
    """Codes and scales of plain rounding, or of searched scales with weights
    that have moved since.
    """
    grid = GRIDS[name]
    codes, scales = grid.encode(w)
    if how == "search":
        scales = grid.search(w) if grid.searches else scales
        codes = grid.codes(w * 1.1, scales)
    return codes, scales


def _reader(name, codes, scales):
    """What compressed-tensors takes: int8 codes, fp32 scales, int8 zero points or None, its
    description of the grid.
    """
    grid = GRIDS[name]
    scale, *zero = scales.float().view(len(codes), -1, grid.stored).unbind(-1)
    args = QuantizationArgs(
        num_bits=8 if name.startswith("int8") else 4,
        symmetric="asym" not in name,
        strategy="group" if grid.block else "channel",
        group_size=grid.block or None,
    )
    return (
        (codes.short() - grid.offset).to(torch.int8),
        scale,
        zero[0].to(torch.int8) if zero else None,
        args,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["encode", "search"])
@pytest.mark.parametrize("name", INTEGER)
def test_integers_decode_as_compressed_tensors_does_bit_for_bit(name, how, kind):
    codes, scales = _coded(name, how, _weights(kind, name))
    theirs = dequantize(*(reader := _reader(name, codes, scales))[:3], reader[3])
    assert torch.equal(GRIDS[name].decode(codes, scales), theirs)
    assert reader[2] is None or torch.equal(
        reader[2].float(), scales.view(len(codes), -1, 2)[..., 1].float()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INTEGER)
def test_integers_round_as_compressed_tensors_does(name, kind):
    w = _weights(kind, name)
    codes, scale, zero, args = _reader(name, *GRIDS[name].encode(w))
    theirs = (
        quantize(w, scale, zero, args).nan_to_num_(0.0).clamp_(min=GRIDS[name].low)
    )  # our int8 leaves -128 out
    groups = w.view(len(w), scale.shape[1], -1)
    alive = (
        (scale != 0)[..., None].expand_as(groups).reshape(w.shape)
    )  # a scale of 0 divides by 0 there
    assert torch.equal(codes[alive].float(), theirs[alive])


@pytest.mark.parametrize(("name", "twin"), [("int4_g32", "q4_0"), ("int8_g32", "q8_0")])
def test_llama_cpps_codes_of_one_scale_are_integers_of_group_32(name, twin):
    w = _weights("random", name)
    codes, scales = GRIDS[twin].encode(w)
    assert (scales < 0).any() or twin == "q8_0"
    assert torch.equal(GRIDS[name].decode(codes, scales), GRIDS[twin].decode(codes, scales))
    reader = _reader(name, codes, scales)
    assert torch.equal(dequantize(*reader[:3], reader[3]), GRIDS[twin].decode(codes, scales))


def _error(grid, w, codes, scales, h=1.0):
    gap = (grid.decode(codes, scales).double() - w.double()).square() * h
    return gap.view(w.shape[0], -1, grid.length(w.shape[1]) if grid.searches else 32).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SEARCHED)
def test_search_is_never_worse_than_round(name, weighted, kind):
    grid, w = GRIDS[name], _weights(kind, name)
    h = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) if weighted else None
    scales = grid.search(w, h)
    found = _error(grid, w, grid.codes(w, scales), scales, 1.0 if h is None else h)
    plain = _error(grid, w, *grid.encode(w), 1.0 if h is None else h)
    assert (found <= plain * (1 + 1e-5) + 1e-30).all()


def test_uneven_numbers_hold_weights_of_a_bell_shape_closer_than_even_ones():
    w = _weights("random")
    errors = {}
    for name in ("q4_0", "iq4_nl"):
        scales = GRIDS[name].search(w)
        errors[name] = _error(GRIDS[name], w, GRIDS[name].codes(w, scales), scales).sum()
    assert errors["iq4_nl"] < 0.9 * errors["q4_0"]


def test_ties_between_uneven_numbers_go_up():
    middles = (torch.tensor(NUMBERS[1:]) + torch.tensor(NUMBERS[:-1])) / 2
    grid = GRIDS["iq4_nl"]
    assert torch.equal(grid.rounded(middles.clone()), torch.tensor(NUMBERS[1:]).float())
    below = torch.nextafter(middles, torch.tensor(-1e9))
    assert torch.equal(grid.rounded(below), torch.tensor(NUMBERS[:-1]).float())


def test_ties_between_numbers_of_e2m1_go_to_the_smaller_magnitude():
    numbers = torch.tensor(E2M1[:8]).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    for name, sign in product(FLOATS, (1, -1)):
        grid = GRIDS[name]
        assert torch.equal(grid.rounded(sign * middles), sign * numbers[:-1])
        beyond = torch.nextafter(middles, torch.tensor(1e9))
        assert torch.equal(grid.rounded(sign * beyond), sign * numbers[1:])


def test_a_searched_exponent_is_the_best_of_its_neighbours():
    grid, w = GRIDS["mxfp4"], _weights("heavy")
    found = grid.search(w)
    least = torch.stack(
        [_error(grid, w, grid.codes(w, s), s) for s in (found - 2, found - 1, found, found + 1)]
    )
    plain = grid.encode(w)[1]
    assert ((found - plain).abs() <= 1).all() and (found != plain).any()
    rows = (found - plain).abs().view(-1) < 1  # both neighbours were tried
    assert (least[2].view(-1)[rows] <= least[[1, 3]].amin(0).view(-1)[rows]).all()


def test_a_searched_step_of_a_byte_is_the_best_of_all():
    grid, w = GRIDS["nvfp4"], _weights("random", "nvfp4")[:20]
    shape = (20, w.shape[1] // 16)
    every = torch.stack(
        [
            _error(grid, w, grid.codes(w, s), s)
            for s in torch.arange(127.0).half()[:, None, None].expand(-1, *shape)
        ]
    )
    found = grid.search(w)
    assert torch.equal(_error(grid, w, grid.codes(w, found), found), every.amin(0))
    assert (found != grid.encode(w)[1]).float().mean() > 0.5


def test_steps_of_a_byte_are_those_of_torch():
    torchs = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(GRIDS["nvfp4"].steps[:127], torchs / 2)
    assert not GRIDS["nvfp4"].steps[127:].any()


@pytest.mark.parametrize(
    ("name", "share"), [("q4_0", 0.9), ("q5_0", 0.9), ("q8_0", 0.9), ("nvfp4", 0.9)]
)
def test_search_gains_on_gaussian_weights(name, share):
    grid, w = GRIDS[name], _weights("random", name)
    scales = grid.search(w)
    assert (
        _error(grid, w, grid.codes(w, scales), scales).sum()
        < share * _error(grid, w, *grid.encode(w)).sum()
    )


def test_importance_by_row_equals_importance_by_column_when_rows_agree():
    grid, w = GRIDS["q4_0"], _weights("heavy")
    h = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1))
    assert torch.equal(grid.search(w, h), grid.search(w, h.expand_as(w)))


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_the_nearest_for_scales_of_either_sign(name):
    grid, w = GRIDS[name], _weights("random", name)[:8]
    scales = grid.encode(w)[1].view(-1, grid.stored)
    if name not in FLOATS:
        scales = scales * torch.ones(grid.stored).index_fill(0, torch.tensor(0), -1.0).half()
        scales = torch.cat([scales[::2].neg(), scales[1::2]])
    scales = scales.view(8, -1)
    got = _error(grid, w, grid.codes(w, scales), scales).view(8, -1)
    step, floor = grid.levels(scales.view(-1, grid.stored))
    numbers = torch.tensor(UNEVEN.get(name, range(grid.low, grid.high + 1)))
    levels = numbers * step.double()[..., None] + (
        0 if floor is None else floor.double()[..., None]
    )
    best = (w.double().view(*step.shape[:2], -1, 1) - levels).square().amin(-1)
    assert torch.allclose(got, best.view(8, got.shape[1], -1).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_decoded_weights_are_a_fixed_point(name):
    grid, w = GRIDS[name], _weights("heavy", name)
    codes, scales = grid.encode(w)
    decoded = grid.decode(codes, scales)
    again = grid.codes(decoded, scales)
    assert torch.equal(grid.decode(again, scales), decoded)
    assert (
        torch.equal(again, codes) or grid.block == 256
    )  # where a K-quant's step is 0, every code is the same value


@pytest.mark.parametrize("name", GRIDS)
def test_snap_is_decode_of_codes(name):
    grid, w = GRIDS[name], _weights("heavy", name)
    scales, out = grid.encode(w)[1], torch.empty_like(w)
    grid.snap(w * 1.2, scales, out)
    assert torch.equal(
        out, grid.decode(grid.codes(w * 1.2, scales), scales)
    )  # but for the sign of zeros


@pytest.mark.parametrize("name", GRIDS)
def test_zero_and_underflowing_blocks_decode_to_zero(name):
    grid = GRIDS[name]
    tiny = 1e-39 if name == "mxfp4" else 1e-12  # which an exponent still reaches
    w = torch.tensor([0.0, 1e-39, -tiny])[:, None].repeat(1, grid.length(96))
    codes, scales = grid.encode(w)
    assert not grid.decode(codes, scales).any() and not scales.view(3, -1)[:, 0].any()
    found = grid.search(w) if grid.searches else scales
    assert not grid.decode(grid.codes(w, found), found).any()
    zero = UNEVEN[name].index(name == "iq4_nl") if name in UNEVEN else grid.offset
    assert (grid.codes(w, found) == zero).all()


@pytest.mark.parametrize("name", GRIDS)
def test_result_does_not_depend_on_threads(name):
    grid = GRIDS[name]
    w = torch.randn(
        1500, 96 if grid.block in (0, 32) else 256, generator=torch.Generator().manual_seed(0)
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((*grid.encode(w), *([grid.search(w)] if grid.searches else [])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("method", ["encode", "search"])
def test_rows_that_do_not_divide_are_refused_with_tensor_rule_and_nearest(method):
    message = (
        r"up_proj\.weight has shape \(4, 60\): q4_0 .* multiples of 32 .* nearest legal row length"
        r" is 64"
    )
    with pytest.raises(ValueError, match=message):
        getattr(GRIDS["q4_0"], method)(torch.zeros(4, 60), name="up_proj.weight")


def test_steps_side_by_side_need_rows_of_64():
    message = r"up_proj\.weight has shape \(4, 48\): nvfp4 .* multiples of 64 .* is 64"
    with pytest.raises(ValueError, match=message):
        GRIDS["nvfp4"].encode(torch.zeros(4, 48), name="up_proj.weight")


def test_k_quants_say_256():
    with pytest.raises(
        ValueError,
        match=(
            r"up_proj\.weight has shape \(4, 576\): q6_k .* multiples of 256 .* nearest legal row"
            r" length is 512"
        ),
    ):
        GRIDS["q6_k"].encode(torch.zeros(4, 576), name="up_proj.weight")


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in SEARCHED])
def test_a_grid_without_search_says_so(name):
    with pytest.raises(ValueError, match=f"grid {name} has no search of scales; use scales=round"):
        GRIDS[name].search(torch.zeros(4, 256))


def test_integer_grids_have_no_bytes_in_a_gguf():
    grid = GRIDS["int8_g64"]
    with pytest.raises(
        ValueError,
        match=(
            "grid int8_g64 is not llama.cpp's and has no bytes in a GGUF; export compressed_tensors"
        ),
    ):
        grid.pack(*grid.encode(torch.zeros(4, 64)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_with_the_tensor(value):
    w = torch.zeros(4, 64)
    w[2, 5] = value
    with pytest.raises(ValueError, match=r"up_proj\.weight holds NaN or infinity"):
        GRIDS["q8_0"].encode(w, name="up_proj.weight")


@pytest.mark.parametrize("name", GRIDS)
def test_values_that_no_stored_scale_reaches_are_refused(name):
    with pytest.raises(ValueError, match=r"up_proj\.weight holds a value beyond"):
        GRIDS[name].encode(torch.full((1, 256), 1.5 * GRIDS[name].largest), name="up_proj.weight")
    w = _weights("random", name)
    assert grid_is_finite(GRIDS[name], w / w.abs().max() * GRIDS[name].largest)


@pytest.mark.parametrize("name", GRIDS)
def test_subnormal_weights_decode_to_zero(name):
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 1e-40
    assert not GRIDS[name].decode(*GRIDS[name].encode(w)).any()


def grid_is_finite(grid, w) -> bool:
    return bool(grid.decode(*grid.encode(w)).isfinite().all())


@pytest.mark.parametrize("name", GRIDS)
def test_a_trial_is_plain_rounding_or_little_worse(name):
    grid, w = GRIDS[name], _weights("random", name)
    plain = (grid.decode(*grid.encode(w)) - w).square().sum()
    trial = (grid.trial(w) - w).square().sum()
    assert trial <= (1.3 if name in ("iq4_nl", "q4_k") else 1.0) * plain


def test_a_trial_of_q4_k_hardly_moves_what_lies_on_q4_1():
    w = _weights("random", "q4_k")
    w = GRIDS["q4_1"].decode(*GRIDS["q4_1"].encode(w))
    lost = [(grid.trial(w) - w).square().sum() for grid in (GRIDS["q4_k"], GRIDS["iq4_nl"])]
    assert 0 < lost[0] < lost[1] / 5


@pytest.mark.parametrize("name", GRIDS)
def test_a_weight_comes_back_as_far_as_its_code_reaches(name):
    grid, w = GRIDS[name], _weights("normal", name)
    nearest, scales = grid.encode(w)
    error = (w - grid.decode(nearest, scales)).std()
    moved = w + 1.5 * error * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    codes = grid.codes(moved, scales)
    kept, values = grid.within(w, codes, scales), grid.decode(codes, scales)

    # Every code is kept; a weight that has its own is as it was.
    assert torch.equal(grid.codes(kept, scales), codes)
    same = grid.codes(w, scales) == codes
    assert 0.1 < same.float().mean() < 1 and torch.equal(kept[same], w[same])

    # Of the others none could go on: a hundredth behind the margin is another code.
    beyond = values + (kept - values) / (1 - CELL_MARGIN) * 1.01
    changed = grid.codes(beyond, scales) != codes
    assert changed[~same].float().mean() > 0.99
    assert ((kept - w).abs() <= (values - w).abs())[~same].all()


# Plain rounding chooses other scales for values that lie on these.
NOT_FOUND_AGAIN = ["iq4_nl", "int4_asym_g32", "int4_asym_g64", "int4_asym_g128"]


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_holds_what_was_decoded_from_it_and_nothing_else(name):
    grid, w = GRIDS[name], _weights("normal", name)
    decoded = grid.decode(*grid.encode(w))
    assert (grid.holds(decoded) or name in NOT_FOUND_AGAIN) and not grid.holds(w)

    # Rows may have been multiplied, as by a factor that is folded into them, where a block has
    # fp16 numbers of its own.
    if name in ("q4_0", "q4_1", "q5_0", "q8_0"):
        assert grid.holds(decoded * torch.linspace(0.5, 2, len(w))[:, None])
        assert grid.holds(decoded.bfloat16()), "as a stage in between has stored it"

    # What lies beside it behind the first rows is found too.
    decoded[150:] = w[150:]
    assert not grid.holds(decoded)
