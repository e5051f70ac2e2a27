"""Which shapes a budget allows, and what it forbids: in sentences.

Size and parameters are exact. Times and memory are predicted: a limit on them is drawn tighter by
the error that was measured on shapes which were not fitted, at most MARGIN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compress.budget import Limit, human
from compress.errors import ConfigError
from compress.search.shapes import STRUCTURES, Levels, Shape

Figures = Mapping[str, float]
EXACT = ("size_bytes", "params")
TIMED = ("latency_ms_p50", "tok_per_sec", "ttft_ms_p50", "peak_rss_bytes")
SOLVABLE = (*EXACT, *TIMED)  # what can be told of a shape before it is cut
MARGIN = 0.05


@dataclass(frozen=True)
class Bound:
    """One limit on a figure: at most or at least, with the margin of its prediction."""

    name: str
    value: float
    is_most: bool
    margin: float = 0.0

    def holds(self, figure: float) -> bool:
        """Whether a figure is within it."""
        if self.is_most:
            return figure <= self.value * (1 - self.margin)
        return figure >= self.value * (1 + self.margin)

    def relaxed(self, share: float) -> Bound:
        """The same with a little more room."""
        factor = 1 + share if self.is_most else 1 - share
        return Bound(self.name, self.value * factor, self.is_most, self.margin)

    def best(self, figures: Iterable[float]) -> float:
        """The figure that is farthest inside."""
        return min(figures) if self.is_most else max(figures)

    def __str__(self) -> str:
        side = "at most" if self.is_most else "at least"
        drawn = f", less {100 * self.margin:.1f}% for its prediction" if self.margin else ""
        return f"{self.name} {side} {human(self.name, self.value)}{drawn}"


def bounds_of(limits: Mapping[str, Limit], errors: Mapping[str, float]) -> list[Bound]:
    """The limits of a budget that decide a shape; `errors`: the relative error of each prediction.
    ConfigError when there is none.
    """
    bounds = []
    for name, limit in limits.items():
        if name in SOLVABLE:
            is_most = limit.max is not None
            value = limit.max if limit.max is not None else limit.min
            assert value is not None, "a limit has one of both"
            bounds.append(Bound(name, value, is_most, min(MARGIN, errors.get(name, 0.0))))

    # Without one every shape would do, and the teacher's best.
    if not bounds:
        raise ConfigError(
            f"the budget limits none of {', '.join(SOLVABLE)}, so nothing decides a shape; name a"
            " budget that does, or give one, as in size_bytes=60e6"
        )
    return bounds


def allowed(figures: Mapping[Shape, Figures], bounds: Iterable[Bound]) -> set[Shape]:
    """The shapes within all bounds."""
    rules = list(bounds)
    return {
        shape
        for shape, values in figures.items()
        if all(rule.holds(values[rule.name]) for rule in rules)
    }


def check_possible(figures: Mapping[Shape, Figures], bounds: list[Bound]) -> None:
    """ConfigError when no shape is within all bounds: which one, and the nearest that can be."""
    if allowed(figures, bounds):
        return

    # A bound that no shape meets even alone.
    for bound in bounds:
        if not allowed(figures, [bound]):
            best = bound.best(values[bound.name] for values in figures.values())
            shape = next(s for s, values in figures.items() if values[bound.name] == best)
            raise ConfigError(
                f"no shape of this teacher meets {bound}: the nearest is {_rounded(bound, best)},"
                f" of {shape}. Allow that, or take a smaller teacher or a coarser grid"
            )

    # Bounds that exclude each other: what each could be beside all others.
    sentences = []
    for bound in bounds:
        others = allowed(figures, [other for other in bounds if other is not bound])
        if others:
            best = bound.best(figures[shape][bound.name] for shape in others)
            sentences.append(f"{bound.name} could be {_rounded(bound, best)}")
    advice = "; ".join(sentences) or "no two of them go together"
    raise ConfigError(
        f"each of {', '.join(map(str, bounds))} can be met, all of them together by no shape of"
        f" this teacher. Beside the others {advice}. Relax one of them"
    )


def _rounded(bound: Bound, figure: float) -> str:
    """A bound that the figure is within, as people say it: rounded to its safe side."""
    drawn = figure / (1 - bound.margin if bound.is_most else 1 + bound.margin)
    steps = {"params": 1e5, "tok_per_sec": 1.0}
    step = steps.get(bound.name, 1e5 if bound.name.endswith("bytes") else 0.1)
    count = math.ceil(drawn / step) if bound.is_most else math.floor(drawn / step)
    return human(bound.name, count * step)


def edge(shapes: set[Shape], levels: Levels) -> list[Shape]:
    """Those of the allowed shapes of which no structure can have a level more: all others are cut
    for nothing.
    """
    return sorted(
        shape
        for shape in shapes
        if all(levels.stepped(shape, name, -1) not in shapes for name in STRUCTURES)
    )
