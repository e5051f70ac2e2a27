"""Time and memory of a checkpoint under torch, a GGUF under llama.cpp or a directory under ONNX Runtime GenAI: one protocol, a fresh process.

`python -m compress.score.latency MODEL ...` prints one JSON line. `ttft_ms_p50`: the prompt's forward until the first token is chosen.
`latency_ms_p50` and `_p95`: one further greedy token with the KV cache, over all tokens of all repeats.
`tok_per_sec`: further tokens / their total time. `peak_rss_bytes`: the kernel's high-water mark of this process, loading included.

Prompt ids are a fixed pattern, the end token is not obeyed, a short unmeasured generation comes first. Left out: batches. What is timed,
`generate(count)` -> milliseconds of each of `count` tokens, is `_torch` here and `timer` in the other runtimes' modules.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DTYPES = ("bfloat16", "float32", "float16")


def measure(
    model: Path, prompt_tokens: int = 64, new_tokens: int = 16, repeats: int = 5, threads: int = 2, dtype: str = "bfloat16",
    runtime: str = "torch",
) -> dict[str, float]:  # fmt: skip
    """Run the measurement in a fresh process and return its numbers; `dtype` is torch's. ValueError with its last words when it fails."""
    if dtype not in DTYPES or min(prompt_tokens, new_tokens - 1, repeats, threads) < 1:
        got = f"{prompt_tokens=} {new_tokens=} {repeats=} {threads=} {dtype=}"
        raise ValueError(f"latency can't be measured with {got}; allowed: counts from 1, new_tokens from 2, dtype {' '.join(DTYPES)}")
    options = [f"--prompt-tokens={prompt_tokens}", f"--new-tokens={new_tokens}", f"--repeats={repeats}", f"--threads={threads}"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    command = [sys.executable, "-m", "compress.score.latency", str(model), *options, f"--dtype={dtype}", f"--runtime={runtime}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"measuring {model} failed with exit {done.returncode}: {words[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_rss_bytes() -> int:
    """Peak resident memory of this process. Linux's VmHWM starts at exec; ru_maxrss starts with the parent's peak (a child of a
    process of 1 GB, itself 9 MB, reported 979 MB)."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(model: Path, prompt_tokens: int, new_tokens: int, repeats: int, threads: int, dtype: str, runtime: str) -> dict[str, float]:
    """The measurement itself, in this process."""
    from compress.score import llamacpp, onnxruntime

    if runtime == "torch":
        generate = _torch(model, prompt_tokens, threads, dtype)
    else:
        generate = {"llama.cpp": llamacpp.timer, "onnxruntime": onnxruntime.timer}[runtime](model, prompt_tokens, new_tokens, threads)
    generate(min(4, new_tokens))
    runs = [generate(new_tokens) for _ in range(repeats)]
    peak = peak_rss_bytes()
    import numpy as np  # only now: llama.cpp does without it, and its memory is what is measured

    runs_ms = np.array(runs)  # (repeats, new_tokens)
    tokens_ms = runs_ms[:, 1:]
    p50, p95 = np.quantile(tokens_ms, [0.5, 0.95]).tolist()
    return {
        "ttft_ms_p50": float(np.median(runs_ms[:, 0])), "latency_ms_p50": p50, "latency_ms_p95": p95,
        "tok_per_sec": 1000 / float(tokens_ms.mean()), "peak_rss_bytes": peak,
    }  # fmt: skip


def _torch(model_dir: Path, prompt_tokens: int, threads: int, dtype: str) -> Callable[[int], list[float]]:
    import torch

    from compress.checkpoint import load_model

    torch.set_num_threads(threads)
    model = load_model(model_dir, getattr(torch, dtype))
    prompt_BL = (torch.arange(prompt_tokens) * 7919 % model.config.vocab_size)[None]

    @torch.inference_mode()
    def generate(count: int) -> list[float]:
        """Milliseconds of each of `count` tokens; the first one includes the prompt."""
        ids_BL, cache, times = prompt_BL, None, []
        for _ in range(count):
            start = time.perf_counter()
            out = model(ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids_BL, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            times.append(1000 * (time.perf_counter() - start))
        return times

    return generate


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure latency and memory of a model; one JSON line.")
    parser.add_argument("model", type=Path)
    for name, default in (("prompt-tokens", 64), ("new-tokens", 16), ("repeats", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--runtime", choices=("torch", "llama.cpp", "onnxruntime"), default="torch")
    print(json.dumps(run(**vars(parser.parse_args()))))
