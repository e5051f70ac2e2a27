"""Peaks of memory of every stage, beside what `compress/memory.py` tells.

    python scripts/bench_memory.py measure 0.4B [STAGE ...]     each stage in a process of its own
    python scripts/bench_memory.py table                        docs/scale.md, by formulas alone

A model of random weights is written piece by piece; then a process for each stage runs it, on a few
rows of text, and tells its peak (VmHWM). malloc gives pieces above a megabyte back at once
(MALLOC_MMAP_THRESHOLD_), so that a peak is what was held and not what was kept for later. `measure`
adds to results/scale/memory.json and writes memory.md anew; the last line is JSON. AWQ tries 2
exponents instead of 20, which changes no peak. No state of a training is saved: the copy that a
thread writes is made only where twice its bytes are free, so it is nothing that a stage needs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_models import SHAPES
from omegaconf import OmegaConf

from compress import machine
from compress.assets import PACKAGE
from compress.memory import Account, Given, Setup
from compress.models.decoder_sizes import Shape
from compress.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "scale"
SEQ_LEN = 32

# Llama's shape: hidden, FFN, blocks, vocabulary, heads, key-value heads.
MODELS = {
    "30M": (256, 768, 12, 32000, 8, 4),
    "0.4B": (1024, 1536, 48, 32000, 16, 4),
    "1B": (2048, 2816, 32, 49152, 32, 8),
}
TRAINED = {"tokens": 4 * SEQ_LEN, "batch_sequences": 2, "micro_batch_sequences": 2}
# A stage by a name of its own: technique, its options, and the trainer's.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "prune_depth": ("prune_depth", {"blocks": 1, "calibration_sequences": 2, "fold": False}, {}),
    "prune_heads": ("prune_heads", {"kv_groups": 2, "damping": 0.01}, {}),
    "prune_width": ("prune_width", {"ffn": 1280, "damping": 0.01}, {}),
    "sparsify": ("sparsify", {"calibration_sequences": 2}, {}),
    "ptq": ("ptq", {}, {}),
    "ptq_awq": ("ptq", {"balance": "awq", "calibration_sequences": 2}, {}),
    "ptq_gptq": ("ptq", {"method": "gptq", "calibration_sequences": 2}, {}),
    "distill": ("distill", TRAINED, {}),
    "distill_checkpointed": ("distill", TRAINED, {"activation_checkpointing": True}),
    "distill_int8": ("distill", TRAINED, {"precision": "bf16_stochastic", "moments": "int8"}),
    "lora": ("lora", TRAINED | {"data": "text"}, {}),
    "lora_bf16": ("lora", TRAINED | {"data": "text"}, {"precision": "bf16"}),
    "qat": ("qat", TRAINED, {}),
    "qat_adapters": ("qat", TRAINED | {"rank": 16}, {}),
    "qat_scales": ("qat", TRAINED | {"train": "scales", "scales": "learned"}, {}),
}


# Qwen2.5-7B's shape.
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    **SHAPES["7B"],
}
GPU_GB, HOST_GB = 80, 128
PAGE = ROOT / "docs" / "scale.md"
BEGIN = "<!-- written by scripts/bench_memory.py table -->"
END = "<!-- up to here -->"
BF16 = {"precision": "bf16", "activation_checkpointing": True}
STOCHASTIC = {"precision": "bf16_stochastic", "activation_checkpointing": True}
TWO = BF16 | {"parallel": "fsdp2", "processes": 2}
BATCH = {"batch_sequences": 16, "micro_batch_sequences": 4}
ONE_PASS = {"batch_sequences": 8, "micro_batch_sequences": 8}
# What is said of a stage and of its trainer, technique, options, and how it computes.
AT_7B: list[tuple[str, str, tuple[str, dict[str, Any], dict[str, Any]]]] = [
    ("FFN narrowed by a quarter", "64 rows", ("prune_width", {"ffn": 14208}, BF16)),
    ("4 blocks dropped and folded", "64 rows", ("prune_depth", {"blocks": 4}, BF16)),
    ("heads: 2 of 4 groups", "64 rows", ("prune_heads", {"kv_groups": 2}, BF16)),
    ("rounded, nearest", "no text", ("ptq", {}, BF16)),
    ("rounded, AWQ", "64 rows", ("ptq", {"balance": "awq"}, BF16)),
    ("rounded, GPTQ", "64 rows", ("ptq", {"method": "gptq"}, BF16)),
    ("distilled, cached", "bf16 autocast, checkpointed", ("distill", BATCH, BF16)),
    ("distilled, cached", "bf16_stochastic, checkpointed", ("distill", BATCH, STOCHASTIC)),
    (
        "distilled, cached",
        "the same, moments int8, one micro-batch a step",
        ("distill", ONE_PASS, STOCHASTIC | {"moments": "int8"}),
    ),
    (
        "distilled, cached",
        "bf16_stochastic, checkpointed, moments on the host",
        ("distill", BATCH, STOCHASTIC | {"moments": "host"}),
    ),
    ("distilled, cached", "two GPUs, fsdp2, bf16, checkpointed", ("distill", BATCH, TWO)),
    ("LoRA, rank 16", "bf16 autocast, checkpointed", ("lora", BATCH | {"data": "text"}, BF16)),
    (
        "LoRA, rank 16, base in nf4",
        "bf16 autocast, checkpointed",
        ("lora", BATCH | {"data": "text", "load_in_4bit": True}, BF16),
    ),
    ("qat, adapters", "bf16 autocast, checkpointed", ("qat", BATCH | {"rank": 16}, BF16)),
    (
        "qat, adapters",
        "bf16_stochastic, checkpointed",
        ("qat", BATCH | {"rank": 16}, STOCHASTIC),
    ),
    ("qat, all weights", "bf16 autocast, checkpointed", ("qat", BATCH, BF16)),
    (
        "qat, all weights",
        "two GPUs, fsdp2, bf16_stochastic, checkpointed, one micro-batch a step",
        ("qat", ONE_PASS, STOCHASTIC | {"parallel": "fsdp2", "processes": 2}),
    ),
]


def stage_of(case: str, model: str) -> Any:
    """A case's stage, with as many rows as its columns need."""
    technique, options, _ = CASES[case]
    hidden, ffn = MODELS[model][:2]
    columns = {"prune_width": ffn, "prune_heads": hidden}.get(technique)
    if columns:
        options = options | {"calibration_sequences": max(8, -(-columns // SEQ_LEN))}
    if technique == "prune_width":
        options = options | {"ffn": ffn * 5 // 6}
    merged = OmegaConf.merge(OmegaConf.structured(STAGES[technique]), options)
    return OmegaConf.to_object(merged)


def config_of(model: str) -> dict[str, Any]:
    """The HF config of a random model."""
    from transformers import LlamaConfig

    hidden, ffn, blocks, vocabulary, heads, kv_heads = MODELS[model]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    values: dict[str, Any] = config.to_dict()
    return values | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}


def write_model(folder: Path, model: str) -> None:
    """A checkpoint of random bf16 weights, of which one tensor at a time is in memory."""
    from compress.models.model_config import meta_model
    from compress.models.tensor_file import Entry, write_tensors
    from compress.teacher import random_teacher

    random_teacher(folder, 0)  # for its tokenizer
    config = config_of(model)
    generator = torch.Generator().manual_seed(0)

    def maker(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return lambda: torch.ones(shape, dtype=torch.bfloat16)
        return lambda: (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    shapes = {name: tuple(t.shape) for name, t in meta_model(config).state_dict().items()}
    entries = {name: Entry(torch.bfloat16, shape, maker(shape)) for name, shape in shapes.items()}
    write_tensors(folder / "model.safetensors", entries, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def context_of(case: str, teacher: Path, folder: Path) -> Any:
    """What a stage may ask of a run."""
    from compress.stages.context import Context
    from compress.text.packing import pack

    packed = pack(["embedded:topics"], teacher, SEQ_LEN, folder.parent / "data")
    rows = 4 if CASES[case][0] in ("distill", "lora", "qat") else len(packed.ids)
    text = replace(packed, ids=packed.ids[:rows], mask=packed.mask[:rows], first=None)
    setup = Setup(**CASES[case][2])
    return Context(
        teacher=teacher,
        seed=0,
        seq_len=SEQ_LEN,
        work=folder,
        signals=folder / "signals",
        calibration=lambda n: text.ids[:n, :-1].long(),
        text=lambda: text,
        chat=lambda: text,
        precision=setup.precision,
        label=case,
        file_overhead=lambda checkpoint: 1000,
        log=lambda line: print(line, file=sys.stderr),
        curve=lambda rows: None,
        activation_checkpointing=setup.activation_checkpointing,
        moments=setup.moments,
    )


def peak_bytes() -> int:
    """The most that this process has held: its own pages and those of files that it has mapped."""
    text = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s*(\d+) kB", text)
    assert match, "a Linux kernel tells VmHWM"
    return int(match[1]) * 1024


def child(case: str, model: str, teacher: Path) -> None:
    """Run a stage; a line of JSON."""
    from compress.quant import balance
    from compress.train import state

    torch.set_num_threads(1)
    balance.STEPS = 2
    state.SAVE_SECONDS = float("inf")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=teacher.parent) as folder:
        ctx = context_of(case, teacher, Path(folder) / "work")
        ctx.work.mkdir()
        stage_of(case, model).run(teacher, Path(folder) / "out", ctx)
    print(json.dumps({"peak_bytes": peak_bytes(), "seconds": time.monotonic() - begun}))


def account_of(case: str, model: str) -> Account:
    """What the formulas tell of a case on a CPU."""
    shape = Shape(config_of(model))
    setup = Setup(**CASES[case][2])
    account: Account = stage_of(case, model).memory(Given(shape, shape, SEQ_LEN, setup))
    return account


def measured(case: str, model: str, teacher: Path) -> dict[str, Any]:
    """A case's peak, beside what is told of it. RuntimeError when its process fails."""
    command = [sys.executable, __file__, "child", model, case, "--teacher", str(teacher)]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "PYTHONPATH": str(PACKAGE.parent),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    account = account_of(case, model)
    phases = {
        name: sum(i.device + i.host for i in items if i.what != "CUDA context")
        for name, items in account.phases.items()
    }
    return {
        "model": model,
        "stage": case,
        "peak_bytes": row["peak_bytes"],
        "told_bytes": round(account.together()),
        "phase": max(phases, key=lambda name: phases[name]),
        "seconds": round(row["seconds"]),
    }


def ratio(row: dict[str, Any]) -> float:
    """Told over measured."""
    return float(row["told_bytes"] / row["peak_bytes"])


def measure(model: str, cases: list[str], results: Path) -> list[dict[str, Any]]:
    """Every case of a model, each in its process; what is recorded of others stays."""
    from compress.text.packing import pack

    results.mkdir(parents=True, exist_ok=True)
    record = results / "memory.json"
    rows = json.loads(record.read_text())["rows"] if record.is_file() else []
    # What is told of earlier peaks is told by the formulas as they are now.
    for row in rows:
        row["told_bytes"] = round(account_of(row["stage"], row["model"]).together())
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as folder:
        teacher = Path(folder) / model
        write_model(teacher, model)
        pack(["embedded:topics"], teacher, SEQ_LEN, Path(folder) / "data")
        for case in cases:
            try:
                row = measured(case, model, teacher)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            print(f"{row}  told / measured {ratio(row):.3f}", file=sys.stderr, flush=True)
            rows = [one for one in rows if (one["model"], one["stage"]) != (model, case)]
            rows.append(row)
            about = {"commit": machine.git_sha(), "machine": machine.describe(1)}
            record.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
            write_page(rows, results)
    return rows


def write_page(rows: list[dict[str, Any]], results: Path) -> None:
    """memory.md beside memory.json."""
    lines = [
        "# Peaks of memory",
        "",
        "`python scripts/bench_memory.py measure MODEL`: VmHWM of a process for each stage, on a"
        " CPU, where device and host are one; told is what `compress/memory.py` says. Models are"
        " Llamas of random bf16 weights, rows of 32 tokens.",
        "",
        "| model | parameters (M) | stage | measured (MB) | told (MB) | told / measured |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (list(MODELS).index(row["model"]), row["stage"])):
        params = Shape(config_of(row["model"])).params / 1e6
        numbers = (row["peak_bytes"] / 1e6, row["told_bytes"] / 1e6, ratio(row))
        lines.append(
            f"| {row['model']} | {params:.0f} | {row['stage']} | {numbers[0]:.0f} |"
            f" {numbers[1]:.0f} | {numbers[2]:.2f} |"
        )

    # The limit of pruning and rounding, where a model is large enough for it to mean something.
    params = Shape(config_of("1B")).params
    limit = 1.3 * 2 * params + 2e9
    large = [row for row in rows if row["model"] == "1B"]
    if large:
        most = max(large, key=lambda row: row["peak_bytes"])
        lines += [
            "",
            f"Limit of pruning and rounding at 1B: 1.3 times {2 * params / 1e6:.0f} MB of bf16 and"
            f" 2 GB, {limit / 1e6:.0f} MB. The most here: {most['stage']},"
            f" {most['peak_bytes'] / 1e6:.0f} MB, device and host together.",
        ]
    (results / "memory.md").write_text("\n".join(lines) + "\n")


def rows_of_7b() -> list[str]:
    """The lines of docs/scale.md's table."""
    shape = Shape(QWEN_7B)
    lines = [
        "| stage | how | GPU (GB) | host (GB) | fits | the most of the GPU's |",
        "|---|---|---:|---:|---|---|",
    ]
    for stage, trainer, (technique, options, setup) in AT_7B:
        merged = OmegaConf.merge(OmegaConf.structured(STAGES[technique]), options)
        instance: Any = OmegaConf.to_object(merged)
        account = instance.memory(Given(shape, shape, 2048, Setup(**setup), gpu=True))
        device, host = account.device() / 1e9, account.host() / 1e9
        fits = "yes" if device < GPU_GB and host < HOST_GB else "**no**"
        most = account.listed(3, "device") or account.listed(3, "host")
        lines.append(f"| {stage} | {trainer} | {device:.1f} | {host:.1f} | {fits} | {most} |")
    return lines


def write_table() -> None:
    """Put the table into docs/scale.md, between its marks."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text("\n".join([before + BEGIN, "", *rows_of_7b(), "", END + after]))


def main() -> None:
    """Parse, and do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("table")
    for verb in ("measure", "child"):
        one = verbs.add_parser(verb)
        one.add_argument("model", choices=MODELS)
        one.add_argument("cases", nargs="*", choices=[*CASES, []])
        one.add_argument("--teacher", type=Path)
        one.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    if arguments.verb == "table":
        write_table()
        return
    if arguments.verb == "child":
        child(arguments.cases[0], arguments.model, arguments.teacher)
        return
    rows = measure(arguments.model, arguments.cases or list(CASES), arguments.results)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
