"""A roofline plot of a result: what each op reaches, under what the machine's memory and arithmetic allow."""

import math
from collections.abc import Iterable
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 760, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 50
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


def draw(result: dict[str, Any], device: str) -> str:
    """An SVG document: operations per byte across, billions of operations per second upwards, both logarithmic.

    The slope is the copy bandwidth of tensors that no cache holds and the level the matrix product's rate, both of the
    same run. A row that fits into a shared cache may stand above the slope; its percentage is of a copy of its size.

    Args:
        result: of ``bench.run``.
        device: "cpu" or "cuda".

    Raises:
        ValueError: the result has no row with bytes and operations on that device, or does not say what the device can.
    """
    rows = [r for r in result["rows"] if r["device"] == device and r["bytes"] > 0 and r["flops"] > 0]
    limits = result["environment"].get("limits", {}).get(device)
    if not rows or limits is None:
        raise ValueError(f"plot: the result must hold rows with bytes and operations on {device}, got {len(rows)}")
    bandwidth, rate = limits["copy_gb_s"], limits["matmul_gflop_s"]
    points = [(r["flops"] / r["bytes"], r["flops"] / r["ms"] / 1e6, r) for r in rows]
    ridge = rate / bandwidth
    x = _Log([ridge, *(p[0] for p in points)], _LEFT, _WIDTH - _RIGHT)
    y = _Log([rate, *(p[1] for p in points)], _HEIGHT - _BOTTOM, _TOP)
    ops = list(dict.fromkeys(r["op"] for r in rows))
    title = f"{result['environment']['gpu']['name'] if device == 'cuda' else result['environment']['cpu']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}: {bandwidth:.0f} GB/s, {rate:.0f} GFLOP/s</text>',
        *(_x_tick(x, v) for v in x.decades()),
        *(_y_tick(y, v) for v in y.decades()),
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">operations per byte</text>',
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">GFLOP/s</text>',
        _roof(x, y, bandwidth, rate, ridge),
    ]
    for intensity, reached, row in points:
        colour = _COLOURS[ops.index(row["op"]) % len(_COLOURS)]
        words = f"{row['op']} {row['case']} {row['backend']} {row['pass']}: {row['pct_of_floor']:.0f} % of the floor"
        parts.append(
            f'<circle cx="{x.at(intensity):.1f}" cy="{y.at(reached):.1f}" r="4" fill="{colour}" fill-opacity="0.7">'
            f"<title>{escape(words)}</title></circle>"
        )
    for n, op in enumerate(ops):
        top = _TOP + 18 * n
        colour = _COLOURS[n % len(_COLOURS)]
        parts.append(f'<circle cx="{_WIDTH - _RIGHT + 16}" cy="{top}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 26}" y="{top + 4}">{escape(op)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Log:
    """A logarithmic axis over whole decades, from one end of the plot to the other."""

    def __init__(self, values: Iterable[float], begin: float, end: float) -> None:
        logs = [math.log10(v) for v in values]
        self.low, self.high = math.floor(min(logs)), math.ceil(max(logs) + 0.05)
        self.begin, self.end = begin, end

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin)

    def decades(self) -> list[float]:
        return [10.0**n for n in range(self.low, self.high + 1)]


def _roof(x: _Log, y: _Log, bandwidth: float, rate: float, ridge: float) -> str:
    # the slope begins where it enters the plot, at the left edge or at the lower one
    first = max(10.0**x.low, 10.0**y.low / bandwidth)
    last = 10.0**x.high
    corners = [(first, first * bandwidth), (min(ridge, last), min(rate, last * bandwidth)), (last, rate)]
    path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in corners)
    return f'<polyline points="{path}" fill="none" stroke="black" stroke-width="1.5"/>'


def _x_tick(axis: _Log, value: float) -> str:
    at = axis.at(value)
    return (
        f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="#ddd"/>'
        f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
    )


def _y_tick(axis: _Log, value: float) -> str:
    at = axis.at(value)
    return (
        f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
    )
