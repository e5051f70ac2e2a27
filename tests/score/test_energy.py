"""Joules a token from the counters of processor packages, and what tokens cost."""

from __future__ import annotations

import pytest

from compress.score import energy
from compress.score.energy import Counter, counters, joules_between
from compress.score.latency import Timing, derived


def powercap(folder, **microjoules):
    """Counters as Linux shows them; there are none on the machines that run this."""
    for name, value in microjoules.items():
        zone = folder / name.replace("_", ":")
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "energy_uj").write_text(f"{value}\n")
        (zone / "max_energy_range_uj").write_text("999999\n")
    return folder


def test_packages_are_read_and_their_parts_are_not_from_a_folder_in_their_form(tmp_path):
    folder = powercap(tmp_path, **{"intel-rapl_0": 5, "intel-rapl_1": 7, "intel-rapl_0_0": 100})
    (tmp_path / "intel-rapl").mkdir()
    assert counters(folder) == {
        "intel-rapl:0": Counter(5, 999_999),
        "intel-rapl:1": Counter(7, 999_999),
    }
    assert counters(tmp_path / "absent") == {}

    # One that can't be read leaves no figure of the others.
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert counters(folder) == {}


def test_a_counter_that_began_again_counts_on():
    before = {"a": Counter(999_000, 999_999), "b": Counter(10, 999_999)}
    after = {"a": Counter(2_000, 999_999), "b": Counter(500_010, 999_999)}
    assert joules_between(before, after) == pytest.approx((3_000 + 500_000) / 1e6)
    assert joules_between({}, {}) is None and joules_between(before, {}) is None
    assert joules_between(before, before) is None  # no logarithm is taken of a counter that stands


def test_energy_and_money_are_of_a_token_that_is_answered():
    timing = Timing(new_tokens=16, repeats=5, price_per_hour=0.36)
    scores = {"tok_per_sec": 100.0, "throughput_tok_per_sec/4": 250.0}
    assert derived(scores, timing, joules=8.0) == {
        "joules_per_token": pytest.approx(8.0 / 80),
        "cost_per_million_tokens": pytest.approx(1.0),
        "cost_per_million_tokens/4": pytest.approx(0.4),
    }
    assert derived(scores, Timing(), joules=None) == {}


def test_where_the_machine_tells_nothing_nothing_is_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "absent")
    assert joules_between(counters(energy.POWERCAP), counters(energy.POWERCAP)) is None
