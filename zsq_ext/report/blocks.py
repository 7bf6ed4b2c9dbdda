"""What reconstruction did to each part of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zsq_ext.report import html
from zsq_ext.report.html import Html

HISTORY = "blocks"
"""The history that holds a row per part: its name, and its squared error before and after."""


def blocks(rows: Sequence[Mapping[str, Any]]) -> Html:
    """A table of the parts, in order."""
    words = (
        "Squared error of each part's output, summed over channels, mean over images and places: with every weight on "
        "its nearest code, and as it was learned. A part reads what the quantized ones before it yield."
    )
    shown = [(row["block"], f"{row['before']:.4g}", f"{row['after']:.4g}", _ratio(row)) for row in rows]
    return Html(html.note(words) + html.table(("part", "before", "after", "of it"), shown, numeric=(1, 2, 3)))


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{100 * row['after'] / row['before']:.0f} %" if row["before"] > 0 else ""
