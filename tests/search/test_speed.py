"""Times of shapes: coefficients from a few, errors on others, files that are timed for real."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from compress.errors import ResourceError
from compress.models.checkpoint import read_config
from compress.models.gguf_header import check_file
from compress.prune.vocabulary import Usage
from compress.score.latency import Timing
from compress.search import speed
from compress.search.kept import Kept
from compress.search.shapes import Family, Levels, Shape
from compress.search.sizes import Sizes, Skeletons
from compress.store import Store

LEVELS = Levels((49152, 32768, 24576), tuple(range(30, 14, -1)), (1536, 1152, 768), (3, 2, 1))
TRUE = np.array([0.3, 0.03, 0.006, 3e-5, 1.2e-5])  # call, block, attention, ffn, head


def synthetic(shape: Shape, noise: float = 1.0) -> dict[str, float]:
    """What a machine of known costs would take: an oracle written out term by term."""
    a, b, c, d, e = TRUE
    of_block = b + c * shape.kv_heads + d * shape.ffn
    ms = (a + shape.blocks * of_block + e * shape.ids) * noise
    return {"latency_ms_p50": ms, "token_ms": ms, "ttft_ms_p50": 20 * ms, "peak_rss_bytes": 1e8}


def test_coefficients_come_back_from_exact_times():
    fit, checks = speed.design(LEVELS, 4)
    model = speed.fitted({s: synthetic(s) for s in fit}, {s: synthetic(s) for s in checks})
    assert np.allclose(model.coefficients["latency_ms_p50"], TRUE, rtol=1e-6)
    assert np.allclose(model.coefficients["ttft_ms_p50"], 20 * TRUE, rtol=1e-6)
    assert model.error_p95() < 1e-9
    figures = model.predict(Shape(40000, 20, 1000, 2))
    ms = synthetic(Shape(40000, 20, 1000, 2))["latency_ms_p50"]
    assert figures["latency_ms_p50"] == pytest.approx(ms)
    assert figures["tok_per_sec"] == pytest.approx(1000 / ms) and "token_ms" not in figures


def test_noise_shows_on_shapes_that_were_not_fitted():
    rng = np.random.default_rng(0)
    fit, checks = speed.design(LEVELS, 8)
    noisy = {s: synthetic(s, rng.normal(1, 0.03)) for s in [*fit, *checks]}
    model = speed.fitted({s: noisy[s] for s in fit}, {s: noisy[s] for s in checks})
    assert 0.001 < model.error_p95() < 0.2
    assert min(model.coefficients["latency_ms_p50"]) >= 0


def test_the_shapes_that_are_timed_tell_all_terms_apart_and_checks_are_others():
    fit, checks = speed.design(LEVELS, 4)
    rows = np.array([speed.terms(shape) for shape in fit])
    assert np.linalg.matrix_rank(rows / rows.max(0)) == len(speed.TERMS) < len(fit)
    assert len(checks) == 4 and not set(fit) & set(checks)
    lowest = Shape(*(row[-1] for row in LEVELS))
    assert LEVELS.full in fit and lowest not in fit, "it may lie in the cache"
    assert speed.design(LEVELS, 4) == (fit, checks)


@pytest.mark.parametrize("broken", [{"latency_ms_p50": -1.0}, {"ttft_ms_p50": float("nan")}])
def test_times_that_are_none_are_refused(broken):
    fit, checks = speed.design(LEVELS, 4)
    times = {s: synthetic(s) for s in fit}
    times[fit[0]] |= broken
    with pytest.raises(ValueError, match="finite times above 0"):
        speed.fitted(times, {s: synthetic(s) for s in checks})


def test_too_few_shapes_and_a_busy_machine_are_refused():
    fit, checks = speed.design(LEVELS, 4)
    with pytest.raises(ValueError, match="at least 3 different shapes"):
        speed.fitted({s: synthetic(s) for s in fit[:2]}, {})
    wild = {s: synthetic(s, 1.0 + 3.0 * (i % 2)) for i, s in enumerate(checks)}
    with pytest.raises(ResourceError, match="too busy"):
        speed.fitted({s: synthetic(s) for s in fit}, wild)


@pytest.fixture
def bench(tiny_teacher, tmp_path):
    family = Family(read_config(tiny_teacher), "q4_0", None)
    skeletons = Skeletons(tiny_teacher, lambda: Usage(Counter(), {}), tmp_path / "skeletons")
    timing = Timing(8, 3, 1, threads=1)
    kept = Kept(Store(tmp_path / "store"), speed.settings_of(family, timing))
    return speed.Bench(family, skeletons, kept, tmp_path / "files"), timing


def test_a_real_file_of_random_weights_has_the_predicted_bytes_and_can_be_timed(bench):
    bench, timing = bench
    shape = Shape(512, 2, 128, 1)
    file = bench._file(shape)
    check_file(file)
    sizes = Sizes(bench.family, bench.skeletons.header_bytes)
    assert file.stat().st_size == sizes.file_bytes(shape)
    times = bench.times([shape], timing, 1, lambda line: None)
    assert all(times[shape][name] > 0 for name in speed.PREDICTED)
    assert not bench.folder.exists(), "files of random weights are removed"


def test_rounds_alternate_and_what_is_kept_is_not_measured_again(bench, monkeypatch):
    bench, timing = bench
    order, lines = [], []
    monkeypatch.setattr(speed.Bench, "_file", lambda self, shape: shape)
    monkeypatch.setattr(speed, "_peak_bytes", lambda shape, once: 1e6 * shape.blocks)

    def timed(shapes, runtime, once):
        order.append(shapes)
        records = [synthetic(shape, len(order)) for shape in shapes]
        return [record | {"tok_per_sec": 1000 / record["token_ms"]} for record in records]

    monkeypatch.setattr(speed, "measure_in_turn", timed)
    shapes = [Shape(512, 4, 192, 2), Shape(512, 2, 192, 2)]
    times = bench.times(shapes, timing, 3, lines.append)
    assert order == [shapes, shapes[::-1], shapes] and "s left" in lines[-1]
    for shape in shapes:  # the middle of three rounds
        expected = synthetic(shape, 2) | {"peak_rss_bytes": 1e6 * shape.blocks}
        assert times[shape] == pytest.approx(expected)

    again = Kept(bench.kept.store, bench.kept.settings)
    fresh = speed.Bench(bench.family, bench.skeletons, again, bench.folder)
    assert fresh.times(shapes, timing, 3, lines.append) == times and len(order) == 3


def test_slow_models_are_timed_in_fewer_rounds(bench, monkeypatch):
    bench, timing = bench
    monkeypatch.setattr(speed, "_peak_bytes", lambda file, once: 1e6)
    monkeypatch.setattr(speed.Bench, "_file", lambda self, shape: shape)
    record = {"seconds": 50.0, "times": [synthetic(Shape(512, 4, 192, 2))]}
    monkeypatch.setattr(speed.Bench, "_round", lambda self, shapes, once: record)
    for longest, rounds in ((1e9, 9), (260.0, 5), (1.0, speed.LEAST_ROUNDS)):
        monkeypatch.setattr(speed, "LONGEST_SECONDS", longest)
        lines = []
        bench.times([Shape(512, 4, 192, 2)], timing, 9, lines.append)
        assert sum("round" in line for line in lines) == rounds


def test_a_machine_that_is_slow_for_a_round_changes_no_time():
    """Every round has a speed of its own; within rounds one shape is now and then disturbed."""
    rng = np.random.default_rng(1)
    shapes, _ = speed.design(LEVELS, 0)
    exact = [synthetic(shape) for shape in shapes]
    pace = np.exp(rng.normal(0, 0.3, 15))
    rounds = [
        [{name: value * factor for name, value in figures.items()} for figures in exact]
        for factor in pace
    ]
    rounds[3][2]["latency_ms_p50"] *= 5
    ratios = [
        record["latency_ms_p50"] / figures["latency_ms_p50"]
        for record, figures in zip(speed.steady(rounds), exact, strict=True)
    ]
    assert max(ratios) / min(ratios) == pytest.approx(1)
    assert ratios[0] == pytest.approx(np.median(pace), rel=0.1)
