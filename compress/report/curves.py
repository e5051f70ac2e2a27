"""Lines over steps, tokens or seconds, as SVG without scripts: what training did, or what several trainings did side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from compress.report.picture import Frame, ticks

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
Line = Sequence[tuple[float, float]]


def lines_svg(series: Mapping[str, Line], x_name: str, y_name: str, width: int = 640, height: int = 320) -> str:
    """A drawing of named lines, each at least one point (x, y); a legend below; '' when there is nothing to draw."""
    points = [point for line in series.values() for point in line]
    if len(points) < 2:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    spread = (max(ys) - min(ys)) or 1.0
    legend_rows = -(-len(series) // 2)
    frame = Frame(
        width, height + 20 * legend_rows, 62, (min(xs), max(xs) or 1.0), (min(ys) - 0.08 * spread, max(ys) + 0.08 * spread),
        bottom=46 + 20 * legend_rows,
    )  # fmt: skip
    body = [_axes(frame, x_name, y_name)]
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in line)
        dots = "".join(f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>' for x, y in line) if len(line) < 20 else ""
        body.append(f'<g fill="{colour}"><title>{escape(name)}</title><path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}</g>')
        x, y = 62 + (number % 2) * (width - 80) / 2, height + 4 + 20 * (number // 2)
        body.append(f'<rect x="{x:.0f}" y="{y - 9}" width="12" height="10" fill="{colour}"/>')
        body.append(f'<text class="tick" x="{x + 18:.0f}" y="{y}">{escape(name)}</text>')
    label = escape(f"{y_name} over {x_name}: {', '.join(series)}")
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#64748b"'
    size = f'viewBox="0 0 {width} {height + 20 * legend_rows}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="curves" {size} {style} role="img" aria-label="{label}">{"".join(body)}</svg>'


def _axes(f: Frame, x_name: str, y_name: str) -> str:
    foot, end = f.height - f.bottom, f.width - f.right
    out = [f'<path d="M{f.left} {foot}H{end}" stroke="#94a3b8" fill="none"/>']
    for tick in ticks(*f.y_range, 5):
        out.append(f'<path d="M{f.left} {f.y(tick):.1f}H{end}" stroke="#94a3b8" stroke-opacity=".3" fill="none"/>')
        out.append(f'<text class="tick" x="{f.left - 8}" y="{f.y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    out += [f'<text class="tick" x="{f.x(t):.1f}" y="{foot + 18}" text-anchor="middle">{t:g}</text>' for t in ticks(*f.x_range, 6)]
    out.append(f'<text class="name" x="{end}" y="{foot + 34}" text-anchor="end">{escape(x_name)}</text>')
    out.append(f'<text class="name" x="{f.left - 2}" y="{f.top - 5}">{escape(y_name)}</text>')
    return "".join(out)
