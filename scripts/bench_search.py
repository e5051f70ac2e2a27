"""Does a search predict times, rank shapes as longer training would, and beat a cut by hand?

    python scripts/bench_search.py [--teacher embedded] [--parts times rank solve hand] [--seeds 3]
                                   [--short 4096] [--minutes 20] [--store DIR] [--out FOLDER]

`times`: the relative error, 95th percentile, of milliseconds a token on random shapes that were
not fitted. `rank`: eight shapes of equal bytes healed for SHORT and five times as many tokens, and
Kendall's tau of the two orders. `solve`: minutes that a search takes in a fresh place, timing
included. `hand`: what a person would cut, five blocks and a quarter of the FFN, beside what a
search finds at the same predicted milliseconds, both healed for 16,384 tokens, by KL on held-out
text that no search sees; medians over seeds. Needs a quiet machine: nothing else may run. Prints a
table; the last line is one JSON object. With --out it writes search.json there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from compress import machine
from compress.budget import Limit
from compress.config import Recipe
from compress.formats.settings import Export
from compress.launch import without_recipe
from compress.quant.settings import GridName
from compress.search import solution
from compress.search.cutting import Workshop
from compress.search.explore import Clock, Effort
from compress.search.judge import Judge
from compress.search.limits import allowed, bounds_of, edge
from compress.search.shapes import Shape
from compress.search.sizes import Sizes
from compress.session import Session, log
from compress.stages.qat import Qat

PARTS = ("times", "rank", "solve", "hand")
GOALS = {
    "latency_pred_error_p95": ("at most", 0.05),
    "kendall_tau": ("at least", 0.7),
    "search_minutes": ("at most", 20.0),
    "kl_search_over_hand": ("at most", 0.9),
}
LONGER = 5
RANKED = 8
CHECKED = 8  # shapes whose times were not fitted
HEALED = 16_384  # tokens, of hand and search
SHARE = 0.61  # of the teacher's bytes: 60 MB of 98 are asked of the embedded one


def opened(options: argparse.Namespace, store: Path, seed: int) -> Session:
    parts = without_recipe([f"teacher={options.teacher}", f"store={store}", *options.settings])
    program = Recipe(
        **parts,
        export=Export(["gguf:IQ4_NL"]),
        stages={"qat": Qat(grid=GridName.iq4_nl)},
        pipeline=["qat"],
        seed=seed,
    )
    return Session(program)


def by_hand(full: Shape) -> Shape:
    """Five of thirty blocks and a quarter of the FFN less: the cut that docs and records had."""
    return full._replace(blocks=full.blocks - max(1, full.blocks // 6), ffn=full.ffn * 3 // 4)


def times(session: Session) -> dict[str, float]:
    solution.CHECKS = CHECKED
    family, skeletons = solution.opened(session, log)
    model = solution.speed_of(session, family, skeletons, log)
    return {
        "latency_pred_error_p95": model.error_p95(),
        "ttft_pred_error_p95": model.error_p95("ttft_ms_p50"),
        "rss_pred_error_p95": model.error_p95("peak_rss_bytes"),
    }


def rank(session: Session, short: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Kendall's tau of two lengths of healing, on shapes along the edge of one size."""
    family, skeletons = solution.opened(session, log)
    figures = solution.sizes_of_all(family, Sizes(family, skeletons.header_bytes))
    size = SHARE * figures[family.full]["size_bytes"]
    shapes = edge(allowed(figures, bounds_of({"size_bytes": Limit(max=size)}, {})), family.levels)
    places = np.linspace(0, len(shapes) - 1, RANKED).round().astype(int)
    chosen = [shapes[place] for place in dict.fromkeys(places.tolist())]

    workshop, clock = Workshop(session, family.full, log), Clock(1e6)
    first = workshop.healed(chosen, short, clock)
    second = workshop.healed(chosen, LONGER * short, clock)
    workshop.close()
    tau = kendalltau([first[s] for s in chosen], [second[s] for s in chosen]).statistic
    rows = {str(shape): [first[shape], second[shape]] for shape in chosen}
    return {"kendall_tau": float(tau)}, rows


def searched(session: Session, minutes: float, **limits: Limit) -> solution.Solution:
    return solution.solve(session, limits, Effort(), minutes, with_speed=True, log=log)


def hand(options: argparse.Namespace, store: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Held-out KL of the searched shape over that of the one by hand, at equal milliseconds."""
    session = opened(options, store, 0)
    family, skeletons = solution.opened(session, log)
    shape = by_hand(family.full)
    ms = solution.speed_of(session, family, skeletons, log).predict(shape)["latency_ms_p50"]
    # The bound is drawn tighter by its error; the same room is given to both here.
    limit = Limit(max=ms / 0.95)
    found = searched(session, options.minutes, latency_ms_p50=limit)

    ratios = []
    for seed in range(options.seeds):
        workshop = Workshop(opened(options, store, seed), family.full, log)
        judge = heldout_judge(workshop.session)
        losses = [judge.loss(workshop.heal(s, HEALED)) for s in (found.shape, shape)]
        ratios.append(losses[0] / losses[1])
        log(f"seed {seed}: search {losses[0]:.4f}, hand {losses[1]:.4f} nats")
        workshop.close()
    about = {"searched": str(found.shape), "hand": str(shape), "ms": ms, "ratios": ratios}
    return {"kl_search_over_hand": statistics.median(ratios)}, about


def heldout_judge(session: Session) -> Judge:
    """A judge on the recipe's held-out texts."""
    texts = session.scorer.setup.heldout.ids_SL
    return Judge(session.teacher.path, torch.as_tensor(texts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", type=int, default=4096)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--store", type=Path, help="a folder of its own, unless given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", help="as for compress run: data.seq_len=64")
    options = parser.parse_intermixed_args()

    figures: dict[str, float] = {}
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder) / "store"
        session = opened(options, store, 0)
        if "solve" in options.parts:  # first: nothing is kept yet
            start = time.monotonic()
            size = Limit(max=60e6)
            if options.teacher != "embedded":
                family, skeletons = solution.opened(session, log)
                sizes = Sizes(family, skeletons.header_bytes)
                size = Limit(max=SHARE * sizes.file_bytes(family.full))
            found = searched(session, options.minutes, size_bytes=size)
            figures["search_minutes"] = (time.monotonic() - start) / 60
            about["solve"] = solution.sentences(found)
        if "times" in options.parts:
            figures |= times(session)
        if "rank" in options.parts:
            tau, about["rank"] = rank(session, options.short)
            figures |= tau
        if "hand" in options.parts:
            ratio, about["hand"] = hand(options, store)
            figures |= ratio

    print(f"{'figure':26s} {'value':>10s}  goal")
    for name, value in figures.items():
        side, goal = GOALS.get(name, ("", float("nan")))
        print(f"{name:26s} {value:10.4f}  {f'{side} {goal}' if side else '-'}")
    where = machine.describe(machine.available_threads())
    record = figures | {"about": about, "machine": where, "commit": machine.git_sha()}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "search.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
