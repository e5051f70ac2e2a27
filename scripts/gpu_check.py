"""Everything that needs a GPU, in less than nine minutes: a JSON line a check, so that a run that
is cut short says something. Weights are random numbers in the shapes of real models.

    python scripts/gpu_check.py [CHECK ...] [--dry-run] [--out FOLDER] [--minutes M] [--list]

Each check is a process of its own under a limit of seconds: one that crashes, runs out of memory
or hangs is a line, and the next one begins. `forkserver` has torch imported once for all of them.
Lines go to FOLDER/gpu_check.jsonl, what checks say to FOLDER/CHECK.log, a table to the screen. With
--dry-run all of it runs on the CPU with tiny shapes. `scripts/gpu_check.sh` sets what the
environment should say. Exit code 1 when a check failed.

    environment                card, driver, packages; a large product
    tests                      tests/cuda
    stage-NAME                 every stage at 0.5B (`gpu_stages.py`)
    memory-NAME                peaks at 7B (`gpu_memory.py`)
    cached, online, signal     tokens a second and MFU (`gpu_speed.py`)
    resume, ddp, fsdp2         after a kill; one process (`gpu_runs.py`)
    closeness, latency         scoring
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import gpu_memory  # noqa: E402
import gpu_stages  # noqa: E402
from gpu_models import Place  # noqa: E402

LEAST_SECONDS = 15.0  # that a check is begun with
# module -> what pip calls it: what is named when it lacks
PACKAGES = {
    "peft": "peft",
    "torch_pruning": "torch-pruning",
    "pytest": "pytest",
    "more_itertools": "more-itertools",
    "hydra": "hydra-core",
    "datasets": "datasets",
    "lm_eval": "lm-eval",
    "xllamacpp": "xllamacpp",
    "gguf": "gguf",
    "compressed_tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
}
# Imported once, before checks are forked; none of it speaks to the driver.
PRELOADED = [
    "torch",
    "transformers.models.qwen2.modeling_qwen2",
    "accelerate",
    "safetensors.torch",
    "compress.distill.batches",
    "compress.quant.blockwise",
    "compress.train.loop",
    "compress.score.fidelity",
]
Figures = dict[str, Any]


class Check(NamedTuple):
    """What is done, in how many seconds at most, and the packages that it needs."""

    work: Callable[[Place], Figures]
    seconds: float
    needs: tuple[str, ...] = ()


def environment(place: Place) -> Figures:
    """Card, driver, versions, and how fast a large product is."""
    import torch
    from gpu_speed import peak_flops

    from compress.machine import available_threads, describe, git_sha, versions

    cuda = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else None
    return {
        "machine": describe(available_threads()),
        "device_bytes": memory,
        "cuda": torch.version.cuda,
        "versions": versions(),
        "git_sha": git_sha(),
        "missing": [name for module, name in PACKAGES.items() if not _there(module)],
        **peak_flops(place),
    }


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _speed(place: Place, name: str, *arguments: str) -> Figures:
    import gpu_speed

    figures: Figures = getattr(gpu_speed, name)(place, *arguments)
    return figures


def _runs(place: Place, name: str, *arguments: str) -> Figures:
    import gpu_runs

    figures: Figures = getattr(gpu_runs, name)(place, *arguments)
    return figures


# In the order in which they matter: when time runs out, the last ones are skipped.
CHECKS: dict[str, Check] = {
    "environment": Check(environment, 60),
    "tests": Check(lambda place: _runs(place, "tests"), 120, ("pytest",)),
    "cached": Check(lambda place: _speed(place, "distilled", "cached"), 60),
    "signal": Check(lambda place: _speed(place, "signal"), 60),
    **{
        f"memory-{name}": Check(
            partial(gpu_memory.memory, name=name), 75, ("peft",) if name == "lora" else ()
        )
        for name in gpu_memory.RUNS
    },
    "resume": Check(lambda place: _runs(place, "resume"), 60),
    "fsdp2": Check(lambda place: _runs(place, "one_process", "fsdp2"), 60),
    "ddp": Check(lambda place: _runs(place, "one_process", "ddp"), 60),
    "online": Check(lambda place: _speed(place, "distilled", "online"), 60),
    **{
        f"stage-{name}": Check(
            partial(gpu_stages.stage, name=name), 60, ("peft",) if name == "lora" else ()
        )
        for name in gpu_stages.RUNS
    },
    "closeness": Check(lambda place: _speed(place, "closeness"), 60),
    "latency": Check(lambda place: _speed(place, "latency"), 60),
}


def child(name: str, place: Place, log: Path, results: Any) -> None:
    """One check in a process of its own, whose group is killed with it; sends its figures."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    results.send(outcome(name, place))


def outcome(name: str, place: Place) -> Figures:
    """What a check says, or why it says nothing."""
    import traceback

    import torch

    if place.dry:
        torch.set_num_threads(1)
    try:
        figures: Figures = {"status": "ok", **CHECKS[name].work(place)}
    except ModuleNotFoundError as error:
        return {"status": "skipped", "why": f"needs {error.name}, which is not installed"}
    except Exception as error:  # whatever it is: it is a line
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        figures = {"status": "failed", "why": f"{type(error).__name__}: {first[:300]}"}
    if torch.cuda.is_initialized():
        figures["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def run(name: str, place: Place, out: Path, seconds_left: float) -> Figures:
    """The line of a check."""
    check = CHECKS[name]
    lacking = [PACKAGES[module] for module in check.needs if not _there(module)]
    if lacking:
        why = f"needs {', '.join(lacking)}, which is not installed"
        return {"status": "skipped", "why": why}
    if seconds_left < LEAST_SECONDS:
        return {"status": "skipped", "why": "no time left"}

    # A process of its own, which ends in time.
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    begun = time.monotonic()
    limit = min(check.seconds * (2 if place.dry else 1), seconds_left)
    process = context.Process(target=child, args=(name, place, out / f"{name}.log", there))
    process.start()
    there.close()
    try:
        figures = here.recv() if here.poll(limit) else None
    except EOFError:
        figures = None
    late = figures is None and time.monotonic() - begun >= limit
    process.join(0 if late else 10)
    _kill(process)

    if figures is None:
        said = f"longer than {limit:.0f} s" if late else f"the process died ({process.exitcode})"
        figures = {"status": "failed", "why": said}
    return {"seconds": round(time.monotonic() - begun, 2)} | figures


def _kill(process: Any) -> None:
    """A process and all that it started."""
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()


def shown(name: str, line: Figures) -> str:
    """A line of the table."""
    figures = {
        key: line[key]
        for key in ("mfu", "tokens_per_sec", "share_of_plain_forward", "stage_peak_bytes")
        if line.get(key) is not None
    }
    words = [f"{key} {value:.4g}" for key, value in figures.items()]
    about = line.get("why") or "  ".join(words)
    return f"{name:<22}{line['status']:<9}{line.get('seconds', 0):>7.1f} s  {about}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="a name, or stage, memory")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--minutes", type=float, default=8.7)
    parser.add_argument("--list", action="store_true", help="names of the checks")
    given = parser.parse_args()

    # A part of a name in front of its dash stands for all that begin so.
    names: list[str] = []
    for asked in given.checks:
        matching = [name for name in CHECKS if name == asked or name.startswith(f"{asked}-")]
        if not matching:
            parser.error(f"no such check: {asked}; there are {', '.join(CHECKS)}")
        names += matching
    given.checks = names or list(CHECKS)
    return given


def main() -> int:
    """All checks, or those that are named."""
    given = arguments()
    if given.list:
        print("\n".join(CHECKS))
        return 0
    begun = time.monotonic()
    if given.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not _gpu_there():
        print("torch sees no GPU here; --dry-run runs the same checks on the CPU", file=sys.stderr)
        return 2
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)

    # A line as soon as it is known.
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.absolute()
    lines: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder, (out / "gpu_check.jsonl").open("a") as record:
        place = Place(Path(folder), given.dry_run)
        for name in given.checks:
            seconds_left = 60 * given.minutes - (time.monotonic() - begun)
            lines[name] = run(name, place, out, seconds_left)
            about = {"check": name, "dry_run": given.dry_run, "card": _card(lines), **lines[name]}
            about["when"] = datetime.now(UTC).isoformat(timespec="seconds")
            record.write(json.dumps(about, default=str) + "\n")
            record.flush()
            print(shown(name, lines[name]), flush=True)

    print(f"{time.monotonic() - begun:.0f} s in all; lines in {out / 'gpu_check.jsonl'}")
    return int(any(line["status"] == "failed" for line in lines.values()))


def _gpu_there() -> bool:
    """Asked in a process of its own: none that forks may have spoken to the driver."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_torch_sees_one)


def _torch_sees_one() -> bool:
    import torch

    return torch.cuda.is_available()


def _card(lines: dict[str, Figures]) -> str | None:
    """As the environment's line names it."""
    machine = lines.get("environment", {}).get("machine") or {}
    return machine.get("gpu")


if __name__ == "__main__":
    sys.exit(main())
