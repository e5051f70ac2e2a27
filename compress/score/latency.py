r"""Time and memory of a checkpoint under torch, a GGUF under llama.cpp or a directory under ONNX
Runtime GenAI: one protocol, fresh processes.

A process keeps itself to as many CPUs as it has threads, warms up, and `repeats` times generates
greedily after a prompt of fixed ids, obeying no end token: `ttft_ms_p50` is the time until the
first token is chosen (`/N`: after N tokens), `latency_ms_p50` to `_p99` that of one further token
with the KV cache, `tok_per_sec` further tokens / their total time; `throughput_tok_per_sec/B` the
tokens of B sequences together / the whole time, prompts included; `bandwidth_share` tok_per_sec x
bytes of the weights / the bytes a second that a sweep of as many reads on the same CPUs;
`peak_rss_bytes` the kernel's high-water mark, loading included, before other lengths and batches.

Processes differ more than repeats inside one (addresses, clocks, neighbours), so they are the
sample: a score is exp(mean log x), its 95% interval exp(mean +- t_{n-1} s / sqrt(n)) of the logs:
Student's t, because a percentile bootstrap of five values covers 84%. One process has no interval;
memory is the largest. `compare_speed` runs two models in the order A B B A, which cancels what
drifts linearly: four processes, one ratio.
"""

import json
import math
import os
import re
import resource
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Imports wait in functions: a process's memory is measured.
LARGEST_SWEEP = 2**30  # bytes; far beyond every cache, where the rate no longer depends on the size
Generate = Callable[
    [int, int, int], list[float]
]  # (prompt tokens, new tokens, sequences) -> milliseconds: of each token if it is one sequence


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

    def __post_init__(self) -> None:
        counts = (
            self.prompt_tokens,
            self.new_tokens - 1,
            self.repeats,
            self.threads,
            self.processes,
            *self.prompt_lengths,
            *self.batch_sizes,
        )
        if min(counts) < 1:
            raise ValueError(
                f"latency can't be measured with {self}; allowed: counts from 1, new_tokens from 2"
            )


def measure(
    model: Path, runtime: str = "torch", how: Timing | None = None
) -> dict[str, dict[str, Any]]:
    """{"scores", "intervals", "latency"}, the last one what a reader of the times should know
    (CPUs, load, processes), from fresh processes one after the other. ValueError with a
    process's last words when it fails.
    """
    how, load = how or Timing(), os.getloadavg()[0]
    done = [_fresh(model, runtime, how) for _ in range(how.processes)]
    facts = done[0]["latency"] | {
        "processes": how.processes,
        "repeats": how.repeats,
        "load": [load, os.getloadavg()[0]],
    }
    values = {key: [one["scores"][key] for one in done] for key in done[0]["scores"]}
    memory = {"peak_rss_bytes": max(values.pop("peak_rss_bytes"))}
    if how.processes == 1:
        return {"scores": done[0]["scores"], "intervals": {}, "latency": facts}
    spread = {key: geometric_mean(sample) for key, sample in values.items()}
    scores = {key: mean for key, (mean, _, _) in spread.items()}
    return {
        "scores": scores | memory,
        "intervals": {key: (low, high) for key, (_, low, high) in spread.items()},
        "latency": facts,
    }


def geometric_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of at least two positive numbers, and the 95% t interval of their logs."""
    import numpy as np
    from scipy.stats import t

    logs = np.log(values)
    half = t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    middle, low, high = np.exp(logs.mean() + np.array([0, -half, half])).tolist()
    return middle, low, high


def compare_speed(
    a: tuple[Path, str], b: tuple[Path, str], how: Timing, blocks: int = 5
) -> dict[str, tuple[float, float, float]]:
    """How many times as fast the second (model, runtime) is: {metric: (ratio, low, high)}, 95%,
    over `blocks` of processes A B B A.
    """
    if blocks < 2:
        raise ValueError(
            f"a speed-up needs at least 2 blocks of A B B A for its interval, got {blocks}"
        )
    quads = [[_fresh(*model, how)["scores"] for model in (a, b, b, a)] for _ in range(blocks)]
    names = ("latency_ms_p50", "ttft_ms_p50")
    return {
        n: geometric_mean([math.sqrt(a1[n] * a2[n] / (b1[n] * b2[n])) for a1, b1, b2, a2 in quads])
        for n in names
    }


def _fresh(model: Path, runtime: str, how: Timing) -> dict[str, Any]:
    """One process's numbers."""
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
    )
    env = os.environ | {"OMP_NUM_THREADS": str(how.threads), "PYTHONPATH": path}
    own = [
        sys.executable,
        "-m",
        "compress.score.latency",
        str(model),
        runtime,
        json.dumps(asdict(how)),
    ]
    done = subprocess.run(own, capture_output=True, text=True, env=env)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"measuring {model} failed with exit {done.returncode}: {words[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


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


def run(model: Path, runtime: str, how: Timing) -> dict[str, Any]:
    """The measurement itself, in this process."""
    from compress.formats import llamacpp, onnxruntime

    cpus, repeats = pin(how.threads), range(how.repeats)
    make = {"torch": _torch, "llama.cpp": llamacpp.timer, "onnxruntime": onnxruntime.timer}[runtime]
    generate, weight_bytes = make(model, how.threads)
    generate(how.prompt_tokens, how.new_tokens, 1)  # every shape warms up by itself
    runs = [generate(how.prompt_tokens, how.new_tokens, 1) for _ in repeats]
    peak = peak_rss_bytes()
    import numpy as np  # only now: llama.cpp does without it, and its memory is what is measured

    runs_ms = np.array(runs)  # (repeats, new_tokens)
    tokens_ms = runs_ms[:, 1:]
    scores = {
        "ttft_ms_p50": float(np.median(runs_ms[:, 0])),
        "tok_per_sec": 1000 / float(tokens_ms.mean()),
        "peak_rss_bytes": peak,
    }
    scores |= {f"latency_ms_p{q}": float(np.quantile(tokens_ms, q / 100)) for q in (50, 90, 95, 99)}
    for length in how.prompt_lengths:
        generate(length, 1, 1)
        scores[f"ttft_ms_p50/{length}"] = float(
            np.median([generate(length, 1, 1) for _ in repeats])
        )
    for batch in how.batch_sizes:
        generate(how.prompt_tokens, how.new_tokens, batch)
        whole_ms = np.median(
            [sum(generate(how.prompt_tokens, how.new_tokens, batch)) for _ in repeats]
        )
        scores[f"throughput_tok_per_sec/{batch}"] = 1000 * batch * how.new_tokens / float(whole_ms)
    read = read_bytes_per_second(weight_bytes, how.threads)
    scores["bandwidth_share"] = scores["tok_per_sec"] * weight_bytes / read
    return {
        "scores": scores,
        "latency": {"pinned_cpus": cpus, "weight_bytes": weight_bytes, "read_bytes_per_sec": read},
    }


def _torch(model_dir: Path, threads: int) -> tuple[Generate, int]:
    """A checkpoint, in bf16: the type that weights ship in."""
    import torch

    from compress.models.checkpoint import open_model

    torch.set_num_threads(threads)
    model = open_model(model_dir, torch.bfloat16)

    @torch.inference_mode()
    def generate(prompt_tokens: int, count: int, batch: int) -> list[float]:
        ids_BL, cache, times = (
            (torch.arange(prompt_tokens) * 7919 % model.config.vocab_size).repeat(batch, 1),
            None,
            [],
        )
        for _ in range(count):
            start = time.perf_counter()
            out = model(ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids_BL, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            times.append(1000 * (time.perf_counter() - start))
        return times

    return generate, int(model.get_memory_footprint())


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2], Timing(**json.loads(sys.argv[3])))))
