"""Bits placed by bytes alone, and by bytes and milliseconds: is the same file faster for little KL?

    python scripts/bench_allocation.py [--bits 5.2] [--faster 0.15] [--grids q4_0 iq4_nl ...]
                                       [--rounds 7] [--times] [--work DIR] [--out FOLDER]

The embedded teacher, every matrix rounded to the nearest on a grid of its own, embeddings included.
Times: one file a grid, all matrices on it, timed in turn in llama.cpp; a matrix takes its share of
the weights of its grid's file. Damages: KL on 128 tokens of training text with one matrix on one
grid. By bytes: the least sum of damages within BITS a weight. By both: the same with milliseconds
at a price, the lowest at which the sum of times is FASTER below the first one's. Both files are
then timed (processes A B B A) and their KL to the teacher measured in llama.cpp, on 8 x 512 tokens
of the language reference and of held-out conversations. Needs a quiet machine. Prints tables; the
last line is one JSON object. With --out it writes allocation.json there. With --times it stops
behind those of the grids, and writes grids.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from profile_decode import opened

from compress import machine
from compress.formats.gguf import export_gguf
from compress.formats.llamacpp import LlamaCpp
from compress.formats.llamacpp import head as gguf_head
from compress.formats.torch_runtime import head as checkpoint_head
from compress.models.checkpoint import load_model
from compress.quant.allocate import Options, choose, options
from compress.quant.codes import quantizable
from compress.quant.settings import Allocation, GridName
from compress.score.fidelity import States, closeness, hidden_of
from compress.score.latency import Timing, compare_speed, measure_in_turn
from compress.search.speed import steady
from compress.session import Session, log
from compress.stages.ptq import Ptq
from compress.text.packing import pack

HELD_OUT, LENGTH = 8, 512
MEASURED = 128  # tokens of training text that damages are measured on
HELD = ("topics", "conversations")
HALVINGS = 40
SHARES_FASTER = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15)  # that the frontier is told at
Layout = dict[str, str]


class OnLayout(Ptq):
    """Rounding with the grid of every matrix given."""

    given: Layout

    def layout(self, *_: Any) -> Layout:
        return self.given


def made(session: Session, layout: Layout, name: str, work: Path) -> Path:
    """The teacher's GGUF on a layout."""
    file = work / f"{name}.gguf"
    if not file.is_file():
        stage = OnLayout(allocate=Allocation(file_bytes=1))
        stage.given = layout
        (work / name).mkdir(exist_ok=True)
        context = session.context(name, session.teacher.path, work / name, [])
        stage.run(session.teacher.path, work / name / "hf", context)
        export_gguf(work / name / "hf", file, "MIXED")
    return file


def times_by_grid(files: dict[str, Path], timing: Timing, rounds: int) -> dict[str, float]:
    """Milliseconds a token of each file, every second round backwards."""
    records = []
    for number in range(rounds):
        turn = list(files) if number % 2 == 0 else list(reversed(files))
        scores = measure_in_turn([files[grid] for grid in turn], "llama.cpp", timing)
        row = [
            {"token_ms": 1000 / s["tok_per_sec"]}
            | {name: s[name] for name in ("latency_ms_p50", "ttft_ms_p50")}
            for s in scores
        ]
        records.append(row if number % 2 == 0 else row[::-1])
        log(f"timing grids, round {number + 1}/{rounds}")
    return {grid: row["token_ms"] for grid, row in zip(files, steady(records), strict=True)}


def total_ms(layout: Layout, weights: dict[str, int], ms: dict[str, float]) -> float:
    return sum(weights[name] * ms[grid] for name, grid in layout.items()) / sum(weights.values())


def priced(damages: Options, weights: dict[str, int], ms: dict[str, float], nats: float) -> Options:
    """Damages with a price in nats on each millisecond."""
    every = sum(weights.values())
    return {
        name: {
            grid: (cost + nats * weights[name] * ms[grid] / every, size)
            for grid, (cost, size) in grids.items()
        }
        for name, grids in damages.items()
    }


def by_both(
    damages: Options, weights: dict[str, int], ms: dict[str, float], budget: int, most_ms: float
) -> Layout:
    """The layout of least damage at the lowest price of a millisecond that brings it to `most_ms`;
    the fastest one where none does.
    """
    low, high = 0.0, 1e3
    layout = choose(priced(damages, weights, ms, high), budget)
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5 if low else high / 4
        tried = choose(priced(damages, weights, ms, price), budget)
        if total_ms(tried, weights, ms) <= most_ms:
            high, layout = price, tried
        else:
            low = price
        if low and high / low < 1.01:
            break
    return layout


def frontier(
    damages: Options, weights: dict[str, int], ms: dict[str, float], budget: int
) -> list[dict[str, float]]:
    """What each share of time costs, as foretold: times as fast, and damage beside the least."""
    least = choose(damages, budget)
    rows = []
    for share in SHARES_FASTER:
        most_ms = (1 - share) * total_ms(least, weights, ms)
        layout = by_both(damages, weights, ms, budget, most_ms)
        rows.append(
            {
                "asked_faster": share,
                "times_as_fast": total_ms(least, weights, ms) / total_ms(layout, weights, ms),
                "damage_ratio": damage(layout, damages) / damage(least, damages),
            }
        )
    return rows


def damage(layout: Layout, damages: Options) -> float:
    return sum(damages[name][grid][0] for name, grid in layout.items())


def kl(file: Path, full: dict[str, States], texts: dict[str, Any]) -> dict[str, float]:
    llama = LlamaCpp(file, machine.available_threads(), LENGTH + 8)
    head = gguf_head(file)
    try:
        return {
            name: closeness(
                full[name],
                States(torch.cat(llama.hidden_states(data.ids[:HELD_OUT, :-1].tolist())), head),
            )["kl"]
            for name, data in texts.items()
        }
    finally:
        llama.close()


def mixtures(
    session: Session, chosen: argparse.Namespace, ms: dict[str, float], timing: Timing, work: Path
) -> dict[str, Any]:
    """Both files: what they hold, their KL, and how much faster the second one is."""
    teacher = session.teacher.path
    model = load_model(teacher)
    ids = session.text(teacher).ids[:1, :MEASURED].long()
    damages = options(model, ids, chosen.grids, work / "damages.json", "damages", log)
    weights = {name: round(model.get_parameter(name).numel()) for name in damages}

    # The layouts, the second one foretold to be faster.
    budget = round(chosen.bits / 8 * sum(weights.values()))
    layouts = {"by bytes": choose(damages, budget)}
    limit = (1 - chosen.faster) * total_ms(layouts["by bytes"], weights, ms)
    layouts["by both"] = by_both(damages, weights, ms, budget, limit)

    # What they are, and what they cost.
    texts = {
        name: pack([f"embedded:{name}"], teacher, LENGTH, work / "data", log=log) for name in HELD
    }
    full = {
        name: States(hidden_of(model, data.ids[:HELD_OUT]), checkpoint_head(teacher))
        for name, data in texts.items()
    }
    files = {
        name: made(session, layout, name.replace(" ", "_"), work)
        for name, layout in layouts.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, layout in layouts.items():
        shares: Counter[str] = Counter()
        for matrix, grid in layout.items():
            shares[grid] += weights[matrix]
        rows[name] = {
            "size_bytes": files[name].stat().st_size,
            "predicted_ms": total_ms(layout, weights, ms),
            "damage_nats": damage(layout, damages),
            "shares": {g: n / sum(weights.values()) for g, n in shares.items()},
            **{f"kl/{text}": value for text, value in kl(files[name], full, texts).items()},
        }

    a, b = ((file, "llama.cpp") for file in files.values())
    first, second = (sum(row[f"kl/{text}"] for text in HELD) for row in rows.values())
    return {
        "rows": rows,
        "frontier": frontier(damages, weights, ms, budget),
        "times_as_fast": compare_speed(a, b, timing, chosen.blocks)["latency_ms_p50"],
        "kl_ratio": second / first,
        "bits": chosen.bits,
        "asked_faster": chosen.faster,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=float, default=5.2)
    parser.add_argument("--faster", type=float, default=0.15)
    grids = ["q4_0", "iq4_nl", "q5_0", "q8_0"]  # the teacher lies on q4_1
    parser.add_argument("--grids", nargs="+", choices=list(GridName), default=grids)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    threads = machine.available_threads()
    timing = Timing(prompt_tokens=64, new_tokens=64, repeats=1, threads=threads, processes=1)

    with tempfile.TemporaryDirectory() as folder:
        work = (chosen.work or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        session = opened(work / "store", "q4_0", threads, ["teacher=embedded"])
        names = list(quantizable(load_model(session.teacher.path)))
        files = {g: made(session, dict.fromkeys(names, g), g, work) for g in chosen.grids}
        ms = times_by_grid(files, timing, chosen.rounds)
        record: dict[str, Any] = {"token_ms": ms}
        if not chosen.times:
            record |= mixtures(session, chosen, ms, timing, work)

    for grid, value in ms.items():
        print(f"{grid:10s} {value:8.3f} ms a token, all matrices on it")
    for name, row in record.get("rows", {}).items():
        print(name, json.dumps(row))
    for row in record.get("frontier", []):
        print("foretold", json.dumps(row))
    if not chosen.times:
        print(f"times as fast {record['times_as_fast']}, KL {record['kl_ratio']:.3f} times")
    record |= {"machine": machine.describe(threads), "versions": machine.versions()}
    record |= {"git_sha": machine.git_sha()}
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        name = "grids.json" if chosen.times else "allocation.json"
        (chosen.out / name).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
