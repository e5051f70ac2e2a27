"""What machine and software a number was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from compress.assets import PACKAGE


def available_threads() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict[str, Any]:
    """CPU, cores, threads used, memory and GPU."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "cores": available_threads(), "threads": threads, "ram_bytes": psutil.virtual_memory().total, "gpu": gpu}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fast_dtype() -> str:
    """ "bf16" where matrix units compute it faster than fp32 (GPU, AMX, AVX512-BF16), else "fp32": elsewhere bf16 is emulated, 5x slower."""
    import torch

    fast = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    import torch
    import transformers

    from compress import __version__

    return {"compress": __version__, "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def git_sha() -> str:
    """The checkout's commit, marked when it has changes; "unknown" outside a checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return "unknown"
    try:
        run = ["git", "-C", str(PACKAGE.parent)]
        sha = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha + "-changed" * bool(dirty)
