"""Which shapes a budget allows, and the sentences of what it forbids."""

from __future__ import annotations

from itertools import product

import pytest

from compress.budget import Limit
from compress.errors import ConfigError
from compress.search.limits import Bound, allowed, bounds_of, check_possible, edge
from compress.search.shapes import Levels, Shape

LEVELS = Levels((400, 300, 200), (8, 7, 6, 5, 4), (128, 64), (2, 1))
FIGURES = {
    shape: {
        "size_bytes": 1e4 * shape.ids
        + 1e3 * shape.blocks * (10 * shape.ffn + 300 * shape.kv_heads),
        "latency_ms_p50": 0.1 * shape.blocks + 0.001 * shape.ids,
        "tok_per_sec": 1000 / (0.1 * shape.blocks + 0.001 * shape.ids),
    }
    for shape in LEVELS.shapes()
}


def test_limits_of_shapes_alone_become_bounds_with_the_margin_of_their_prediction():
    limits = {
        "size_bytes": Limit(max=60e6),
        "tok_per_sec": Limit(min=100),
        "open/kept": Limit(min=0.6),
    }
    size, speed = bounds_of(limits, {"tok_per_sec": 0.02})
    assert size == Bound("size_bytes", 60e6, True) and size.holds(60e6) and not size.holds(60.1e6)
    assert not speed.holds(101.9) and speed.holds(102.1)
    fast = Bound("latency_ms_p50", 3.0, True, 0.02)
    assert fast.holds(2.93) and not fast.holds(2.95)
    assert bounds_of({"latency_ms_p50": Limit(max=3)}, {"latency_ms_p50": 0.3})[0].margin == 0.05
    with pytest.raises(ConfigError, match="limits none of size_bytes"):
        bounds_of({"open/kept": Limit(min=0.6)}, {})


def test_the_edge_is_what_brute_force_says():
    shapes = allowed(FIGURES, [Bound("size_bytes", 9e6, True), Bound("latency_ms_p50", 1.0, True)])
    assert shapes

    # By another way: no allowed shape is larger in one structure and smaller in none.
    def beaten(shape):
        return any(
            other != shape and all(o >= s for o, s in zip(other, shape, strict=True))
            for other in shapes
        )

    assert edge(shapes, LEVELS) == sorted(shape for shape in shapes if not beaten(shape))


def test_a_budget_that_no_shape_meets_names_limit_and_nearest():
    with pytest.raises(ConfigError) as error:
        check_possible(FIGURES, [Bound("size_bytes", 1e6, True), Bound("latency_ms_p50", 9, True)])
    least = min(figures["size_bytes"] for figures in FIGURES.values())
    assert "no shape of this teacher meets size_bytes at most 1.0 MB" in str(error.value)
    assert f"the nearest is {least / 1e6:.1f} MB, of {Shape(200, 4, 64, 1)}" in str(error.value)

    # What is named can be met.
    check_possible(FIGURES, [Bound("size_bytes", round(least / 1e6 + 0.05, 1) * 1e6, True)])


def test_limits_that_exclude_each_other_say_what_each_could_be():
    hard = {s: f | {"latency_ms_p50": 1 / s.blocks} for s, f in FIGURES.items()}
    bounds = [Bound("size_bytes", 6e6, True), Bound("latency_ms_p50", 0.13, True)]
    assert allowed(hard, bounds[:1]) and allowed(hard, bounds[1:]) and not allowed(hard, bounds)
    with pytest.raises(ConfigError, match="Beside the others size_bytes could be .* MB; latency"):
        check_possible(hard, bounds)


def test_a_relaxed_bound_has_more_room_on_its_side():
    for is_most, figure in product((True, False), (94, 106)):
        bound = Bound("x", 100, is_most).relaxed(0.1)
        assert bound.holds(figure)
