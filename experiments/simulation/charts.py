"""Charts as inline SVG: lines over time and grouped bars, in colours that the page's style sheet sets.

Plain text in, plain text out; no script, nothing fetched. Which charts a report has is `report`'s choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 34
MAX_POINTS = 400
NUM_COLOURS = 6


@dataclass(frozen=True, slots=True)
class Series:
    """One line: x ascending, as many y."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True, slots=True)
class Bars:
    """One group of bars, a value for each series."""

    name: str
    values: Sequence[float]


def line_chart(title: str, y_label: str, series: Sequence[Series], *, x_label: str = "s", steps: bool = False) -> str:
    """Lines from y = 0; `steps` holds a value until the next."""
    top = max((max(s.ys, default=0.0) for s in series), default=0.0)
    end = max((max(s.xs, default=0.0) for s in series), default=0.0)
    y_ticks, x_ticks = ticks(top), ticks(end)
    body = [_grid(y_ticks, "", y_label)]
    for tick in x_ticks[:-1] if x_ticks[-1] > end else x_ticks:
        at = _x(tick, end or 1.0)
        body.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{number(tick)}</text>')
    body.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_label)}</text>')
    for index, s in enumerate(series):
        points = _points(s, end or 1.0, y_ticks[-1], steps)
        colour = f"c{index % NUM_COLOURS}"
        body.append(f'<polyline class="line {colour}" points="{points}"><title>{escape(s.name)}</title></polyline>')
    return _figure(title, [s.name for s in series], body)


def bar_chart(title: str, y_label: str, names: Sequence[str], groups: Sequence[Bars]) -> str:
    """Groups of bars beside each other, in the order of `names`, each with its value written above it."""
    top = max((max(g.values, default=0.0) for g in groups), default=0.0)
    y_ticks = ticks(top)
    body = [_grid(y_ticks, "", y_label)]
    room = (WIDTH - _LEFT - _RIGHT) / max(len(groups), 1)
    wide = min(room * 0.86 / max(len(names), 1), 72.0)
    for g, group in enumerate(groups):
        middle = _LEFT + room * (g + 0.5)
        for index, value in enumerate(group.values):
            left = middle + (index - len(names) / 2) * wide
            y = _y(value, y_ticks[-1])
            body.append(
                f'<rect class="bar c{index % NUM_COLOURS}" x="{left + 1:.1f}" y="{y:.1f}" width="{wide - 2:.1f}" '
                f'height="{HEIGHT - _BOTTOM - y:.1f}"><title>{escape(names[index])}: {number(value)}</title></rect>'
                f'<text class="value" x="{left + wide / 2:.1f}" y="{y - 3:.1f}" text-anchor="middle">'
                f"{number(value)}</text>"
            )
        body.append(
            f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{escape(group.name)}</text>'
        )
    return _figure(title, names, body)


def ticks(top: float) -> list[float]:
    """0 and up to five round steps that reach `top`; the last is at least `top`."""
    if not 0 < top < math.inf:
        return [0.0, 1.0]
    rough = top / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def number(value: float) -> str:
    """Three significant digits, thousands apart, no needless zeros."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return (
        f"{value:.{max(2 - math.floor(math.log10(abs(value))), 0)}f}".rstrip("0").rstrip(".")
        if abs(value) < 100
        else f"{value:.0f}"
    )


def _points(s: Series, end: float, top: float, steps: bool) -> str:
    stride = max(math.ceil(len(s.xs) / MAX_POINTS), 1)
    chosen = list(range(0, len(s.xs), stride))
    if len(s.xs) and chosen[-1] != len(s.xs) - 1:
        chosen.append(len(s.xs) - 1)
    placed = [(_x(s.xs[i], end), _y(s.ys[i], top)) for i in chosen]
    if steps:
        held = [(later[0], now[1]) for now, later in pairwise(placed)]
        placed = [p for pair in zip(placed, [*held, placed[-1]], strict=True) for p in pair] if placed else []
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)


def _grid(y_ticks: Sequence[float], unit: str, y_label: str) -> str:
    parts = []
    for tick in y_ticks:
        y = _y(tick, y_ticks[-1])
        kind = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}{unit}</text>'
        )
    parts.append(f'<text class="tick" x="4" y="{_TOP + 2}">{escape(y_label)}</text>')
    return "".join(parts)


def _x(value: float, end: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * value / end


def _y(value: float, top: float) -> float:
    # A little air above, for the unit and for the values over bars.
    return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP - 16) * value / top


def _figure(title: str, names: Sequence[str], body: Sequence[str]) -> str:
    keys = "".join(
        f'<span class="key"><i class="c{index % NUM_COLOURS}"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{"".join(body)}</svg>'
        "</figure>"
    )
