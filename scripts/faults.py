"""Kills, full disks, races, damage, hostile inputs, secrets and sockets: the promises of
SECURITY.md, tried.

    python scripts/faults.py [--parts NAME ...] [--quick] [--seed N] [--scale SHARE] [--work DIR]

Each part tries what it promises so many times, seeded: the same seed tries the same. --quick is a
few of each, as `make test` does; --scale a share of the full counts. Prints a table; the last line
is one JSON object with what was tried, what passed, and the goal of every part. Exit code 1 where
anything failed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / part)
    for part in ("", "scripts", "tests", "tests/ship")
]

import fault_bundles  # noqa: E402
import fault_forks  # noqa: E402
import fault_hostile  # noqa: E402
import fault_recipes  # noqa: E402
import fault_saves  # noqa: E402
from fault_forks import Figure  # noqa: E402


class Harness:
    """A seed, a folder to work in, and the undisturbed runs that parts compare with."""

    def __init__(self, work: Path, seed: int, scale: float, *, quick: bool) -> None:
        self.work = work
        self.seed = seed
        self.scale = scale
        self.quick = quick
        fault_saves.give(work)

    def count(self, full: int, few: int) -> int:
        """How often a part tries: `few` in the quick form, else a share of `full`."""
        return few if self.quick else max(1, round(full * self.scale))

    def draw(self, part: str) -> random.Random:
        """Random numbers of one part alone: parts don't change each other's."""
        return random.Random(f"{self.seed} {part}")

    @cached_property
    def short(self) -> fault_saves.Made:
        """A run of a few seconds with every kind of save."""
        return fault_saves.made(self.work / "short", fault_saves.SHORT)

    @cached_property
    def smoke(self) -> fault_saves.Made:
        """The whole smoke recipe, with all processes that it starts."""
        return fault_saves.made(self.work / "smoke", fault_saves.SMOKE, ["times", "programs"])

    @property
    def bundle(self) -> Path:
        """The bundle of the short run."""
        assert self.short.digests
        return fault_saves.newest(self.work / "short") / "bundle"


def _kills(harness: Harness) -> Figure:
    return fault_saves.kills(
        harness.work, harness.draw("kills"), harness.count(66, 1), reference=harness.short
    )


def _random(harness: Harness) -> Figure:
    quick = harness.quick
    return fault_saves.random_kills(
        harness.work,
        harness.draw("random"),
        harness.count(50, 2),
        command=fault_saves.SHORT if quick else fault_saves.SMOKE,
        reference=harness.short if quick else harness.smoke,
        signals=[signal.SIGTERM, signal.SIGINT] if quick else fault_saves.SIGNALS,
    )


def _races(harness: Harness) -> Figure:
    return fault_saves.races(
        harness.work, harness.draw("races"), harness.count(20, 1), reference=harness.short
    )


def _disk(harness: Harness) -> Figure:
    return fault_saves.full_disks(
        harness.work, harness.draw("disk"), harness.count(10, 1), reference=harness.short
    )


def _flips(harness: Harness) -> Figure:
    return fault_bundles.flips(
        harness.bundle, harness.work, harness.draw("flips"), harness.count(1000, 20)
    )


def _hostile(harness: Harness) -> Figure:
    most = len(fault_hostile.CASES)
    return fault_hostile.hostile(
        harness.work / "hostile",
        harness.bundle.parent,
        harness.draw("hostile"),
        harness.count(most, 4),
    )


def _recipes(harness: Harness) -> Figure:
    return fault_recipes.recipes(
        harness.work / "recipes", harness.draw("recipes"), harness.count(200, 12)
    )


def _fuzz(harness: Harness) -> Figure:
    return fault_recipes.fuzz(
        harness.bundle, harness.work / "fuzz", harness.draw("fuzz"), harness.count(10_000, 150)
    )


def _sockets(harness: Harness) -> Figure:
    return fault_bundles.sockets([harness.short if harness.quick else harness.smoke])


def _canaries(harness: Harness) -> Figure:
    told = harness.short.outcome.text
    short = harness.work / "short"
    return fault_bundles.canaries(harness.work / "canaries", short, told, quick=harness.quick)


PARTS: dict[str, Callable[[Harness], Figure]] = {
    "kills": _kills,
    "random": _random,
    "races": _races,
    "flips": _flips,
    "disk": _disk,
    "hostile": _hostile,
    "recipes": _recipes,
    "fuzz": _fuzz,
    "sockets": _sockets,
    "canaries": _canaries,
}


def main(argv: list[str] | None = None) -> int:
    """Try the parts, print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full counts")
    parser.add_argument(
        "--work", type=Path, help="a new folder; removed at the end where not given"
    )
    options = parser.parse_args(argv)

    fault_forks.warm()
    work = options.work or Path(tempfile.mkdtemp(prefix="compress-faults-"))
    work.mkdir(parents=True, exist_ok=True)
    harness = Harness(work.resolve(), options.seed, options.scale, quick=options.quick)
    figures: dict[str, Figure] = {}
    seconds: dict[str, float] = {}
    try:
        for part in options.parts:
            start = time.monotonic()
            figures[part] = PARTS[part](harness)
            seconds[part] = round(time.monotonic() - start, 1)
            figure = figures[part]
            print(f"{part:<9} {figure.passed:>6}/{figure.tried:<6} {seconds[part]:>7.1f} s", end="")
            print(f"  {figure.what}", flush=True)
            for failure in figure.failures:
                print(f"          {' '.join(failure.split())[:600]}", flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)

    holds = all(figure.holds for figure in figures.values())
    table = {
        part: {"tried": figure.tried, "passed": figure.passed, "goal": figure.goal}
        | {"reached": figure.holds and figure.tried >= figure.goal, "seconds": seconds[part]}
        | figure.more
        for part, figure in figures.items()
    }
    print(json.dumps({"seed": options.seed, "quick": options.quick, "holds": holds, **table}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
