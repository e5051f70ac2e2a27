"""What scales alone win back behind GPTQ's codes, beside training every weight from these codes and
from the nearest ones.

    python scripts/bench_scales.py [--tokens 30720] [--rates 1e-3] [--whole 1.1e-4] [--skip 6]
                                   [--work DIR] [--out results/quant]

The embedded teacher on `iq4_nl`, embeddings included, calibrated and trained half on docstrings,
half on conversations, towards itself: codes by GPTQ behind AWQ's balance, then `train=scales` at
each of --rates, then `train=all` at --whole from `method=gptq` and from `method=nearest`, each
behind AWQ's balance, for --tokens. KL is exact, on 6 rows of held-out topics and of held-out
conversations behind the first --skip: what is chosen by these figures is chosen on other rows than
those that are reported. What a row is made of is kept under --work. Prints a table and adds its
rows to scales.json; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench_prune import Bench, say

from compress.machine import available_threads, describe, git_sha
from compress.quant.settings import Balance, GridName, Method, Scales
from compress.stages.ptq import Ptq
from compress.stages.qat import LearnFrom, Qat, Trained
from compress.store import write_json

GRID: dict[str, Any] = {"grid": GridName.iq4_nl, "balance": Balance.awq}
COLUMNS = ("trained", "rate", "tokens", "rows behind", "KL topics", "KL conversations", "minutes")


def training(trained: Trained, rate: float, tokens: int, method: Method) -> Qat:
    """Scales behind GPTQ's codes, or every weight from those of a method."""
    return Qat(
        **GRID,
        calibration_sequences=32,
        train=trained,
        method=method,
        scales=Scales.learned,
        lr=rate,
        tokens=tokens,
        learn_from=LearnFrom.teacher,
        batch_sequences=2,
        micro_batch_sequences=2,
        warmup_fraction=0.1,
    )


def measured(bench: Bench, what: str, rate: float, tokens: int, stage: Any) -> dict[str, Any]:
    """A row of the table."""
    row = bench.row(f"{what}, {rate:g}, {tokens:,} tokens", (stage,))
    return dict(
        zip(
            COLUMNS,
            (
                what,
                rate,
                tokens,
                bench.skip,
                row["kl/topics"],
                row["kl/conversations"],
                row["seconds"] / 60,
            ),
            strict=True,
        )
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    for row in rows:
        kl = " | ".join(f"{row[name]:.4f}" for name in COLUMNS[4:6])
        lines.append(
            f"| {row['trained']} | {row['rate']:g} | {row['tokens']:,} | {row['rows behind']} |"
            f" {kl} | {row['minutes']:.1f} |"
        )
    return lines


def main() -> None:
    """GPTQ's codes, scales at every rate, all weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=30_720)
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3])
    parser.add_argument("--whole", type=float, nargs="*", default=[1.1e-4])
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/scales"))
    parser.add_argument("--out", type=Path, default=Path("results/quant"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)

    bench = Bench(options.work, options.threads, skip=options.skip)
    gptq = Ptq(**GRID, calibration_sequences=32, method=Method.gptq, scales=Scales.search)
    rows = [measured(bench, "nothing, GPTQ's codes", 0.0, 0, gptq)]
    ways = (
        ("scales", Trained.scales, Method.gptq, options.rates),
        ("all, from GPTQ's codes", Trained.all, Method.gptq, options.whole),
        ("all, from the nearest codes", Trained.all, Method.nearest, options.whole),
    )
    for what, trained, method, rates in ways:
        for rate in rates:
            stage = training(trained, rate, options.tokens, method)
            rows.append(measured(bench, what, rate, options.tokens, stage))

    # Rows of other runs stay.
    file = options.out / "scales.json"
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    named = {tuple(row[name] for name in COLUMNS[:4]): row for row in [*before, *rows]}
    kept = sorted(named.values(), key=lambda row: [row[name] for name in COLUMNS[3::-1]])
    about = {"machine": describe(options.threads), "commit": git_sha()}
    write_json(file, about | {"rows": kept})
    say("\n".join(table(rows)))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
