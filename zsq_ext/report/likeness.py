"""How like its data the teacher finds the images: its statistics layer by layer, and how far its logits reach."""

from __future__ import annotations

from collections.abc import Sequence

from zsq_ext.report import html
from zsq_ext.report.html import Html
from zsq_ext.report.svg import Line, chart
from zsq_ext.synth.distance import ImageFigures

BINS = 24


def likeness(figures: ImageFigures) -> Html:
    """Both charts, each where the network has what it shows."""
    parts = []
    if figures.layers:
        places = list(range(1, len(figures.layers) + 1))
        lines = [
            Line("mean", places, [layer.mean for layer in figures.layers]),
            Line("standard deviation", places, [layer.std for layer in figures.layers], 1),
        ]
        parts += [
            html.note(
                "Statistics of what enters each batch norm, of the images against those that the network stored while "
                "it was trained; root mean square over the channels. Means in units of the stored standard deviation, "
                "deviations relative to it: 0 is like the training data, 1 in the second no variation at all."
            ),
            chart(lines, "batch norm", "distance"),
        ]
    if figures.logit_ranges:
        middles, counts = histogram(figures.logit_ranges, BINS)
        parts += [
            html.note("Largest less smallest logit of the teacher on each image."),
            chart([Line("images", middles, counts)], "logit range", "images"),
        ]
    return Html("".join(parts))


def histogram(values: Sequence[float], bins: int) -> tuple[list[float], list[int]]:
    """Middles and counts of equal bins between the extremes of finite values, one bin where all are alike."""
    low, high = min(values), max(values)
    if low == high:
        return [low], [len(values)]
    width = (high - low) / bins
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    return [low + (i + 0.5) * width for i in range(bins)], counts
