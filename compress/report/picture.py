"""Drawings as SVG without scripts: the size-accuracy-latency picture, and lines over steps, tokens
or seconds.

The picture: x = bytes on disk, y = accuracy kept above chance (KL to the teacher when no task was
scored; axis turned so that up is always better), bubble area = milliseconds per token, arrows from
parent to child. Ringed and joined: the Pareto front of the two axes (nothing else is both smaller
and better). Drawn for a wide and a narrow screen; CSS shows one.

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

from compress.report.records import Run
from compress.report.table import COLUMN, Column, undominated

CSS = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
PALETTE = dict(
    re.findall(r"--(\w+): (#[0-9a-f]{6})", CSS.partition("@media")[0])
)  # the light colours by name
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
FAMILY = {
    "teacher": "teacher",
    "distill": "recover",
    "lora": "recover",
    "ptq": "quant",
    "qat": "quant",
}
RUN_COLOURS = ("ship", "prune", "recover", "quant", "teacher", "bad")


@contextmanager
def drawing(width: int, height: int, x_name: str, y_name: str) -> Iterator[tuple[Any, Any]]:
    """An empty (figure, axes) of that many pixels, whatever style the user's matplotlib has."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # letters that matplotlib's own font lacks: the browser has them
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
    unused = r' clip-path="[^"<]*"|<clipPath.*?</clipPath>| transform="rotate\(-0 [^"<]*"|\s*\n\s*'
    svg = re.sub(unused, "", out.getvalue()[out.getvalue().index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (d|x|y)="[^"<]+"', lambda numbers: re.sub(r"(\.\d)\d+", r"\1", numbers[0]), svg)
    for name, colour in PALETTE.items():
        svg = svg.replace(f": {colour}", f": var(--{name}, {colour})")
    svg = re.sub(
        '<g id="title:([^"]*)">',
        r'<g tabindex="0" role="img" aria-label="\1"><title>\1</title>',
        svg,
    )
    svg = re.sub('<g id="[^"]*">', "<g>", svg)
    return svg.replace(
        "<svg ", f'<svg class="{kind}" role="group" aria-label="{escape(label)}" ', 1
    )


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
    """A slot in the picture: (mb, y) in units of the axes; radius and `at`, measured from the
    lower left, in pixels.
    """

    run: int
    slot: str
    parent: str | None
    colour: str
    mb: float
    y: float
    ms: float | None
    summary: str
    radius: float = 6.0
    at: Any = (0.0, 0.0)
    front: bool = False


def family(technique: str) -> str:
    """What kind of thing a technique does, which is its colour."""
    return FAMILY.get(technique, "prune" if technique.startswith("prune_") else "ship")


def size_accuracy_latency(runs: Sequence[Run]) -> str:
    """Both drawings, or '' when fewer than two slots have a size and a closeness to plot."""
    for measure, up in ((COLUMN["kept"], 1), (COLUMN["kl_to_teacher"], -1)):
        points = _points(runs, measure)
        if len(points) > 1:
            for p, on in zip(points, undominated([(p.mb, -up * p.y) for p in points]), strict=True):
                p.front = on
            return _svg(points, measure, up, "wide", 960, 470) + _svg(
                points, measure, up, "narrow", 380, 440
            )
    return ""


def _points(runs: Sequence[Run], measure: Column) -> list[Point]:
    size, speed, points = COLUMN["size_bytes"], COLUMN["latency_ms_p50"], []
    for number, run in enumerate(runs):
        for r in run.records:
            mb, y, ms = size.value(r), measure.value(r), speed.value(r)
            if mb is None or y is None or not math.isfinite(mb + y):
                continue
            said = (
                f"{r['slot']}: {size.text(r)} MB, {measure.head.replace(chr(10), ' ')}"
                f" {measure.text(r)}"
            )
            said += (
                f", {speed.text(r)} ms per token in {r.get('runtime', 'torch')}"
                if ms is not None
                else ""
            )
            colour = RUN_COLOURS[number % 6] if len(runs) > 1 else family(r["technique"])
            points.append(
                Point(
                    number,
                    r["slot"],
                    r.get("parent"),
                    colour,
                    mb / 1e6,
                    y * measure.scale,
                    ms,
                    said,
                )
            )
    return points


def _svg(points: list[Point], measure: Column, up: int, kind: str, width: int, height: int) -> str:
    name = "accuracy kept" if up > 0 else "KL to teacher (nats, less is better)"
    with drawing(width, height, "size on disk (MB)", f"↑ {name}") as (figure, axes):
        axes.yaxis.set_major_formatter("{x:g}" + measure.suffix)
        values = [p.y for p in points]
        spread = (max(values) - min(values)) or 1.0
        axes.set_xlim(0, max(p.mb for p in points) * 1.16 or 1.0)
        axes.set_ylim(*(min(values) - 0.14 * spread, max(values) + 0.1 * spread)[::up])
        figure.draw_without_rendering()
        figure.set_layout_engine(
            "none"
        )  # from here on the axes stay where they are, and points can be told in pixels
        slowest, largest = max(p.ms or 0 for p in points), 26 if kind == "wide" else 17
        for p in points:
            p.at = axes.transData.transform((p.mb, p.y))
            p.radius = max(4.0, largest * math.sqrt(p.ms / slowest)) if p.ms and slowest else 6.0
        for p in sorted(points, key=lambda p: -p.radius):
            colour, area = PALETTE[p.colour], (2 * p.radius) ** 2
            axes.scatter(
                p.mb,
                p.y,
                area,
                [(colour, 0.28)],
                edgecolors=colour,
                linewidths=1.6,
                gid=f"title:{p.summary}",
            )
        _labels(points, axes, _lines(points, axes), kind == "wide")
        svg = to_svg(figure, kind, "size, closeness and latency of every slot")
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
    look = {"arrowstyle": "-|>", "color": PALETTE["muted"], "alpha": 0.65, "linewidth": 1.2}
    for p, parent in (
        (p, q) for p in points for q in points if q.run == p.run and q.slot == p.parent
    ):
        paths.append(Path([parent.at, p.at]))
        if math.dist(p.at, parent.at) >= p.radius + parent.radius + 12:
            gaps = {"shrinkA": parent.radius + 3, "shrinkB": p.radius + (7 if p.front else 3)}
            axes.annotate(
                "", (p.mb, p.y), (parent.mb, parent.y), arrowprops=look | gaps, zorder=0.9
            )
    return paths


def _labels(points: list[Point], axes: Any, lines: list[Any], wide: bool) -> None:
    """A name beside every bubble, where it covers least: bubbles and names count more than lines,
    and lines more than being near.
    """
    from matplotlib.transforms import Bbox

    taken = [
        Bbox([p.at - rim, p.at + rim]) for p in points for rim in [p.radius + (5 if p.front else 0)]
    ]
    for p in sorted(points, key=lambda p: (-p.front, -p.at[1])):
        said = p.slot[:24] + (f" {p.ms:.3g} ms" if p.ms is not None and wide else "")
        text = axes.annotate(
            said, (p.mb, p.y), (0, 0), textcoords="offset points", va="center", weight="bold"
        )
        gap = p.radius + 8
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
        choices = []
        for rank, (x, y) in enumerate(sides):
            text.set(position=(x, y), ha="left" if x > 0 else "right" if x < 0 else "center")
            box = text.get_window_extent()
            outside = not (
                axes.bbox.x0 - 8 < box.x0 and box.x1 < axes.figure.bbox.x1 and box.y1 < axes.bbox.y1
            )
            crossed = sum(line.intersects_bbox(box, filled=False) for line in lines)
            choices.append(
                (
                    1000 * outside + 20 * box.count_overlaps(taken) + crossed + rank / 8,
                    rank,
                    text.get_ha(),
                    box,
                )
            )
        _, rank, side, box = min(choices, key=lambda choice: choice[0])
        text.set(position=sides[rank], ha=side)
        taken.append(box)
