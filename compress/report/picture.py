"""Drawings as SVG without scripts: the size-accuracy-latency picture, and lines over steps, tokens
or seconds.

The picture of a run: x = bytes on disk, y = accuracy kept above chance (KL to the teacher when no
task was scored; axis turned so that up is always better), bubble area = milliseconds per token,
arrows from parent to child. Of several runs: what each ships, by its name, with the 95% interval,
and their teachers; y as `table.measure_of` says. Ringed and joined: the Pareto front of the two
axes (nothing else is both smaller and better). Drawn for a wide and a narrow screen; CSS shows one.

matplotlib draws. Its colours become the page's CSS variables with themselves to fall back on, so
that a drawing follows a dark page and is still whole in a file of its own.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from compress.report.records import Record, Run
from compress.report.table import BITS, COLUMN, KL, Column, measure_of, undominated
from compress.stages import STAGES

CSS = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
# The light colours by name.
PALETTE = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", CSS.partition("@media")[0]))
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compress",
    "text.parse_math": False,
    "figure.dpi": 72,
    "font.size": 12,
    "axes.titlesize": 12,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": PALETTE["line"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.titlecolor": PALETTE["muted"],
    "text.color": PALETTE["ink"],
    **{f"axes.spines.{side}": False for side in ("left", "top", "right")},
    **{f"{axis}tick.color": PALETTE["muted"] for axis in "xy"},
    "xtick.bottom": False,
    "ytick.left": False,
}
RUN_COLOURS = ("ship", "prune", "recover", "quantize", "teacher", "bad")


@contextmanager
def drawing(width: int, height: int, x_name: str, y_name: str) -> Iterator[tuple[Any, Any]]:
    """An empty (figure, axes) of that many pixels, whatever style the user's matplotlib has."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks: the browser has them.
        warnings.simplefilter("ignore", UserWarning)

        figure = Figure((width / 72, height / 72), layout="constrained")
        FigureCanvasAgg(figure)  # measures texts
        axes = figure.add_subplot()
        axes.set_xlabel(x_name, loc="right")
        axes.set_title(y_name, loc="left")
        axes.locator_params(nbins=6)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        yield figure, axes


def to_svg(figure: Any, kind: str, label: str) -> str:
    """The figure as an <svg> of class `kind`; what has a gid "title:..." shows the rest of it, to
    the keyboard as well.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = out.getvalue()

    # Smaller: without what does nothing, and coordinates to a tenth of a pixel.
    unused = r' clip-path="[^"<]*"|<clipPath.*?</clipPath>| transform="rotate\(-0 [^"<]*"|\s*\n\s*'
    svg = re.sub(unused, "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (d|x|y)="[^"<]+"', lambda numbers: re.sub(r"(\.\d)\d+", r"\1", numbers[0]), svg)

    # The page's own colours, with these to fall back on.
    for name, colour in PALETTE.items():
        svg = svg.replace(f": {colour}", f": var(--{name}, {colour})")

    titled = r'<g tabindex="0" role="img" aria-label="\1"><title>\1</title>'
    svg = re.sub('<g id="title:([^"]*)">', titled, svg)
    svg = re.sub('<g id="[^"]*">', "<g>", svg)
    root = f'<svg class="{kind}" role="group" aria-label="{escape(label)}" '
    return svg.replace("<svg ", root, 1)


def lines_svg(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_name: str,
    y_name: str,
    kind: str = "curves",
    width: int = 640,
) -> str:
    """A drawing of named lines, each at least one point (x, y); a legend below; '' when there is
    nothing to draw.
    """
    if sum(map(len, series.values())) < 2:
        return ""

    # A row of the legend takes 20 pixels.
    columns = 2 if width > 500 else 1
    with drawing(width, 320 + 20 * -(-len(series) // columns), x_name, y_name) as (figure, axes):
        for name, line in series.items():
            axes.plot(
                *zip(*line, strict=True),
                marker="o" if len(line) < 20 else "",
                markersize=4,
                linewidth=2,
                gid=f"title:{name}",
            )
        figure.legend(axes.lines, list(series), loc="outside lower left", ncols=columns)
        return to_svg(figure, kind, f"{y_name} over {x_name}: {', '.join(series)}")


@dataclass
class Point:
    """A record in the picture: (mb, y) in units of the axes, `ends` of its interval in those of y;
    radius and `at`, measured from the lower left, in pixels. `slot` is its name there.
    """

    slot: str
    parent: str | None
    colour: str
    mb: float
    y: float
    ends: tuple[float, float]
    ms: float | None
    summary: str
    radius: float = 6.0
    at: Any = (0.0, 0.0)
    front: bool = False


AXES = {
    "open/kept": "open answers kept",
    "kept": "accuracy kept",
    KL: "KL to teacher (nats, less is better)",
    BITS: "bits per byte (less is better)",
}


def family(technique: str) -> str:
    """What kind of thing a technique does, which is its colour: that of a stage, `teacher`, or
    `ship` for a file.
    """
    if technique in STAGES:
        return STAGES[technique].family.value
    return "teacher" if technique == "teacher" else "ship"


def size_accuracy_latency(run: Run) -> str:
    """Both drawings of a run's slots, or '' when fewer than two have a size and a closeness."""
    measure = measure_of(run.records)
    points = [
        _point(record, measure, record["slot"], family(record["technique"]))
        for record in run.records
    ]
    return _drawings(points, measure, "size, closeness and latency of every slot")


def candidates(runs: Sequence[Run]) -> str:
    """Both drawings of what is compared of each run, with intervals, and of the teachers; '' when
    fewer than two have a size and a closeness.
    """
    measure = measure_of([run.final for run in runs], between_runs=True)
    teachers = {run.teacher["digest"]: run.teacher for run in runs if run.teacher}
    points = [_point(teacher, measure, "teacher", "muted") for teacher in teachers.values()]
    for number, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
        if run.final is not run.teacher:
            colour = RUN_COLOURS[number % len(RUN_COLOURS)]
            points.append(_point(run.final, measure, name, colour, interval=True))
    return _drawings(points, measure, "size, closeness and latency of every candidate")


def _names(runs: Sequence[Run]) -> list[str]:
    """Of each run as little as tells them apart: its recipe, or its name without what all have."""
    recipes = [run.info["recipe"] for run in runs]
    if len(set(recipes)) == len(runs):
        return recipes
    parts = [run.name.split("/") for run in runs]
    if len(set(recipes)) > 1 or len(set(map(tuple, parts))) < len(runs):
        return [run.name for run in runs]
    shared = next(i for i in range(99) if len({tuple(part[: i + 1]) for part in parts}) > 1)
    return ["/".join(part[shared:]) or part[-1] for part in parts]


def _point(
    record: Record, measure: Column | None, name: str, colour: str, interval: bool = False
) -> Point | None:
    """A record as a point, None without a size or what is measured; with its interval where one
    is known.
    """
    size, speed = COLUMN["size_bytes"], COLUMN["latency_ms_p50"]
    size_bytes = size.finite(record)
    y = measure.finite(record) if measure else None
    if measure is None or size_bytes is None or y is None:
        return None
    low, high = record.get("intervals", {}).get(measure.key, (y, y)) if interval else (y, y)

    # What a point says to the pointer and the keyboard.
    head = measure.head.replace("/\n", "/").replace("\n", " ")
    summary = f"{name}: {size.text(record)} MB, {head} {measure.text(record)}"
    if low < high:
        ends = (f"{end * measure.scale:.{measure.digits}f}{measure.suffix}" for end in (low, high))
        summary += f" ({' to '.join(ends)})"
    ms = speed.value(record)
    if ms is not None:
        summary += f", {speed.text(record)} ms per token in {record.get('runtime', 'torch')}"
    return Point(
        name,
        record.get("parent"),
        colour,
        size_bytes / 1e6,
        y * measure.scale,
        (low * measure.scale, high * measure.scale),
        ms,
        summary,
    )


def _drawings(places: Sequence[Point | None], measure: Column | None, label: str) -> str:
    """The picture for a wide and a narrow screen, '' of fewer than two points."""
    points = [point for point in places if point is not None]
    if measure is None or len(points) < 2:
        return ""
    front = undominated([(p.mb, -measure.sign * p.y) for p in points])
    for point, on_front in zip(points, front, strict=True):
        point.front = on_front
    wide = _svg(points, measure, label, "wide", 960, 470)
    return wide + _svg(points, measure, label, "narrow", 380, 440)


def _svg(
    points: list[Point], measure: Column, label: str, kind: str, width: int, height: int
) -> str:
    """One drawing of the points, `width` x `height` pixels. Sets their places and radii."""
    name = f"↑ {AXES[measure.key]}"
    with drawing(width, height, "size on disk (MB)", name) as (figure, axes):
        axes.yaxis.set_major_formatter("{x:g}" + measure.suffix)
        values = [end for p in points for end in p.ends]
        spread = (max(values) - min(values)) or 1.0
        axes.set_xlim(0, max(p.mb for p in points) * 1.16 or 1.0)
        limits = (min(values) - 0.14 * spread, max(values) + 0.1 * spread)
        axes.set_ylim(*limits[:: measure.sign])

        # From here on the axes stay where they are, and points can be told in pixels.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        slowest = max(p.ms or 0 for p in points)
        largest = 26 if kind == "wide" else 17
        for p in points:
            p.at = axes.transData.transform((p.mb, p.y))
            p.radius = max(4.0, largest * math.sqrt(p.ms / slowest)) if p.ms and slowest else 6.0

        # Small bubbles over large ones.
        for p in sorted(points, key=lambda p: -p.radius):
            colour = PALETTE[p.colour]
            area = (2 * p.radius) ** 2
            axes.scatter(
                p.mb,
                p.y,
                area,
                [(colour, 0.28)],
                edgecolors=colour,
                linewidths=1.6,
                gid=f"title:{p.summary}",
            )
        _labels(points, axes, _lines(points, axes) + _intervals(points, axes), kind == "wide")
        svg = to_svg(figure, kind, label)
    return re.sub(r"( [\d.e+-]+ ms)(?=</text>)", r'<tspan class="ms">\1</tspan>', svg)


def _lines(points: list[Point], axes: Any) -> list[Any]:
    """Rings and a staircase for the front, arrows between the rims of bubbles that don't touch;
    the paths, in pixels.
    """
    from matplotlib.path import Path

    front = sorted((p for p in points if p.front), key=lambda p: p.at[0])
    corners = [p.mb for p in front], [p.y for p in front]
    axes.scatter(
        *corners,
        [(2 * p.radius + 8) ** 2 for p in front],
        "none",
        edgecolors=PALETTE["good"],
        linewidths=1.6,
    )
    (stairs,) = axes.step(
        *corners,
        where="post",
        color=PALETTE["good"],
        linewidth=1.5,
        linestyle=(0, (1, 2.5)),
        zorder=0.9,
    )
    paths = [stairs.get_transform().transform_path(stairs.get_path())]

    # A name avoids the way from parent to child also where it is too short for an arrow.
    look = {"arrowstyle": "-|>", "color": PALETTE["muted"], "alpha": 0.65, "linewidth": 1.2}
    point_by_slot: dict[str | None, Point] = {p.slot: p for p in points}
    for p in points:
        parent = point_by_slot.get(p.parent)
        if parent is None:
            continue
        paths.append(Path([parent.at, p.at]))
        if math.dist(p.at, parent.at) >= p.radius + parent.radius + 12:
            gaps = {"shrinkA": parent.radius + 3, "shrinkB": p.radius + (7 if p.front else 3)}
            axes.annotate(
                "", (p.mb, p.y), (parent.mb, parent.y), arrowprops=look | gaps, zorder=0.9
            )
    return paths


def _intervals(points: list[Point], axes: Any) -> list[Any]:
    """A line from end to end of each interval, and its path in pixels."""
    from matplotlib.path import Path

    paths = []
    for p in points:
        if p.ends[0] < p.ends[1]:
            colour = PALETTE[p.colour]
            ends = [[p.y - p.ends[0]], [p.ends[1] - p.y]]
            axes.errorbar(p.mb, p.y, ends, ecolor=colour, elinewidth=1.6, capsize=4, zorder=0.95)
            paths.append(Path(axes.transData.transform([(p.mb, end) for end in p.ends])))
    return paths


def _labels(points: list[Point], axes: Any, lines: list[Any], wide: bool) -> None:
    """A name beside every bubble, where it covers least: bubbles and names count more than lines,
    and lines more than being near.
    """
    from matplotlib.transforms import Bbox

    taken = []
    for p in points:
        rim = p.radius + (5 if p.front else 0)
        taken.append(Bbox([p.at - rim, p.at + rim]))

    # Those on the front choose first, from the top down.
    for p in sorted(points, key=lambda p: (-p.front, -p.at[1])):
        name = p.slot[:24]
        if p.ms is not None and wide:
            name += f" {p.ms:.3g} ms"
        text = axes.annotate(
            name, (p.mb, p.y), (0, 0), textcoords="offset points", va="center", weight="bold"
        )
        _place(text, p.radius + 8, axes, lines, taken)
        taken.append(text.get_window_extent())


def _place(text: Any, gap: float, axes: Any, lines: list[Any], taken: list[Any]) -> None:
    """Move a name to the side of its bubble, `gap` pixels from its centre, where it costs least."""
    sides = [
        (gap, 0),
        (-gap, 0),
        (0, gap + 6),
        (0, -gap - 6),
        (gap - 4, -16),
        (gap - 4, 16),
        (4 - gap, -16),
        (4 - gap, 16),
        (0, gap + 24),
        (0, -gap - 24),
    ]

    # Leaving the drawing costs most, then covering bubbles and names, then lines, then distance.
    costs = []
    for rank, side in enumerate(sides):
        _put(text, side)
        box = text.get_window_extent()
        outside = not (
            axes.bbox.x0 - 8 < box.x0 and box.x1 < axes.figure.bbox.x1 and box.y1 < axes.bbox.y1
        )
        crossed = sum(line.intersects_bbox(box, filled=False) for line in lines)
        costs.append(1000 * outside + 20 * box.count_overlaps(taken) + crossed + rank / 8)
    _put(text, sides[costs.index(min(costs))])


def _put(text: Any, side: tuple[float, float]) -> None:
    """Move a name by `side`, in pixels, so that it grows away from its bubble."""
    x, _ = side
    text.set(position=side, ha="left" if x > 0 else "right" if x < 0 else "center")
