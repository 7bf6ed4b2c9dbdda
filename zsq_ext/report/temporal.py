"""The section of a report that says whether a generator still moved: what ``synth.drift`` saw, over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zsq_ext.report import html
from zsq_ext.report.html import Html
from zsq_ext.report.result import Result
from zsq_ext.report.svg import Line, chart

HISTORY = "temporal"
"""The history that holds a row per look at the generator."""

_CHARTS = {
    "drift": ("feature drift", True),
    "spread": ("spread within a class", False),
    "gradient_norm": ("gradient norm of the generator", True),
    "median_discrepancy": ("median discrepancy", False),
}
"""What the axis says, and whether it is logarithmic."""


def curves(results: Mapping[str, Result]) -> dict[str, list[dict]]:
    """The rows of every run whose generator was looked at, by its name."""
    return {name: result.histories[HISTORY] for name, result in results.items() if result.histories.get(HISTORY)}


def temporal(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Html:
    """A chart per figure, a curve per run, so that a base stands beside what was added to it."""
    words = (
        "The generator's images of the same noise, as the teacher's classifier reads them, from look to look. Drift is "
        "the mean of 1 - cosine between a look and the one before, spread what differs within a class, relative to the "
        "size of all; the gradient's norm and the discrepancy of teacher and student are means over the steps between. "
        "A generator stands still where drift and gradient fall to nothing while the student's loss stays where it is; "
        "a falling learning rate alone has that effect."
    )
    parts = [html.note(words)]
    for name, (label, log) in _CHARTS.items():
        seen = {run: [row for row in rows if name in row] for run, rows in runs.items()}
        lines = [
            Line(run, [row["step"] for row in rows], [row[name] for row in rows], colour)
            for colour, (run, rows) in enumerate(seen.items())
            if rows
        ]
        if lines:
            parts.append(Html(f"<h3>{html.text(label.capitalize())}</h3>{chart(lines, 'step', label, log)}"))
    return Html("".join(parts))
