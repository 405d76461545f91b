"""The charts of the report: inline SVG from numbers, and their style sheet.

Pure functions of values; everything they return is a piece of HTML with its text escaped. Colours
are CSS variables, so that a chart follows the reader's light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cluster.redaction import escaped

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 34
MAX_POINTS = 120  # more are averaged: a pixel shows no more, and the page stays small
SMOOTH_FROM = 40  # points; a shorter curve is shown as it is
COLORS = 6

Point = tuple[float, ...]  # x, y, and optionally the half-width of a band, e.g. a deviation


class Series(NamedTuple):
    label: str
    points: Sequence[Point]  # by increasing x


class Frame(NamedTuple):
    """The plotted ranges, and their mapping onto the picture."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        share = (value - self.x0) / (self.x1 - self.x0)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def number(value: float) -> str:
    """Short, for ticks, tiles and tooltips: 0.531, 12.3k, 4.1e-06."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if size and size < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 1000 or float(value).is_integer() else f"{value:.3g}"


def ticks(low: float, high: float, count: int, least: float = 0) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten, and `least`, apart) within [low, high],
    about `count` of them."""
    raw = max((high - low) / count, least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points, each the mean of a run of neighbours."""
    run = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    return [
        tuple(math.fsum(axis) / len(group) for axis in zip(*group, strict=True)) for group in groups
    ]


def smooth(points: Sequence[Point], reach: int = 4) -> list[Point]:
    """The mean of each point and its neighbours, as many on each side: a trend is not delayed."""
    smoothed: list[Point] = []
    for i, (x, *_) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)
        near = [y for _, y, *_ in points[i - side : i + side + 1]]
        smoothed.append((x, math.fsum(near) / len(near)))
    return smoothed


def line_chart(title: str, note: str, series: Sequence[Series], x_label: str = "step") -> str:
    """A figure with one curve a series, axes, ticks and a tooltip at every point."""
    drawn = [Series(one.label, thin(one.points)) for one in series]
    frame = _frame(drawn)
    parts = [_axes(frame, x_label)]
    parts += [_band(one, frame, color) for color, one in enumerate(drawn)]
    parts += [_curve(one, frame, color) for color, one in enumerate(drawn)]
    parts.append(_hover(drawn, frame))
    last = " / ".join(number(one.points[-1][1]) for one in series)
    return _figure(title, note, last, _legend([one.label for one in series]), "".join(parts))


def _frame(series: Sequence[Series]) -> Frame:
    points = [point for one in series for point in one.points]
    left, right = min(x for x, *_ in points), max(x for x, *_ in points)
    low = min(y - sum(half) for _, y, *half in points)
    high = max(y + sum(half) for _, y, *half in points)
    if 0 <= low < 0.4 * high:
        low = 0.0  # a quantity that comes near zero is read against zero
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    bottom = low if low == 0 else low - margin
    return Frame(left, right if right > left else left + 1, bottom, high + margin)


def _axes(frame: Frame, x_label: str) -> str:
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    rows = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{frame.y(t)}" y2="{frame.y(t)}"/>'
        f'<text class="tick end" x="{left - 6}" y="{frame.y(t) + 3.5:.1f}">{number(t)}</text>'
        for t in ticks(frame.y0, frame.y1, 6)
    ]
    columns = [
        f'<line class="axis" x1="{frame.x(t)}" x2="{frame.x(t)}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text class="tick mid" x="{frame.x(t)}" y="{bottom + 16}">{number(t)}</text>'
        for t in ticks(frame.x0, frame.x1, 8, least=1)
    ]
    axis = f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    middle = (left + right) / 2
    name = f'<text class="tick mid" x="{middle}" y="{HEIGHT - 3}">{escaped(x_label)}</text>'
    return "".join([*rows, *columns, axis, name])


def _curve(one: Series, frame: Frame, color: int) -> str:
    if len(one.points) < SMOOTH_FROM:
        return _path(one.points, frame, f"curve c{color % COLORS}") + "".join(
            f'<circle class="dot c{color % COLORS}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="1.8"/>'
            for x, y, *_ in one.points
        )
    raw = _path(one.points, frame, f"curve raw c{color % COLORS}")
    return raw + _path(smooth(one.points), frame, f"curve c{color % COLORS}")


def _path(points: Sequence[Point], frame: Frame, style: str) -> str:
    corners = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y, *_ in points)
    return f'<polyline class="{style}" points="{corners}"/>'


def _band(one: Series, frame: Frame, color: int) -> str:
    wide = [point for point in one.points if len(point) == 3]
    corners = [(x, y + half) for x, y, half in wide]
    corners += [(x, y - half) for x, y, half in reversed(wide)]
    text = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in corners)
    return f'<polygon class="band c{color % COLORS}" points="{text}"/>'


def _hover(series: Sequence[Series], frame: Frame) -> str:
    """An invisible strip a position, so that the pointer need not hit a point exactly."""
    at: dict[float, list[tuple[str, float]]] = {}
    for one in series:
        for x, y, *_ in one.points:
            at.setdefault(x, []).append((one.label, y))
    places = sorted(at)
    half = (WIDTH - LEFT - RIGHT) / max(1, len(places)) / 2
    strips = []
    for x in places:
        text = "\n".join([f"step {number(x)}", *(f"{label}: {number(y)}" for label, y in at[x])])
        marks = "".join(f'<circle cx="{frame.x(x)}" cy="{frame.y(y)}" r="3"/>' for _, y in at[x])
        strips.append(
            f'<g class="at"><rect x="{frame.x(x) - half:.1f}" y="{TOP}" width="{2 * half:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"/>{marks}<title>{escaped(text)}</title></g>'
        )
    return "".join(strips)


def histogram(title: str, note: str, groups: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Shares of the values of each group in common bins, with the mean of each as a line."""
    low = min(min(values) for _, values in groups)
    high = max(max(values) for _, values in groups)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    bins = 24
    shares = [(label, _shares(values, low, high, bins)) for label, values in groups]
    frame = Frame(low, high, 0, 1.08 * max(max(share) for _, share in shares))
    parts = [_axes(frame, "judge score")]
    for color, (label, share) in enumerate(shares):
        parts += _bars(label, share, frame, color, (color, len(groups)))
    for color, (_, values) in enumerate(groups):
        x = frame.x(math.fsum(values) / len(values))
        parts.append(
            f'<line class="mean c{color}" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
    means = " → ".join(number(math.fsum(values) / len(values)) for _, values in groups)
    return _figure(title, note, means, _legend([label for label, _ in groups]), "".join(parts))


def _shares(values: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    return [count / len(values) for count in counts]


def _bars(
    label: str, shares: Sequence[float], frame: Frame, color: int, side: tuple[int, int]
) -> list[str]:
    place, places = side
    width = (WIDTH - LEFT - RIGHT) / len(shares)
    bars = []
    for i, share in enumerate(shares):
        start = frame.x0 + i * (frame.x1 - frame.x0) / len(shares)
        end = frame.x0 + (i + 1) * (frame.x1 - frame.x0) / len(shares)
        x = LEFT + width * (i + 0.08 + 0.84 * place / places)
        text = f"{label}: {share:.1%} between {number(start)} and {number(end)}"
        bars.append(
            f'<rect class="bar c{color}" x="{x:.1f}" y="{frame.y(share)}" '
            f'width="{0.84 * width / places:.1f}" '
            f'height="{HEIGHT - BOTTOM - frame.y(share):.1f}"><title>{text}</title></rect>'
        )
    return bars


def stacked_bar(parts: Sequence[tuple[str, float]], colors: Mapping[str, int]) -> str:
    """One bar of the parts of a whole, in seconds, with a legend."""
    total = math.fsum(seconds for _, seconds in parts)
    pieces, legend = [], []
    for label, seconds in parts:
        color = colors[label]
        share = seconds / total
        text = f"{escaped(label)}: {number(seconds)} s ({share:.0%})"
        pieces.append(
            f'<span class="c{color % COLORS}" style="flex-grow:{share:.4f}" title="{text}"></span>'
        )
        legend.append(
            f'<li><i class="c{color % COLORS}"></i>{escaped(label)}'
            f"<b>{number(seconds)} s</b><small>{share:.0%}</small></li>"
        )
    return f'<div class="stack">{"".join(pieces)}</div><ul class="parts">{"".join(legend)}</ul>'


def _legend(labels: Sequence[str]) -> str:
    if len(labels) < 2:
        return ""
    items = (
        f'<span><i class="c{i % COLORS}"></i>{escaped(x)}</span>' for i, x in enumerate(labels)
    )
    return f'<div class="legend">{"".join(items)}</div>'


def _figure(title: str, note: str, last: str, legend: str, drawing: str) -> str:
    return (
        f'<figure class="card"><figcaption><h3>{escaped(title)}<b>{escaped(last)}</b></h3>'
        f'<p title="{escaped(note)}">{escaped(note)}</p></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title)}">'
        f"{drawing}</svg>{legend}</figure>"
    )


STYLE = """
figure{margin:0;padding:14px 14px 10px}
figcaption h3{display:flex;justify-content:space-between;gap:12px;font-size:15px;margin:0}
figcaption h3 b{font-variant-numeric:tabular-nums}
figcaption p{margin:0 0 6px;font-size:12.5px;color:var(--muted);white-space:nowrap;overflow:hidden;
text-overflow:ellipsis}
svg{display:block;width:100%;height:auto}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}
.c5{--c:var(--c5)}
.grid{stroke:var(--rule)}.axis{stroke:var(--muted)}
.tick{font-size:11px;fill:var(--muted)}.end{text-anchor:end}.mid{text-anchor:middle}
.curve{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.raw{stroke-width:1;opacity:.35}
.dot{fill:var(--c)}.band{fill:var(--c);opacity:.14}.bar{fill:var(--c)}.bar:hover{opacity:.7}
.mean{stroke:var(--c);stroke-width:1.5;stroke-dasharray:4 3}
.at rect{fill:transparent}.at circle{fill:var(--ink);opacity:0}
.at:hover circle{opacity:1}.at:hover rect{fill:var(--muted);opacity:.12}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;padding:2px 0 0 12px;font-size:12px;
color:var(--muted)}
i{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);margin-right:6px}
.stack{display:flex;height:30px;border-radius:8px;overflow:hidden;gap:2px}
.stack span{background:var(--c);min-width:2px;flex-basis:0}
.parts{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;padding:0;margin:10px 0 0;
font-size:14px}
.parts b{margin:0 6px}.parts small{color:var(--muted)}
"""
