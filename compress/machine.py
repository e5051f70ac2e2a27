"""What machine and software a number was measured with."""

import os
import platform
import re
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from compress import __version__
from compress.assets import PACKAGE
from compress.keys import OF_RUNTIME, SCORES, WEIGHTS, versions_of


def available_threads() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict[str, Any]:
    """CPU, cores, threads used, memory and GPU."""
    info = Path("/proc/cpuinfo")
    name = (
        re.search(r"^model name\s*:\s*(.*?)\s*$", info.read_text(), re.MULTILINE)
        if info.is_file()
        else None
    )
    cpu = name[1] if name else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": available_threads(),
        "threads": threads,
        "ram_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
    }


def fast_dtype() -> str:
    """ "bf16" where matrix units compute it faster than fp32 (GPU, AMX, AVX512-BF16), else "fp32":
    elsewhere bf16 is emulated, 5x slower.
    """
    fast = (
        torch.cuda.is_available()
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16" if fast else "fp32"


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, as far as they are installed."""
    known = versions_of(*WEIGHTS, *SCORES, *chain.from_iterable(OF_RUNTIME.values()))
    return {"compress": __version__, "python": platform.python_version()} | {
        name: found for name, found in known.items() if found
    }


def git_sha() -> str:
    """The checkout's commit, marked when it has changes; "unknown" outside a checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return "unknown"
    command = [
        "git",
        "-C",
        str(PACKAGE.parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--exclude=*",
        "--dirty=-changed",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
