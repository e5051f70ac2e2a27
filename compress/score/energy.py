"""Joules that the processors, or the GPU, used, where the machine tells them.

Linux has a counter for each processor package (RAPL) below /sys/class/powercap: microjoules of all
that runs there, idling cores and other processes among it, which since 2020 root alone may read.
NVIDIA's GPUs from Volta on have one of millijoules since the driver was loaded (NVML,
nvmlDeviceGetTotalEnergyConsumption), which `pip install nvidia-ml-py` lets anyone read; it moves a
few times a second. A machine without them, or that keeps them to itself, gives no figure.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"intel-rapl:\d+")  # of AMD's too; a package's parts have a second number


class Counter(NamedTuple):
    """Of one package or GPU: microjoules, and the number behind which they begin at 0 again."""

    microjoules: int
    range: int


def counters(folder: Path = POWERCAP) -> dict[str, Counter]:
    """Every package's counter by name; empty where one can't be read."""
    if not folder.is_dir():
        return {}
    try:
        return {
            zone.name: Counter(
                int((zone / "energy_uj").read_text()),
                int((zone / "max_energy_range_uj").read_text()),
            )
            for zone in sorted(folder.iterdir())
            if PACKAGE.fullmatch(zone.name)
        }
    except (OSError, ValueError):
        return {}


def gpu_counter() -> dict[str, Counter]:
    """That of torch's first GPU, by its UUID; empty where there is none, it has no counter, or
    pynvml is not installed.
    """
    if importlib.util.find_spec("pynvml") is None:
        return {}
    import pynvml
    import torch

    if not torch.cuda.is_available():
        return {}
    name = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return {}
    return {name: Counter(1000 * millijoules, 1000 * 2**64 - 1)}


def joules_between(before: Mapping[str, Counter], after: Mapping[str, Counter]) -> float | None:
    """Joules of all counters between two readings; None where there are none, or none moved. Each
    counter may have begun again once.
    """
    if not before or before.keys() != after.keys():
        return None
    used = [
        (after[name].microjoules - counter.microjoules) % (counter.range + 1)
        for name, counter in before.items()
    ]
    return sum(used) / 1e6 or None
