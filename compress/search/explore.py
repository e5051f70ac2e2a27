"""From allowed shapes to one: the sum of single damages says where to begin, measured cuts say
where to go on, and short healing decides.

The start are shapes on the edge of what is allowed, cheapest first by the sum over structures of
what each level alone loses (the additive model of ZipLM's and DarwinLM's databases, arXiv
2302.04089 and 2502.07780; so few combinations are left at homogeneous shapes that all are counted,
where they need dynamic programming). The best measured ones are mutated: one structure a level up,
another as many down as the limits ask for, then as far up again as they allow. What interacts
corrects the sum: each structure's damages are scaled to fit what was measured,

    w = argmin_{w >= 0} sum_i (1 - sum_s w_s d_s(i) / kl(i))^2 + RIDGE sum_s (w_s - 1)^2.

The survivors are healed for a few thousand tokens, the better half of them four times as long, and
so on (training-aware selection, DarwinLM section 3.3; successive halving): a cut that starts worse
may come back faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from compress.search.shapes import STRUCTURES, Levels, Shape

RIDGE = 0.05  # how much one fitted shape counts beside the trust in the plain sum
Nats = dict[Shape, float]


class Effort(NamedTuple):
    """How much is tried. Rungs: tokens of healing, and how many shapes are healed so long."""

    first: int = 6
    parents: int = 2
    children: int = 4
    rounds: int = 3
    rungs: tuple[tuple[int, int], ...] = ((16384, 3), (65536, 2))


class Clock:
    """The time that a search has, from now on."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.start = now()
        self.seconds = 60 * minutes

    def spent(self) -> float:
        """Seconds since the start."""
        return self._now() - self.start

    def allows(self, seconds: float, share: float = 1.0) -> bool:
        """Whether so many more seconds fit into a share of the time."""
        return self.spent() + seconds <= share * self.seconds

    def __str__(self) -> str:
        return f"{max(0.0, self.seconds - self.spent()) / 60:.1f} min left"


class Damages:
    """What each level loses, alone: nats a token by structure and level, between measured ones
    along a straight line.
    """

    def __init__(self, full: Shape, alone: Mapping[Shape, float]) -> None:
        """`alone`: the loss of shapes that differ from the full one in one structure."""
        self.full = full
        self.curves: dict[str, dict[int, float]] = {}
        for name in STRUCTURES:
            top = getattr(full, name)
            self.curves[name] = {top: 0.0} | {
                getattr(shape, name): nats
                for shape, nats in alone.items()
                if shape._replace(**{name: top}) == full
            }

    def parts(self, shape: Shape) -> np.ndarray:
        """The loss of each structure's level, in nats, in the order of STRUCTURES."""
        losses = []
        for name in STRUCTURES:
            levels = sorted(self.curves[name])
            nats = np.maximum.accumulate([self.curves[name][level] for level in levels][::-1])[::-1]
            losses.append(_between(getattr(shape, name), levels, nats))
        return np.array(losses)

    def sum(self, shape: Shape) -> float:
        """The additive loss of a shape."""
        return float(self.parts(shape).sum())

    def corrected(self, measured: Mapping[Shape, float]) -> Callable[[Shape], float]:
        """The sum with each structure scaled to what whole shapes lost."""
        from scipy.optimize import nnls

        rows = [self.parts(shape) / max(nats, 1e-6) for shape, nats in measured.items()]
        trust = np.sqrt(RIDGE) * np.eye(len(STRUCTURES))
        targets = [np.ones(len(rows)), np.sqrt(RIDGE) * np.ones(len(STRUCTURES))]
        weights, _ = nnls(np.vstack([*rows, trust]), np.concatenate(targets))
        return lambda shape: float(weights @ self.parts(shape))


def _between(level: int, levels: Sequence[int], nats: np.ndarray) -> float:
    """The loss of a level; below the lowest measured one along the last line."""
    if level >= levels[0] or len(levels) == 1:
        return float(np.interp(level, levels, nats))
    slope = (nats[1] - nats[0]) / (levels[1] - levels[0])
    return float(nats[0] + slope * (level - levels[0]))


def singles(levels: Levels, shapes: Collection[Shape], count: int) -> list[Shape]:
    """Shapes that differ from the full one in one structure: of each at most `count` levels, evenly
    over those that `shapes` have. The lowest of every structure come first: without them a
    structure would seem to cost nothing.
    """
    full = levels.full
    lowest, others = [], []
    for name in STRUCTURES:
        used = {getattr(shape, name) for shape in shapes}
        lower = [level for level in getattr(levels, name)[1:] if level in used]
        places = np.unique(np.round(np.linspace(-1, len(lower) - 1, count + 1)[1:]).astype(int))
        row = [full._replace(**{name: lower[place]}) for place in places if lower]
        lowest += row[-1:]
        others += row[:-1]
    return lowest + others


def mutations(shape: Shape, levels: Levels, allowed: Collection[Shape]) -> set[Shape]:
    """Shapes on the edge of what is allowed with one structure a level higher and another lower."""
    results = set()
    for up in STRUCTURES:
        higher = levels.stepped(shape, up, -1)
        if higher is None:
            continue

        # As many levels down of another one as the limits ask for.
        for down in (name for name in STRUCTURES if name != up):
            lowered: Shape | None = higher
            while lowered is not None and lowered not in allowed:
                lowered = levels.stepped(lowered, down, 1)
            if lowered is not None:
                results.add(_raised(lowered, levels, allowed, down))
    return results - {shape}


def _raised(shape: Shape, levels: Levels, allowed: Collection[Shape], last: str) -> Shape:
    """The shape with every structure as high as is allowed, the `last` one after all others."""
    for name in sorted(STRUCTURES, key=lambda name: name == last):
        while (higher := levels.stepped(shape, name, -1)) in allowed and higher is not None:
            shape = higher
    return shape


def explore(
    starts: Sequence[Shape],
    neighbours: Callable[[Shape], set[Shape]],
    damages: Damages,
    measure: Callable[[list[Shape]], Nats],
    effort: Effort,
    log: Callable[[str], None] = lambda line: None,
) -> Nats:
    """The measured loss of every shape that was tried, in nats a token.

    `measure` takes shapes and gives the loss of as many of them as time allows, at least of one
    where nothing is measured yet.
    """
    measured: Nats = {}
    waiting = sorted(starts, key=damages.sum)[: effort.first]
    for number in range(effort.rounds):
        fresh = measure(waiting)
        measured |= fresh
        best = sorted(measured, key=measured.__getitem__)[: effort.parents]
        nats = measured[best[0]]
        log(f"round {number + 1}: {len(measured)} shapes measured, best {nats:.4f} nats")
        if len(fresh) < len(waiting):
            break

        # Mutants of the best, those first that the corrected sum expects most of.
        estimate = damages.corrected(measured)
        offspring = {child for parent in best for child in neighbours(parent)} - measured.keys()
        waiting = sorted(sorted(offspring), key=estimate)[: effort.children]
        if not waiting:
            break
    return measured


def halve(
    shapes: Sequence[Shape],
    heal: Callable[[list[Shape], int], Nats],
    rungs: Sequence[tuple[int, int]],
) -> list[tuple[int, Nats]]:
    """Losses after healing by rung: (tokens, {shape: nats}), fewer shapes and more tokens.

    `shapes`: best first. `heal` gives what fits into the time; a rung of which not all were healed
    is the last one, and does not count where a shape is missing.
    """
    healed: list[tuple[int, Nats]] = []
    survivors = list(shapes)
    for tokens, count in rungs:
        # Fewer than two leave nothing to be decided.
        survivors = survivors[:count]
        if len(survivors) < 2:
            break
        nats = heal(survivors, tokens)
        if len(nats) < len(survivors):
            break

        healed.append((tokens, nats))
        survivors = sorted(survivors, key=nats.__getitem__)
    return healed
