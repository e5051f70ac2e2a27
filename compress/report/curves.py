"""Drawings as SVG without scripts: the canvas all of them share, and lines over steps, tokens or seconds.

matplotlib draws. Its colours become the page's CSS variables with themselves to fall back on, so that a drawing follows a
dark page and is still whole in a file of its own.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

CSS = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
PALETTE = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", CSS.partition("@media")[0]))  # the light colours by name
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "compress", "text.parse_math": False, "figure.dpi": 72, "font.size": 12, "axes.titlesize": 12,
    "font.sans-serif": ["DejaVu Sans"], "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False,
    "axes.grid": True, "axes.axisbelow": True, "axes.grid.axis": "y", "grid.color": PALETTE["line"], "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["muted"], "axes.titlecolor": PALETTE["muted"], "text.color": PALETTE["ink"],
    **{f"axes.spines.{side}": False for side in ("left", "top", "right")},
    **{f"{axis}tick.color": PALETTE["muted"] for axis in "xy"}, "xtick.bottom": False, "ytick.left": False,
}  # fmt: skip
Line = Sequence[tuple[float, float]]


@contextmanager
def drawing(width: int, height: int, x_name: str, y_name: str) -> Iterator[tuple[Any, Any]]:
    """An empty (figure, axes) of that many pixels, whatever style the user's matplotlib has."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that matplotlib's own font lacks: the browser has them
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
    """The figure as an <svg> of class `kind`; what has a gid "title:..." shows the rest of it, to the keyboard as well."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    unused = r' clip-path="[^"<]*"|<clipPath.*?</clipPath>| transform="rotate\(-0 [^"<]*"|\s*\n\s*'
    svg = re.sub(unused, "", out.getvalue()[out.getvalue().index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (d|x|y)="[^"<]+"', lambda numbers: re.sub(r"(\.\d)\d+", r"\1", numbers[0]), svg)
    for name, colour in PALETTE.items():
        svg = svg.replace(f": {colour}", f": var(--{name}, {colour})")
    svg = re.sub('<g id="title:([^"]*)">', r'<g tabindex="0" role="img" aria-label="\1"><title>\1</title>', svg)
    svg = re.sub('<g id="[^"]*">', "<g>", svg)
    return svg.replace("<svg ", f'<svg class="{kind}" role="group" aria-label="{escape(label)}" ', 1)


def lines_svg(series: Mapping[str, Line], x_name: str, y_name: str, kind: str = "curves", width: int = 640) -> str:
    """A drawing of named lines, each at least one point (x, y); a legend below; '' when there is nothing to draw."""
    if sum(map(len, series.values())) < 2:
        return ""
    columns = 2 if width > 500 else 1
    with drawing(width, 320 + 20 * -(-len(series) // columns), x_name, y_name) as (figure, axes):
        for name, line in series.items():
            axes.plot(*zip(*line, strict=True), marker="o" if len(line) < 20 else "", markersize=4, linewidth=2, gid=f"title:{name}")
        figure.legend(axes.lines, list(series), loc="outside lower left", ncols=columns)
        return to_svg(figure, kind, f"{y_name} over {x_name}: {', '.join(series)}")
