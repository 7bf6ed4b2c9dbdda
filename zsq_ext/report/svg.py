"""Line charts as inline SVG, coloured by the page's style sheet so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
"""Line colours that the style sheet defines: classes c0 ... c7."""

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 40  # margins around the plot, for the ticks


@dataclass(frozen=True)
class Line:
    """One curve. ``dashed`` tells a variant from the line it belongs to, which has the same ``colour``."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


def chart(lines: Sequence[Line], x_label: str, y_label: str, log: bool = False) -> str:
    """A chart with its legend, as HTML.

    Args:
        lines: the curves; points that are not finite are left out, and on a log scale points <= 0 too.
        x_label, y_label: what the axes say.
        log: logarithmic y axis.

    Returns:
        A ``<figure>``; one that says so if there is nothing to draw.
    """
    shown = [_visible(line, log) for line in lines]
    points = [point for run in shown for point in run]
    if not points:
        return '<figure><p class="note">No values to draw.</p></figure>'
    xs, ys = zip(*points, strict=True)
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, whole=all(float(x).is_integer() for x in xs))
    y_axis = _Axis(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP, log, margin=0.04)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    parts += [_y_tick(y_axis.at(value), value) for value in y_axis.ticks()]
    parts += [_x_tick(x_axis.at(value), value) for value in x_axis.ticks()]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    centre = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text transform="translate(12 {centre:g}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for line, run in zip(lines, shown, strict=True):
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in run)
        if len(run) == 1:
            x, _, y = path.partition(",")
            parts.append(f'<circle class="dot c{line.colour % COLOURS}" cx="{x}" cy="{y}" r="3"/>')
        elif run:
            parts.append(f'<polyline class="{_classes(line)}" points="{path}"/>')
    parts.append("</svg>")
    return f"<figure>{_legend(lines, shown) if len(lines) > 1 else ''}{''.join(parts)}</figure>"


def sparkline(y: Sequence[float], low: float, high: float) -> str:
    """A curve the size of a word, without axes, for a table's cell.

    Args:
        y: its values; those that are not finite are left out.
        low, high: what the lower and the upper edge stand for.
    """
    points = [(n, value) for n, value in enumerate(y) if math.isfinite(value)]
    span, last = (high - low) or 1.0, max(len(y) - 1, 1)
    path = " ".join(f"{1 + 98 * n / last:.1f},{15 - 14 * (value - low) / span:.1f}" for n, value in points)
    return f'<svg class="spark" viewBox="0 0 100 16"><polyline class="line c0" points="{path}"/></svg>'


def _visible(line: Line, log: bool) -> list[tuple[float, float]]:
    pairs = zip(line.x, line.y, strict=True)
    return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y) and not (log and y <= 0)]


def _classes(line: Line) -> str:
    return f"line c{line.colour % COLOURS}{' dashed' if line.dashed else ''}"


def _legend(lines: Sequence[Line], shown: Sequence[Sequence[tuple[float, float]]]) -> str:
    items = []
    for line, run in zip(lines, shown, strict=True):
        swatch = f'<svg class="swatch" viewBox="0 0 24 8"><path class="{_classes(line)}" d="M0 4H24"/></svg>'
        items.append(f"<li>{swatch}{escape(line.name)}{'' if run else ' (always 0)'}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _y_tick(at: float, value: float) -> str:
    rule = f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>'
    return f'{rule}<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_short(value)}</text>'


def _x_tick(at: float, value: float) -> str:
    bottom = _HEIGHT - _BOTTOM
    rule = f'<path class="tick" d="M{at:.1f} {bottom}V{bottom + 4}"/>'
    return f'{rule}<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{_short(value)}</text>'


def _short(value: float) -> str:
    """A tick's label: 0.001, 250, 1e-05."""
    return f"{value:.6g}"


class _Axis:
    """Values to positions, linear or logarithmic, with ticks at round values.

    Args:
        low, high: the extreme values.
        start, stop: their positions, apart from the margin.
        log: logarithmic.
        margin: room beyond the extremes, as a share of the axis.
        whole: ticks at integers only.
    """

    def __init__(
        self,
        low: float,
        high: float,
        start: float,
        stop: float,
        log: bool = False,
        margin: float = 0.0,
        whole: bool = False,
    ) -> None:
        self.log, self._whole = log, whole
        low, high = (math.log10(low), math.log10(high)) if log else (low, high)
        if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):  # one value: it stands in the middle
            half = 0.5 if log else max(abs(low) / 2, 0.5)
            low, high = low - half, high + half
        room = margin * (high - low)
        self._low, self._high, self._start, self._stop = low - room, high + room, start, stop

    def at(self, value: float) -> float:
        share = ((math.log10(value) if self.log else value) - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        if not self.log:
            return _round_values(self._low, self._high, least=1.0 if self._whole else 0.0)
        decades = range(math.ceil(self._low), math.floor(self._high) + 1)
        if len(decades) >= 2:
            return [10.0**n for n in decades[:: -(-len(decades) // 7)]]
        # within a decade or two: 1, 2 and 5, and where even these are too far apart, evenly
        candidates = [m * 10.0**n for n in range(math.floor(self._low), math.ceil(self._high) + 1) for m in (1, 2, 5)]
        inside = [value for value in candidates if self._low <= math.log10(value) <= self._high]
        return inside if len(inside) >= 2 else _round_values(10**self._low, 10**self._high)


def _round_values(low: float, high: float, least: float = 0.0) -> list[float]:
    """About five round values in [low, high], at least ``least`` apart."""
    rough = max((high - low) / 5, least)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]
