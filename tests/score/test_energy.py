"""Joules a token from the counters of processor packages and GPUs, and what tokens cost."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from compress.score import energy, latency
from compress.score.energy import Counter, counters, gpu_counter, joules_between
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


def nvml(monkeypatch, readings):
    """A GPU that torch sees and a pynvml that reads its counter, neither of which is here."""
    module = ModuleType("pynvml")
    module.__spec__ = ModuleSpec("pynvml", None)
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda name: name
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: readings(module)[handle]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1b-2"))


def test_a_gpus_counter_is_read_by_the_uuid_of_torchs_from_a_mocked_nvml(monkeypatch):
    assert gpu_counter() == {}  # no GPU, no pynvml
    nvml(monkeypatch, lambda _: {"GPU-1b-2": 7})
    assert gpu_counter() == {"GPU-1b-2": Counter(7000, 1000 * 2**64 - 1)}

    def refuse(module):
        raise module.NVMLError

    nvml(monkeypatch, refuse)  # before Volta there is none
    assert gpu_counter() == {}


def test_a_gpu_is_read_over_seconds_and_told_for_the_repeats_from_a_mocked_nvml(monkeypatch):
    """Each run takes 0.3 s and 900 J: the counter is read over seven of them, not five."""
    clock, shapes = [0.0], []

    def generate(*shape):
        shapes.append(shape)
        clock[0] += 0.3

    nvml(monkeypatch, lambda _: {"GPU-1b-2": 900_000 * len(shapes)})
    monkeypatch.setattr(latency.timeit, "default_timer", lambda: clock[0])
    timing = Timing(prompt_tokens=64, new_tokens=16, repeats=5)
    assert latency.gpu_joules(generate, timing) == pytest.approx(5 * 900)
    assert shapes == 7 * [(64, 16, 1)]

    # However long they take, no fewer than the repeats; a counter that stands tells nothing.
    shapes.clear()
    assert latency.gpu_joules(generate, Timing(repeats=9)) == pytest.approx(9 * 900)
    assert len(shapes) == 9
    nvml(monkeypatch, lambda _: {"GPU-1b-2": 5})
    assert latency.gpu_joules(generate, timing) is None
