"""`compress doctor`: what is installed, what works here, and what to install for what lacks.

Each runtime that is installed generates a token of a tiny model that is made on the spot, in a
process of its own: one that crashes, or never answers, is told of like one that refuses.

    python -m compress.doctor RUNTIME      one line of JSON: {"token": ..., "device": ...}

Exit code 0 unless something that is installed does not work (5).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress import __version__
from compress.command_line import Parser
from compress.errors import EXIT_OK, EXIT_RESOURCES, printable
from compress.packages import EXTRAS, install_line, installed
from compress.scratch import Scratch
from compress.threads import available_threads

SECONDS = 180  # of one runtime, importing it included
LEAST_DISK, LEAST_MEMORY = 2_000_000_000, 2_000_000_000
# What an extra is for, where it lacks.
PURPOSE = {
    "accept": "verify needs nothing; accept and serve measure and run a GGUF with it",
    "train": "makes students: run, solve, score, ask, compare",
    "onnx": "writes and runs directories for ONNX Runtime GenAI",
    "qlora": "training on weights in 4 bits, moments in 8",
    "wandb": "track=wandb",
    "families": "GGUF of families besides Llama, Mistral and Qwen2",
    "serve": "the door of `compress serve`",
    "sign": "sign, and verify --key",
    "bom": "bom.json in bundles",
}


def doctor(arguments: list[str]) -> int:
    """Print what is here and what works. Returns the exit code, 0 or 5."""
    parser = Parser(prog="compress doctor")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")
    options = parser.parse_args(arguments)

    record: dict[str, Any] = {
        "compress": __version__,
        "python": platform.python_version(),
        "machine": machine(),
        "extras": {extra: installed(modules) for extra, modules in EXTRAS.items()},
        "runtimes": {name: tried(name) for name in RUNTIMES},
    }
    print(json.dumps(record) if options.json else "\n".join(_sentences(record)))
    works = [runtime["works"] for runtime in record["runtimes"].values()]
    return EXIT_RESOURCES if False in works else EXIT_OK


def machine() -> dict[str, Any]:
    """What this machine has: CPUs, and bytes of memory and disk that are free."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "threads": available_threads(),
        "memory_free_bytes": memory_free(),
        "disk_free_bytes": shutil.disk_usage(".").free,
    }


def memory_free() -> int | None:
    """Bytes of memory that a program may still take; None where the system does not say."""
    status = Path("/proc/meminfo")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return None


def tried(runtime: str) -> dict[str, Any]:
    """{"works": true, false, or None where it is not installed; "detail": a sentence; "device"} of
    a runtime, from a process of its own.
    """
    needed = NEEDS[runtime]
    lacking = [module for module in needed if importlib.util.find_spec(module) is None]
    if lacking:
        return {"works": None, "detail": f"{', '.join(lacking)} not installed", "device": None}

    # It imports this package, wherever it is started.
    package_folder = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "compress.doctor", runtime]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env=os.environ | {"PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return {"works": False, "detail": f"no answer in {SECONDS} s", "device": None}
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"works": False, "detail": printable(words[-1])[:300], "device": None}
    answer = json.loads(done.stdout.splitlines()[-1])
    return {"works": True, "detail": "generated a token", "device": answer["device"]}


def _sentences(record: dict[str, Any]) -> list[str]:
    """A line a fact."""
    here = record["machine"]
    memory, disk = here["memory_free_bytes"], here["disk_free_bytes"]
    lines = [
        f"compress {record['compress']}, Python {record['python']}, {here['system']},"
        f" {here['threads']} threads",
        f"free: {_size(memory)} of memory, {_size(disk)} of disk",
    ]
    if memory is not None and memory < LEAST_MEMORY:
        lines.append(f"  little memory: below {_size(LEAST_MEMORY)} only small files run")
    if disk < LEAST_DISK:
        lines.append(f"  little disk: below {_size(LEAST_DISK)} a run may not end; set store=DIR")

    # What is installed, each extra by what it is for.
    lines.append("")
    for extra, versions in record["extras"].items():
        lacking = [name for name, version in versions.items() if version is None]
        named = [f"{name} {version}" for name, version in versions.items() if version]
        lines.append(f"{extra:<9} {', '.join(named) or 'nothing of it'}")
        if lacking:
            lines.append(
                f"{'':<9} lacks {', '.join(lacking)} ({PURPOSE[extra]}): {install_line(extra)}"
            )

    lines.append("")
    words = {True: "works", False: "FAILS", None: "absent"}
    for name, runtime in record["runtimes"].items():
        device = f" on {runtime['device']}" if runtime["device"] else ""
        lines.append(f"{name:<12} {words[runtime['works']]:<7} {runtime['detail']}{device}")
    return lines


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:,.1f} GB"


# ------------------------------------------------------------------ in a process of its own


def llama_cpp(folder: Path) -> dict[str, Any]:
    """A token by llama.cpp, of a GGUF that is written here."""
    import xllamacpp

    from compress.formats.llamacpp import LlamaCpp

    tiny_gguf(folder / "tiny.gguf")
    server = LlamaCpp(folder / "tiny.gguf", 1, 32, 1, embedding=False)
    token = server.generate_ids([1, 70, 71], 1)
    server.close()
    names = [entry["type"].name for entry in xllamacpp.get_device_info()]
    return {"token": token, "device": "GPU" if any("GPU" in name for name in names) else "CPU"}


def tiny_gguf(file: Path) -> None:
    """A Llama of one block with random weights, and a tokenizer of single bytes."""
    import gguf
    import numpy as np

    hidden, ffn, heads = 32, 64, 2
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = gguf.TokenType
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    special = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    writer.add_token_types([*special, *[kinds.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    # Rows x columns of every matrix; norms are ones.
    generator = np.random.default_rng(0)
    square = (hidden, hidden)
    shapes = {f"blk.0.attn_{name}.weight": square for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}.weight": (ffn, hidden) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down.weight": (hidden, ffn), "token_embd.weight": (len(tokens), hidden)}
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.normal(size=shape).astype("float32"))
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(hidden, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def torch_runtime(folder: Path) -> dict[str, Any]:
    """A token by transformers, on the best device of this machine."""
    import torch

    from compress.models.checkpoint import best_device, load_model
    from compress.teacher import random_teacher

    random_teacher(folder, 0)
    model: Any = load_model(folder)
    model = model.to(best_device())
    ids = torch.tensor([[1, 5, 6]], device=model.device)
    token = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    return {"token": token, "device": str(model.device)}


def onnx_runtime(folder: Path) -> dict[str, Any]:
    """A token by ONNX Runtime GenAI, of a directory that is written here."""
    from compress import formats
    from compress.formats.onnxruntime import OnnxRuntime
    from compress.teacher import random_teacher

    random_teacher(folder / "hf", 0)
    format, type, _ = formats.parse("onnx")
    format.module.write(folder / "hf", folder / "onnx", type)
    server = OnnxRuntime(folder / "onnx", 1, 32)
    return {"token": server.generate_ids([1, 5, 6], 1), "device": "CPU"}


RUNTIMES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "llama.cpp": llama_cpp,
    "torch": torch_runtime,
    "onnxruntime": onnx_runtime,
}
# Modules of a runtime; where one lacks it is not installed.
NEEDS = {
    "llama.cpp": ("xllamacpp", "gguf", "numpy"),
    "torch": ("torch", "transformers"),
    "onnxruntime": ("onnx", "onnxruntime", "onnxruntime_genai", "torch"),
}


if __name__ == "__main__":
    with Scratch() as place:
        print(json.dumps(RUNTIMES[sys.argv[1]](place)))
