"""`compress/threads.py`: how threads wait, by what other processes do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from compress import threads


@pytest.mark.parametrize(
    ("said", "shares", "busy", "policy"),
    [
        (None, [3.0, 2.0, 99.0], 0.05, None),  # the third CPU is not this process's
        (None, [3.0, 97.0, 0.0], 1.0, "passive"),
        ("active", [90.0, 97.0, 0.0], 1.87, "active"),
    ],
)
def test_threads_sleep_while_they_wait_where_others_keep_a_cpu_busy(
    monkeypatch, said, shares, busy, policy
):
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds, percpu: shares)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", said or "")
    if said is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert threads.give_way() == pytest.approx(busy)
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize("module", ["compress.verbs", "compress.solving"])
def test_nothing_imports_torch_before_it_is_decided_how_threads_wait(module):
    code = (
        f"import sys, compress.launch, compress.config, {module}; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
