"""The search itself, on landscapes whose best shape is known by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from compress.search.explore import (
    Clock,
    Damages,
    Effort,
    explore,
    halve,
    mutations,
    singles,
)
from compress.search.limits import Bound, allowed, edge
from compress.search.shapes import STRUCTURES, Levels, Shape

LEVELS = Levels((480, 360, 320, 240), tuple(range(30, 14, -1)), tuple(range(24, 11, -1)), (3, 2, 1))
FULL = LEVELS.full


def size(shape: Shape) -> float:
    return 60 * shape.ids + shape.blocks * (60 * shape.ffn + 250 * shape.kv_heads)


def landscape(seed: int):
    """Loss of every shape: convex in each structure, and worse together than apart."""
    rng = np.random.default_rng(seed)
    weight, power = rng.uniform(0.3, 2, 4), rng.uniform(1.2, 2.5, 4)
    together = rng.uniform(0, 3)

    def loss(shape: Shape) -> float:
        cut = 1 - np.array(shape) / np.array(FULL)
        parts = weight * cut**power
        return float(parts.sum() + together * (parts.sum() ** 2 - (parts**2).sum()))

    return loss


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.85, 0.65])
def test_a_few_measured_shapes_come_within_two_percent_of_the_best_of_all(seed, share):
    loss = landscape(seed)
    figures = {shape: {"size_bytes": size(shape)} for shape in LEVELS.shapes()}
    shapes = allowed(figures, [Bound("size_bytes", share * size(FULL), True)])
    starts = edge(shapes, LEVELS)
    damages = Damages(FULL, {shape: loss(shape) for shape in singles(LEVELS, starts, 3)})
    calls = []

    def measure(waiting):
        calls.extend(waiting)
        return {shape: loss(shape) for shape in waiting}

    measured = explore(
        starts, lambda s: mutations(s, LEVELS, shapes), damages, measure, Effort(rounds=4)
    )
    best = min(map(loss, shapes))
    assert min(measured.values()) <= 1.02 * best
    assert len(calls) == len(set(calls)) == len(measured) <= 6 + 3 * 4 < len(starts)
    assert all(shape in shapes for shape in measured)


def test_single_damages_are_read_between_measured_levels_and_never_fall_with_a_deeper_cut():
    alone = {
        FULL._replace(blocks=20): 0.5,
        FULL._replace(blocks=25): 0.1,
        FULL._replace(ids=240): 0.2,
        FULL._replace(ids=320): 0.3,  # noise: a deeper cut loses no less
        FULL._replace(ids=240, blocks=20): 9.0,  # not alone
    }
    damages = Damages(FULL, alone)
    assert damages.sum(FULL) == 0
    assert damages.parts(FULL._replace(blocks=22))[1] == pytest.approx(0.34)
    assert damages.parts(FULL._replace(blocks=15))[1] == pytest.approx(0.9)
    assert damages.parts(FULL._replace(ids=240))[0] >= damages.parts(FULL._replace(ids=320))[0]
    assert damages.sum(Shape(240, 20, 24, 3)) == pytest.approx(0.8)


def test_whole_shapes_correct_the_scale_of_what_was_measured_alone():
    alone = {FULL._replace(blocks=20): 1.0, FULL._replace(ffn=12): 1.0}
    damages = Damages(FULL, alone)
    measured = {
        Shape(480, blocks, ffn, 3): 2 * damages.parts(Shape(480, blocks, ffn, 3))[1]
        + 0.5 * damages.parts(Shape(480, blocks, ffn, 3))[2]
        for blocks, ffn in ((28, 24), (25, 18), (22, 22), (20, 12), (30, 14))
    }
    estimate = damages.corrected(measured)
    for shape, nats in measured.items():
        assert estimate(shape) == pytest.approx(nats, rel=0.05)
    assert damages.corrected({})(FULL._replace(blocks=20)) == pytest.approx(1.0)


def test_single_levels_are_even_and_end_at_the_lowest_that_is_used():
    used = [Shape(480, blocks, 24, 3) for blocks in range(24, 31)]
    assert singles(LEVELS, used, 3) == [FULL._replace(blocks=b) for b in (24, 28, 26)]
    used += [Shape(240, 30, 20, 3)]
    first = singles(LEVELS, used, 3)[:3]
    assert first == [FULL._replace(ids=240), FULL._replace(blocks=24), FULL._replace(ffn=20)]


def test_mutants_move_two_structures_and_stay_on_the_edge():
    figures = {shape: {"size_bytes": size(shape)} for shape in LEVELS.shapes()}
    shapes = allowed(figures, [Bound("size_bytes", 0.7 * size(FULL), True)])
    on_edge = set(edge(shapes, LEVELS))
    start = sorted(on_edge)[len(on_edge) // 2]
    children = mutations(start, LEVELS, shapes)
    assert children <= on_edge and start not in children and len(children) > 2
    for child in children:
        assert any(getattr(child, name) > getattr(start, name) for name in STRUCTURES)
        assert any(getattr(child, name) < getattr(start, name) for name in STRUCTURES)


def test_healing_halves_the_survivors_and_a_rung_that_is_not_finished_does_not_count():
    shapes = [FULL._replace(blocks=b) for b in (30, 29, 28, 27, 26)]
    late = {shape: float(shape.blocks) for shape in shapes}  # the last one heals best
    asked = []

    def heal(survivors, tokens):
        asked.append((len(survivors), tokens))
        return {s: late[s] for s in survivors[: 1 if tokens > 10_000 else None]}

    steps = ((4096, 4), (16384, 2))
    rungs = halve(shapes, heal, steps)
    assert asked == [(4, 4096), (2, 16384)] and [tokens for tokens, _ in rungs] == [4096]
    assert sorted(rungs[0][1]) == sorted(shapes[:4])
    assert halve(shapes[:1], heal, steps) == []


def test_mutants_are_tried_in_the_order_that_measured_shapes_have_taught():
    """Alone both structures lose alike; together the blocks turn out to be ten times as dear."""
    alone = {FULL._replace(blocks=20): 1.0, FULL._replace(ffn=14): 1.0}
    damages = Damages(FULL, alone)
    children = [FULL._replace(blocks=25), FULL._replace(ffn=18), FULL._replace(ffn=17)]

    def loss(shape):
        parts = damages.parts(shape)
        return 10 * parts[1] + parts[2]

    tried = []

    def measure(waiting):
        tried.append(waiting)
        return {shape: float(loss(shape)) for shape in waiting}

    starts = [FULL._replace(blocks=28), FULL._replace(ffn=23), Shape(480, 29, 22, 3)]
    effort = Effort(first=3, parents=1, children=2, rounds=2)
    explore(starts, lambda s: set(children), damages, measure, effort)
    assert damages.sum(children[0]) < damages.sum(children[1])
    assert tried[1] == [FULL._replace(ffn=18), FULL._replace(ffn=17)]


def test_a_clock_knows_what_still_fits():
    times = iter([0.0, 30.0, 30.0, 59.0, 59.0])
    clock = Clock(1, lambda: next(times))
    assert clock.allows(20) and not clock.allows(20, 0.5)
    assert not clock.allows(2) and str(clock) == "0.0 min left"


def test_a_measurement_that_stops_early_ends_the_search_with_what_is_there():
    figures = {shape: {"size_bytes": size(shape)} for shape in LEVELS.shapes()}
    shapes = allowed(figures, [Bound("size_bytes", 0.7 * size(FULL), True)])
    loss = landscape(0)
    measured = explore(
        edge(shapes, LEVELS),
        lambda s: mutations(s, LEVELS, shapes),
        Damages(FULL, {}),
        lambda waiting: {waiting[0]: loss(waiting[0])},
        Effort(),
    )
    assert len(measured) == 1
