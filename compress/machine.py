"""What machine and software a number was measured with."""

import importlib.util
import platform
import re
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

from compress import __version__
from compress.assets import PACKAGE
from compress.keys import OF_RUNTIME, SCORES, WEIGHTS, versions_of
from compress.threads import available_threads


def describe(threads: int) -> dict[str, Any]:
    """CPU, cores, threads used, memory and GPU."""
    import psutil

    return {
        "cpu": cpu_name(),
        "cores": available_threads(),
        "threads": threads,
        "ram_bytes": psutil.virtual_memory().total,
        "gpu": gpu_name(),
    }


def cpu_name() -> str:
    """What the processor is called; where the system does not say, its kind."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """What instructions the processor has, in order; [] where the system does not say. Processors
    of one name may differ in them.
    """
    return sorted(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    """A field of the first processor as Linux states it; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    match = re.search(rf"^{field}\s*:\s*(.*?)\s*$", text, re.MULTILINE)
    return match[1] if match else ""


def gpu_name() -> str | None:
    """What the first GPU that torch sees is called; None without one, or without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def fast_dtype() -> str:
    """ "bf16" where matrix units compute it faster than fp32 (GPU, AMX, AVX512-BF16), else "fp32":
    elsewhere bf16 is emulated, 5x slower.
    """
    import torch

    fast = (
        torch.cuda.is_available()
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16" if fast else "fp32"


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, as far as they are installed."""
    by_package = versions_of(*WEIGHTS, *SCORES, *chain.from_iterable(OF_RUNTIME.values()))
    ours = {"compress": __version__, "python": platform.python_version()}
    return ours | {package: version for package, version in by_package.items() if version}


def git_sha() -> str:
    """The checkout's commit, marked when it has changes; "unknown" outside a checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return "unknown"

    # Tags don't count: `--exclude=*` leaves the commit alone.
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=-changed"]
    command = ["git", "-C", str(PACKAGE.parent), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
