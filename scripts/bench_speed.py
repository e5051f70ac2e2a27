"""The same codes in three files: how fast each writes, and what the faster arithmetic changes.

    python scripts/bench_speed.py [--checkpoint DIR] [--blocks 5] [--out FOLDER]

DIR is a checkpoint on q4_0, such as the `hf` of a bundle; without it the embedded teacher is
rounded. It is exported as `onnx` (fp32), `onnx:A8` (products round activations to 8 bits under a
limit on KL; docstrings and conversations decide) and `gguf:Q4_0`. Speed: processes A B B A, ratio
of geometric means, 95% interval over blocks. Closeness of A8 to fp32 on held-out rows that decided
nothing, 8 x 256 tokens of the language reference and of held-out conversations: KL, and of first
choices that are more than 0.2 nats ahead, those that turn. Needs a quiet machine. Prints tables;
the last line is one JSON object. With --out it writes speed.json there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from profile_decode import opened, rounded

from compress import machine
from compress.formats.gguf import export_gguf
from compress.formats.onnx import export_onnx
from compress.formats.onnx_activations import compared
from compress.score.latency import Timing, compare_speed, measure
from compress.session import log
from compress.text.packing import pack

HELD_OUT, LENGTH = 8, 256
TRAIN = ["embedded:docstrings", "embedded:conversations"]
HELD = ("topics", "conversations")
GOALS = {
    "tok_s_onnx_times": ("at least", 1.6),
    "kl_shift_nats": ("at most", 5e-3),
    "turned_share": ("at most", 5e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    threads = machine.available_threads()
    timing = Timing(prompt_tokens=64, new_tokens=64, repeats=3, threads=threads, processes=1)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = options.checkpoint
        if not checkpoint:
            session = opened(work / "store", "q4_0", threads, ["teacher=embedded"])
            checkpoint = rounded(session, work)
        text = pack(TRAIN, checkpoint, LENGTH + 1, work / "data", weights=[1.0, 1.0], log=log)
        plain, a8, file = work / "onnx", work / "onnx-A8", work / "model-Q4_0.gguf"
        export_onnx(checkpoint, plain)
        start = time.monotonic()
        figures: dict[str, Any] = export_onnx(checkpoint, a8, "A8", text.ids[:, :-1].long())
        figures["choosing_seconds"] = time.monotonic() - start
        export_gguf(checkpoint, file, "Q4_0")

        # On rows that decided nothing.
        for name in HELD:
            held = pack([f"embedded:{name}"], checkpoint, LENGTH + 1, work / "data", log=log)
            shift = compared(plain, a8, held.ids[:HELD_OUT, :-1].tolist())
            figures[f"kl_shift_nats/{name}"] = shift["rounding_kl_nats"]
            figures[f"turned_share/{name}"] = shift["rounding_turned_share"]
        for key in ("kl_shift_nats", "turned_share"):
            figures[key] = max(figures[f"{key}/{name}"] for name in HELD)

        runtimes = {plain: "onnxruntime", a8: "onnxruntime", file: "llama.cpp"}
        for path, runtime in runtimes.items():
            scores = measure(path, runtime, timing)["scores"]
            figures |= {f"{key}/{path.name}": value for key, value in scores.items()}
        ratios = compare_speed((plain, "onnxruntime"), (a8, "onnxruntime"), timing, options.blocks)
        figures["tok_s_onnx_times"], *figures["tok_s_onnx_times_interval"] = ratios[
            "latency_ms_p50"
        ]
        figures["ttft_onnx_times"], *figures["ttft_onnx_times_interval"] = ratios["ttft_ms_p50"]

    for name, value in figures.items():
        side, goal = GOALS.get(name, ("", ""))
        shown = f"{value:12.5g}" if isinstance(value, float) else str(value)
        print(f"{name:44s} {shown}  {side} {goal}")
    record = figures | {"machine": machine.describe(threads), "versions": machine.versions()}
    record |= {"git_sha": machine.git_sha()}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "speed.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
