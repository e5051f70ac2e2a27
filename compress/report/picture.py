"""The size-accuracy-latency picture, as inline SVG without scripts.

x = bytes on disk, y = accuracy kept above chance (KL to the teacher when no task was scored; axis turned so that up
is always better), bubble area = milliseconds per token, arrows from parent to child. Ringed and joined: the Pareto
front of the two axes (nothing else is both smaller and better). Drawn for a wide and a narrow screen; CSS shows one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from compress.report.records import Run
from compress.report.table import COLUMNS, Column

COLUMN = {c.key: c for c in COLUMNS}
FAMILY = {
    "teacher": "teacher", "prune_depth": "prune", "prune_width": "prune", "prune_vocab": "prune", "distill": "recover",
    "lora": "recover", "ptq": "quant", "qat": "quant", "export_gguf": "ship", "export_hf": "ship",
}  # fmt: skip
LETTER = 6.9  # pixels of a letter at 12 px in a wide face


@dataclass
class Point:
    """A slot in the picture: (mb, y) in units of the axes, (px, py, radius) in pixels."""

    run: int
    slot: str
    parent: str | None
    family: str
    mb: float
    y: float
    ms: float | None
    summary: str
    px: float = 0.0
    py: float = 0.0
    radius: float = 6.0
    front: bool = False


@dataclass(frozen=True)
class Frame:
    """Pixels of the drawing and what its edges stand for."""

    width: int
    height: int
    left: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    top: int = 18
    bottom: int = 46
    right: int = 18

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        worst, best = self.y_range
        return self.top + (best - value) / (best - worst) * (self.height - self.top - self.bottom)


def size_accuracy_latency(runs: Sequence[Run]) -> str:
    """Both drawings, or '' when fewer than two slots have a size and a closeness to plot."""
    measure = next((COLUMN[k] for k in ("kept", "kl_to_teacher") if len(_points(runs, COLUMN[k])) > 1), None)
    if measure is None:
        return ""
    points = _points(runs, measure)
    up = 1 if measure.key == "kept" else -1
    mark_front(points, up)
    sizes = ("wide", 960, 470), ("narrow", 380, 440)
    return "".join(_svg(points, measure, up, len(runs) > 1, *size) for size in sizes)


def mark_front(points: Sequence[Point], up: int) -> None:
    """Set `front` where no other point is at most as large and at least as good, and better in one of the two."""
    for p in points:
        p.front = not any(q.mb <= p.mb and up * q.y >= up * p.y and (q.mb < p.mb or up * q.y > up * p.y) for q in points)


def _points(runs: Sequence[Run], measure: Column) -> list[Point]:
    size, speed, points = COLUMN["size_bytes"], COLUMN["latency_ms_p50"], []
    for number, run in enumerate(runs):
        for r in run.records:
            mb, y, ms = size.value(r), measure.value(r), speed.value(r)
            if mb is None or y is None or not math.isfinite(mb + y):
                continue
            said = f"{size.text(r)} MB, {measure.head.replace(chr(10), ' ')} {measure.text(r)}"
            said += f", {speed.text(r)} ms per token in {r.get('runtime', 'torch')}" if ms is not None else ""
            family = FAMILY.get(r["technique"], "ship")
            points.append(Point(number, r["slot"], r.get("parent"), family, mb / 1e6, y * measure.scale, ms, said))
    return points


def _svg(points: list[Point], measure: Column, up: int, many: bool, kind: str, width: int, height: int) -> str:
    values = [p.y for p in points]
    spread = (max(values) - min(values)) or 1.0
    ends = (min(values) - 0.14 * spread, max(values) + 0.1 * spread)
    left = 50 if kind == "narrow" else 62
    frame = Frame(width, height, left, (0, max(p.mb for p in points) * 1.16), ends if up > 0 else ends[::-1])
    slowest, largest = max((p.ms or 0 for p in points), default=0), 26 if kind == "wide" else 17
    for p in points:
        p.px, p.py = frame.x(p.mb), frame.y(p.y)
        p.radius = max(4.0, largest * math.sqrt(p.ms / slowest)) if p.ms and slowest else 6.0
    body = [_axes(frame, measure, up), _front(points), *(_arrow(p, points) for p in points)]
    for p in sorted(points, key=lambda p: -p.radius):
        colour = f"run{p.run % 6}" if many else p.family
        label = escape(f"{p.slot}: {p.summary}")
        ring = f'<circle class="ring" cx="{p.px:.1f}" cy="{p.py:.1f}" r="{p.radius + 4:.1f}"/>' if p.front else ""
        body.append(f'<g class="{colour}" tabindex="0" role="img" aria-label="{label}"><title>{label}</title>{ring}'
                    f'<circle class="dot" cx="{p.px:.1f}" cy="{p.py:.1f}" r="{p.radius:.1f}"/></g>')  # fmt: skip
    body += _labels(points, frame)
    return (f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="group" '
            f'aria-label="size, closeness and latency of every slot">{"".join(body)}</svg>')  # fmt: skip


def _axes(f: Frame, measure: Column, up: int) -> str:
    foot, end = f.height - f.bottom, f.width - f.right
    out = []
    for tick in ticks(min(f.y_range), max(f.y_range), 5):
        y, text = f.y(tick), f"{tick:g}{measure.suffix}"
        out.append(f'<path class="grid" d="M{f.left} {y:.1f}H{end}"/>'
                   f'<text class="tick" x="{f.left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')  # fmt: skip
    for tick in ticks(*f.x_range, 5 if f.width < 500 else 8):
        out.append(f'<text class="tick" x="{f.x(tick):.1f}" y="{foot + 18}" text-anchor="middle">{tick:g}</text>')
    name = "accuracy kept" if up > 0 else "KL to teacher (nats, less is better)"
    out.append(f'<path class="axis" d="M{f.left} {foot}H{end}"/>'
               f'<text class="name" x="{end}" y="{f.height - 8}" text-anchor="end">size on disk (MB)</text>'
               f'<text class="name" x="{f.left - 2}" y="{f.top - 5}">↑ {name}</text>')  # fmt: skip
    return "".join(out)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw) * power
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def _front(points: list[Point]) -> str:
    """The front as a staircase: what size buys the next better closeness."""
    corners = _corners(points)
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
    return f'<path class="front" d="M{path}"/>' if len(corners) > 1 else ""


def _corners(points: list[Point]) -> list[tuple[float, float]]:
    front = sorted((p.px, p.py) for p in points if p.front)
    return [c for (_, y0), (x, y) in pairwise([front[0], *front]) for c in ((x, y0), (x, y))]


def _parent(p: Point, points: list[Point]) -> Point | None:
    return next((q for q in points if q.run == p.run and q.slot == p.parent), None)


def _arrow(p: Point, points: list[Point]) -> str:
    """A line from the parent's rim to this one's, with a head; nothing when the two bubbles touch."""
    parent = _parent(p, points)
    distance = math.hypot(p.px - parent.px, p.py - parent.py) if parent else 0.0
    if parent is None or distance < p.radius + parent.radius + 12:
        return ""
    ux, uy = (p.px - parent.px) / distance, (p.py - parent.py) / distance
    x0, y0 = parent.px + ux * (parent.radius + 3), parent.py + uy * (parent.radius + 3)
    gap = p.radius + (7 if p.front else 3)
    x1, y1 = p.px - ux * gap, p.py - uy * gap
    corners = [(x1 - 8 * ux + side * uy, y1 - 8 * uy - side * ux) for side in (-4, 4)]
    head = f"M{x1:.1f} {y1:.1f}" + "".join(f"L{x:.1f} {y:.1f}" for x, y in corners)
    line = f"M{x0:.1f} {y0:.1f}L{x1 - 6 * ux:.1f} {y1 - 6 * uy:.1f}"
    return f'<path class="arrow" d="{line}"/><path class="head" d="{head}Z"/>'


def _labels(points: list[Point], f: Frame) -> list[str]:
    """A name beside every bubble, on the first side where it covers least: bubbles and names count more than lines."""
    rims = [(p, p.radius + (5 if p.front else 0)) for p in points]
    taken: list[tuple[float, ...]] = [(p.px - r, p.py - r, p.px + r, p.py + r) for p, r in rims]
    lines = [box for a, b in pairwise(_corners(points)) for box in _along(*a, *b)]
    for p in points:
        if parent := _parent(p, points):
            lines += _along(p.px, p.py, parent.px, parent.py)
    out = []
    for p in sorted(points, key=lambda p: (-p.front, p.py)):
        name, ms = p.slot[:24], f" {p.ms:.3g} ms" if p.ms is not None and f.width > 500 else ""
        wide, gap = LETTER * len(name + ms), p.radius + 8
        slots = [(p.px + gap, p.py), (p.px - gap - wide, p.py), (p.px - wide / 2, p.py - gap - 6),
                 (p.px - wide / 2, p.py + gap + 6), (p.px + gap - 4, p.py + 16), (p.px + gap - 4, p.py - 16),
                 (p.px - gap - wide + 4, p.py + 16), (p.px - gap - wide + 4, p.py - 16),
                 (p.px - wide / 2, p.py - gap - 24), (p.px - wide / 2, p.py + gap + 24)]  # fmt: skip
        boxes = [(x, y - 7, x + wide, y + 7) for x, y in slots]
        inside = [b for b in boxes if b[0] > f.left and b[2] < f.width and b[1] > f.top] or boxes
        costs = [20 * sum(_overlap(b, t) for t in taken) + sum(_overlap(b, t) for t in lines) for b in inside]
        box = inside[costs.index(min(costs))]
        taken.append(box)
        rest = f'<tspan class="ms">{ms}</tspan>' if ms else ""
        out.append(f'<text class="label" x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{escape(name)}{rest}</text>')
    return out


def _along(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, ...]]:
    """Small boxes every few pixels along a line, which names had better not cover."""
    count = int(math.hypot(x1 - x0, y1 - y0) // 5) + 1
    spots = [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in spots]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
