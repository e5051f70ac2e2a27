r"""Time and memory of a checkpoint under torch, a GGUF under llama.cpp or a directory under ONNX
Runtime GenAI: one protocol, fresh processes.

A process keeps itself to as many CPUs as it has threads, warms up, and `repeats` times generates
greedily after a prompt of fixed ids, obeying no end token: `ttft_ms_p50` is the time until the
first token is chosen (`/N`: after N tokens), `latency_ms_p50` to `_p99` that of one further token
with the KV cache, `tok_per_sec` further tokens / their total time; `throughput_tok_per_sec/B` the
tokens of B sequences together / the whole time, prompts included; `bandwidth_share` tok_per_sec x
bytes of the weights / the bytes a second that a sweep of as many reads on the same CPUs or GPU;
`peak_rss_bytes` the kernel's high-water mark, loading included, before other lengths and batches;
`/N`: of a process of its own that holds N tokens of context, keys and values of all of them.
`joules_per_token` is what the processors used meanwhile a token answered, its share of the prompt
with it, or the GPU in as many more repeats as take GPU_SECONDS, where the machine tells
(`energy.py`); `cost_per_million_tokens` what a million further
tokens cost at `price_per_hour`, one sequence at a time, or with `/B` B of them together.

Processes differ more than repeats inside one (addresses, clocks, neighbours), so they are the
sample: a score is exp(mean log x), its 95% interval exp(mean +- t_{n-1} s / sqrt(n)) of the logs:
Student's t, because a percentile bootstrap of five values covers 84%. One process has no interval;
memory is the largest. `compare_speed` runs two models in the order A B B A, which cancels what
drifts linearly: four processes, one ratio. Many models are compared by `measure_in_turn`, which
opens each for less than a second in one process: what drifts more slowly hits all alike.
"""

import json
import math
import os
import re
import resource
import subprocess
import sys
import timeit
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress.formats.runtimes import Generate, runtime_of
from compress.score import energy

# Imports wait in functions: a process's memory is measured.
IN_TURN = "--in-turn"
GPU_SECONDS = 2  # what a GPU's counter, which moves a few times in one, is read over
LARGEST_SWEEP = 2**30  # bytes; far beyond every cache, where the rate no longer depends on the size


@dataclass(frozen=True)
class Timing:
    """How to measure. ValueError for what can't be measured."""

    prompt_tokens: int = 64
    new_tokens: int = 16
    repeats: int = 5
    threads: int = 2
    processes: int = 1
    prompt_lengths: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    device: str = "cpu"
    context_lengths: tuple[int, ...] = ()
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        # The first token's time is its own: a further one is needed.
        counts = (
            self.prompt_tokens,
            self.new_tokens - 1,
            self.repeats,
            self.threads,
            self.processes,
            *self.prompt_lengths,
            *self.batch_sizes,
            *(length - self.new_tokens for length in self.context_lengths),
        )

        if min(counts) < 1:
            raise ValueError(
                f"latency can't be measured with {self}; allowed: counts from 1, new_tokens from 2,"
                " context_lengths above new_tokens"
            )


def measure(
    model: Path, runtime: str = "torch", timing: Timing | None = None
) -> dict[str, dict[str, Any]]:
    """{"scores", "intervals", "latency"}, the last one what a reader of the times should know
    (CPUs, load, processes), from fresh processes one after the other. ValueError with a
    process's last words when it fails.
    """
    timing = timing or Timing()
    load_before = os.getloadavg()[0]
    records = [_fresh(model, runtime, timing) for _ in range(timing.processes)]
    memory = _memory_of_contexts(model, runtime, timing)
    facts = records[0]["latency"] | {
        "processes": timing.processes,
        "repeats": timing.repeats,
        "load": [load_before, os.getloadavg()[0]],
    }
    if timing.processes == 1:
        return {"scores": records[0]["scores"] | memory, "intervals": {}, "latency": facts}

    # Of memory the largest counts, of anything else the mean.
    values = {key: [record["scores"][key] for record in records] for key in records[0]["scores"]}
    memory["peak_rss_bytes"] = max(values.pop("peak_rss_bytes"))
    spread = {key: geometric_mean(sample) for key, sample in values.items()}
    scores = {key: mean for key, (mean, _, _) in spread.items()}
    return {
        "scores": scores | memory,
        "intervals": {key: (low, high) for key, (_, low, high) in spread.items()},
        "latency": facts,
    }


def _memory_of_contexts(model: Path, runtime: str, timing: Timing) -> dict[str, float]:
    """Peak memory with so many tokens of prompt and answer, each length in a fresh process."""
    memory: dict[str, float] = {}
    for length in timing.context_lengths:
        once = replace(
            timing,
            prompt_tokens=length - timing.new_tokens,
            repeats=1,
            prompt_lengths=(),
            batch_sizes=(),
            context_lengths=(),
        )
        memory[f"peak_rss_bytes/{length}"] = _fresh(model, runtime, once)["scores"][
            "peak_rss_bytes"
        ]
    return memory


def geometric_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of at least two positive numbers, and the 95% t interval of their logs."""
    import numpy as np

    from compress.score.quantiles import t_quantile

    logs = np.log(values)
    half = t_quantile(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    middle, low, high = np.exp(logs.mean() + np.array([0, -half, half])).tolist()
    return middle, low, high


def compare_speed(
    a: tuple[Path, str], b: tuple[Path, str], timing: Timing, blocks: int = 5
) -> dict[str, tuple[float, float, float]]:
    """How many times as fast the second (model, runtime) is: {metric: (ratio, low, high)}, 95%,
    over `blocks` of processes A B B A.
    """
    if blocks < 2:
        raise ValueError(
            f"a speed-up needs at least 2 blocks of A B B A for its interval, got {blocks}"
        )
    quads = [[_fresh(*model, timing)["scores"] for model in (a, b, b, a)] for _ in range(blocks)]

    # Of each block the ratio of geometric means, which a linear drift leaves as it is.
    ratios: dict[str, tuple[float, float, float]] = {}
    for name in ("latency_ms_p50", "ttft_ms_p50"):
        of_blocks = [
            math.sqrt(a1[name] * a2[name] / (b1[name] * b2[name])) for a1, b1, b2, a2 in quads
        ]
        ratios[name] = geometric_mean(of_blocks)
    return ratios


def measure_in_turn(models: Sequence[Path], runtime: str, timing: Timing) -> list[dict[str, float]]:
    """Times of one sequence of each model: one process opens, times and closes one after the other.
    ValueError as `measure`.
    """
    return _child([IN_TURN, *map(str, models)], runtime, timing)


def _fresh(model: Path, runtime: str, timing: Timing) -> dict[str, Any]:
    """One process's numbers."""
    return _child([str(model)], runtime, timing)


def _child(models: list[str], runtime: str, timing: Timing) -> Any:
    """What a fresh process measures."""
    # It imports this package, wherever it is started.
    package_folder = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": str(timing.threads), "PYTHONPATH": path}

    module = "compress.score.latency"
    command = [sys.executable, "-m", module, runtime, json.dumps(asdict(timing)), *models]
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    if process.returncode:
        words = process.stderr.strip().splitlines() or ["no message"]
        raise ValueError(
            f"measuring {models[-1]} failed with exit {process.returncode}: {words[-1]}"
        )
    return json.loads(process.stdout.splitlines()[-1])


def peak_rss_bytes() -> int:
    """Peak resident memory of this process. Linux's VmHWM starts at exec; ru_maxrss starts with
    the parent's peak (a child of a process of 1 GB, itself 9 MB, reported 979 MB).
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_bytes_per_second(size: int, threads: int) -> float:
    """How fast `threads` threads read `size` bytes (at most LARGEST_SWEEP), the best of ten. An
    integer maximum, because a sum of floats is bound by its additions: on two cores 19 GB/s,
    where this reads 40.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    parts = np.array_split(np.ones(min(size, LARGEST_SWEEP) // 4, "int32"), threads)
    with ThreadPoolExecutor(threads) as pool:
        best = min(timeit.repeat(lambda: list(pool.map(np.max, parts)), number=1, repeat=10))
    return sum(part.nbytes for part in parts) / best


def gpu_read_bytes_per_second(size: int) -> float:
    """The same of the GPU's own memory."""
    import torch

    swept = torch.ones(min(size, LARGEST_SWEEP) // 4, dtype=torch.int32, device="cuda")
    best = min(timeit.repeat(lambda: swept.max().item(), number=1, repeat=10))
    return swept.nbytes / best


def pin(threads: int) -> list[int]:
    """Keep this process to `threads` CPUs, of different cores as far as there are, and return
    them; [] where the system offers no pinning.
    """

    def second(cpu: int) -> tuple[bool, int]:
        """Whether the CPU is not its core's first."""
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        return file.is_file() and int(re.split("[,-]", file.read_text())[0]) != cpu, cpu

    if not hasattr(os, "sched_setaffinity"):
        return []
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0), key=second)[:threads])
    return sorted(os.sched_getaffinity(0))


def run(model: Path, runtime: str, timing: Timing) -> dict[str, Any]:
    """The measurement itself, in this process."""
    cpus = pin(timing.threads)
    repeats = range(timing.repeats)
    generate, weight_bytes = runtime_of(runtime).timer(model, timing.threads, timing.device)

    # Every shape warms up by itself.
    generate(timing.prompt_tokens, timing.new_tokens, 1)
    before = energy.counters()
    runs = [generate(timing.prompt_tokens, timing.new_tokens, 1) for _ in repeats]
    joules = energy.joules_between(before, energy.counters())
    scores = {"peak_rss_bytes": peak_rss_bytes()} | _of_tokens(runs)
    import numpy as np  # only now: llama.cpp does without it, and its memory is what is measured

    # Other lengths, and several sequences together.
    for length in timing.prompt_lengths:
        generate(length, 1, 1)
        first_ms = np.median([generate(length, 1, 1) for _ in repeats])
        scores[f"ttft_ms_p50/{length}"] = float(first_ms)
    for batch in timing.batch_sizes:
        shape = timing.prompt_tokens, timing.new_tokens, batch
        generate(*shape)
        total_ms = float(np.median([sum(generate(*shape)) for _ in repeats]))
        scores[f"throughput_tok_per_sec/{batch}"] = 1000 * batch * timing.new_tokens / total_ms

    # What it takes: a GPU's counter needs torch, so only behind the memory that was told. How near
    # to what the device's memory can deliver.
    on_cpu = timing.device == "cpu"
    scores |= derived(scores, timing, joules if on_cpu else gpu_joules(generate, timing))
    read = (
        read_bytes_per_second(weight_bytes, timing.threads)
        if on_cpu
        else gpu_read_bytes_per_second(weight_bytes)
    )
    scores["bandwidth_share"] = scores["tok_per_sec"] * weight_bytes / read
    return {
        "scores": scores,
        "latency": {
            "device": timing.device,
            "pinned_cpus": cpus,
            "weight_bytes": weight_bytes,
            "read_bytes_per_sec": read,
        },
    }


def gpu_joules(generate: Generate, timing: Timing) -> float | None:
    """Of `repeats` runs, from as many as take GPU_SECONDS; None where the machine does not tell."""
    before = energy.gpu_counter()
    if not before:
        return None
    started = timeit.default_timer()
    runs = 0
    while runs < timing.repeats or timeit.default_timer() < started + GPU_SECONDS:
        generate(timing.prompt_tokens, timing.new_tokens, 1)
        runs += 1
    joules = energy.joules_between(before, energy.gpu_counter())
    return None if joules is None else joules * timing.repeats / runs


def derived(scores: dict[str, float], timing: Timing, joules: float | None) -> dict[str, float]:
    """Energy and money, of all repeats' `joules` and of the rates in `scores`."""
    figures: dict[str, float] = {}
    if joules is not None:
        figures["joules_per_token"] = joules / (timing.repeats * timing.new_tokens)
    if timing.price_per_hour is not None:
        for name, rate in scores.items():
            metric, slash, together = name.partition("/")
            if metric in ("tok_per_sec", "throughput_tok_per_sec"):
                cost = timing.price_per_hour / 3600 / rate * 1e6
                figures[f"cost_per_million_tokens{slash}{together}"] = cost
    return figures


def run_in_turn(models: Sequence[Path], runtime: str, timing: Timing) -> list[dict[str, float]]:
    """Times of one sequence of each model, in this process."""
    pin(timing.threads)
    records = []
    for model in models:
        generate, _ = runtime_of(runtime).timer(model, timing.threads, timing.device)
        generate(timing.prompt_tokens, timing.new_tokens, 1)
        turns = range(timing.repeats)
        records.append(
            _of_tokens([generate(timing.prompt_tokens, timing.new_tokens, 1) for _ in turns])
        )
        del generate  # and with it the model
    return records


def _of_tokens(runs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Scores of one sequence, from the milliseconds (repeats, new_tokens) of each token, the first
    one's with its prompt's.
    """
    import numpy as np

    runs_ms = np.array(runs)
    tokens_ms = runs_ms[:, 1:]
    scores = {
        "ttft_ms_p50": float(np.median(runs_ms[:, 0])),
        "tok_per_sec": 1000 / float(tokens_ms.mean()),
    }
    return scores | {
        f"latency_ms_p{q}": float(np.quantile(tokens_ms, q / 100)) for q in (50, 90, 95, 99)
    }


def main(runtime: str, timing: str, *models: str) -> None:
    """Print what a process measures, of one model or, behind IN_TURN, of several."""
    settings = Timing(**json.loads(timing))
    if models[0] == IN_TURN:
        print(json.dumps(run_in_turn([Path(model) for model in models[1:]], runtime, settings)))
    else:
        print(json.dumps(run(Path(models[0]), runtime, settings)))


if __name__ == "__main__":
    main(*sys.argv[1:])
