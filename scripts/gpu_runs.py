"""What holds of a training on the device: it resumes after a kill, and one process of ddp or of
fsdp2 trains as a plain one does. And the repository's CUDA tests.

    python scripts/gpu_runs.py FOLDER DRY     # trains in FOLDER and is killed by SIGKILL at STOP
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_models import Place, random_text

ROOT = Path(__file__).resolve().parents[1]
STEPS, STOP = 8, 5
# What a resumed run may differ by, as a multiple of what two uninterrupted ones differ by on a GPU,
# which adds up gradients of embeddings and attention in any order; and at least so much.
NOISE, LEAST = 10.0, 1e-6
LOSS_TOLERANCE = 0.02  # relative: fsdp2 gathers bf16 weights, where autocast casts them


def trained(
    place: Place, work: Path, *, shape: str = "small", parallel: str = "none", stop: int = -1
) -> tuple[Any, list[dict[str, float]]]:
    """A model trained on cross-entropy, and its curve; with `stop` killed in front of that step,
    each one saved before.
    """
    from compress.distill.batches import make_batches, make_loss
    from compress.distill.losses import Mix
    from compress.models.checkpoint import load_model
    from compress.train import loop
    from compress.train.plan import Plan
    from compress.train.state import Saver

    rows = random_text(place.size(32768, 512), 32, place.size(256, 32))
    given = make_batches(rows, None, seed=0, sequences=32, batch=4)

    def batches(step: int, micro: int) -> Any:
        if step == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return given(step, micro)

    if stop >= 0:
        begin = Saver.begin

        def saved(saver: Saver, *given: Any) -> None:
            """Written to its end: a thread that the kill cuts off leaves the state before it."""
            begin(saver, *given)
            saver.wait()

        Saver.due = property(lambda saver: True)  # type: ignore[assignment, method-assign]
        Saver.begin = saved  # type: ignore[assignment, method-assign]
    model = load_model(place.checkpoint(shape))
    precision = "fp32" if place.dry else "bf16"
    curve = loop.train(
        model,
        make_loss(Mix(0.0, 1.0)),
        batches,
        Plan(steps=STEPS, lr=1e-3, micro=2, precision=precision, parallel=parallel),
        work=work,
        label=parallel,
        log=print,
    ).curve
    return model, curve


def difference(one: Any, other: Any) -> float:
    """The largest of all weights' differences."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach().cpu() - b.detach().cpu()).abs().max()) for a, b in pairs)


def resume(place: Place) -> dict[str, Any]:
    """A training killed at STOP and repeated, beside two that nobody killed."""
    work = place.folder / "resume"
    shutil.rmtree(work, ignore_errors=True)
    place.checkpoint("small")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, __file__, str(place.folder), str(int(place.dry))]
    killed = subprocess.run(line, env=os.environ | {"PYTHONPATH": path})
    states = sorted(path.name for path in work.glob("state-*"))
    assert killed.returncode == -signal.SIGKILL, f"exit {killed.returncode}, not by SIGKILL"
    assert states == [f"state-{STOP:08d}"], f"states {states}"

    # The same command again, and two whole runs.
    resumed, curve = trained(place, work)
    first, first_curve = trained(place, place.folder / "resume-first")
    second, _ = trained(place, place.folder / "resume-second")
    differing, noise = difference(resumed, first), difference(first, second)
    allowed = 0.0 if place.device.type == "cpu" else max(NOISE * noise, LEAST)
    if differing > allowed:
        raise ValueError(f"resumed weights differ by {differing:.3g}, at most {allowed:.3g}")
    return {
        "shape": "small",
        "steps": len(curve),
        "killed_at_step": STOP,
        "weights_max_difference": differing,
        "two_whole_runs_max_difference": noise,
        "loss_last_nats": curve[-1]["loss"],
        "loss_last_of_whole_run_nats": first_curve[-1]["loss"],
    }


def one_process(place: Place, parallel: str) -> dict[str, Any]:
    """ddp or fsdp2 in a group of one process beside a training without."""
    from accelerate.utils.other import get_free_port

    from compress.train.parallel import group

    for kind in ("none", parallel):
        shutil.rmtree(place.folder / f"process-{kind}", ignore_errors=True)
    _, plain = trained(place, place.folder / "process-none", shape="0.5B")
    port = str(get_free_port())
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with group():
        _, curve = trained(
            place, place.folder / f"process-{parallel}", shape="0.5B", parallel=parallel
        )

    gaps = [
        abs(row["loss"] - other["loss"]) / other["loss"]
        for row, other in zip(curve, plain, strict=True)
    ]
    if max(gaps) > LOSS_TOLERANCE:
        raise ValueError(f"losses differ by {max(gaps):.3g}, allowed are {LOSS_TOLERANCE}")
    return {
        "shape": "0.5B",
        "steps": len(curve),
        "losses_max_relative_difference": max(gaps),
        "tokens_per_sec": sorted(row["tokens_per_sec"] for row in curve)[len(curve) // 2],
        "tokens_per_sec_without": sorted(row["tokens_per_sec"] for row in plain)[len(plain) // 2],
    }


def tests(place: Place) -> dict[str, Any]:
    """pytest's counts of the CUDA tests, which without a GPU run on the CPU as far as they can."""
    line = [sys.executable, "-m", "pytest", "tests/cuda", "-q", "-p", "no:cacheprovider", "-rfE"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    last = (done.stdout.strip().splitlines() or ["nothing said"])[-1]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (\w+)", last)}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode:
        raise ValueError(f"{last}; {', '.join(failures)}")
    return {f"tests_{kind}": counts.get(kind, 0) for kind in ("passed", "skipped")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = Place(Path(sys.argv[1]), bool(int(sys.argv[2])))
    trained(own, own.folder / "resume", stop=STOP)
