"""The report of a run: what was lost, what the images look like, how it was made. One file that loads nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from zsq_ext.core import machine
from zsq_ext.core.run import write_atomically
from zsq_ext.report import html, sections
from zsq_ext.report.blocks import HISTORY, blocks
from zsq_ext.report.configuration import configuration
from zsq_ext.report.html import Html
from zsq_ext.report.likeness import likeness
from zsq_ext.report.result import Accuracy, Result, duration, summary
from zsq_ext.report.result import title as title_of
from zsq_ext.report.temporal import curves, temporal
from zsq_ext.synth.distance import ImageFigures

FILE = "report.html"


def write(
    result: Result,
    folder: str | os.PathLike[str],
    *,
    measured_on: str = "",
    notes: Mapping[str, object] | None = None,
) -> Path:
    """The report of one run.

    Args:
        result: what ``zsq_ext.quantize`` returned.
        folder: where ``report.html`` goes.
        measured_on: which data the accuracies were measured on, in words.
        notes: rows to add to the configuration.

    Returns:
        The file's path.
    """
    method = str(result.config.get("method", "quantized"))
    name = f"{method} {result.qconfig.label}"
    several = len(result.evaluations) > 1
    rows = []
    for figure, value in result.accuracy.items():
        if figure in result.teacher_accuracy:
            rows.append(Accuracy("teacher", "float", result.teacher_accuracy[figure], figure=figure))
        best = result.best_accuracy.get(figure) if several else None
        rows.append(Accuracy(method, result.qconfig.label, value, best, result.seconds, figure))
    heading = f"{name}, {result.tuning}" if result.tuning else name
    return write_report(
        folder, title=heading, results={name: result}, accuracy=rows, measured_on=measured_on, notes=notes
    )


def write_report(
    folder: str | os.PathLike[str],
    *,
    title: str,
    results: Mapping[str, Result],
    accuracy: Sequence[Accuracy] = (),
    measured_on: str = "",
    notes: Mapping[str, object] | None = None,
) -> Path:
    """The report of one or more runs as one self-contained HTML file.

    Args:
        folder: where ``report.html`` goes; made if missing.
        title: the page's heading.
        results: runs by name, each with its own quality, images, curves, ranges and configuration.
        accuracy: rows of the accuracy table, the teacher and the controls among them; empty without test data.
        measured_on: which data the accuracies were measured on, in words.
        notes: rows to add to the configuration.

    Returns:
        The file's path.

    Raises:
        ValueError: there is no result.
        OSError: the folder cannot be written.
    """
    if not results:
        raise ValueError("report: results must hold at least one run, got none")
    parts: list[tuple[str, str, Html]] = []

    def add(anchor: str, heading: str, *body: str) -> None:
        parts.append((anchor, heading, html.section(anchor, heading, *body)))

    if accuracy:
        add("accuracy", "Accuracy", sections.accuracy(accuracy, measured_on), sections.epochs(results))
    add("quality", "Quality without labels", sections.quality(results))
    for index, (names, result) in enumerate(_distinct_images(results)):
        if len(result.images) == 0:  # nothing was made to tune on
            continue
        own = f"-{index}" if index else ""
        of = f": {', '.join(names)}" if len(results) > 1 else ""
        add(f"images{own}", f"Synthetic images{of}", sections.images(result))
        add(f"spectra{own}", f"Spectra of the images{of}", sections.spectra(result))
        if result.figures != ImageFigures():
            add(f"likeness{own}", f"The images as the teacher sees them{of}", likeness(result.figures))
    if curves(results):
        add("temporal", "The generator over time", temporal(curves(results)))
    for index, (name, result) in enumerate(results.items()):
        own = f"-{index}" if index else ""
        of = f": {name}" if len(results) > 1 else ""
        add(f"losses{own}", f"Losses{of}", sections.losses(result))
        if result.histories.get(HISTORY):
            add(f"blocks{own}", f"Reconstruction{of}", blocks(result.histories[HISTORY]))
        add(f"layers{own}", f"Sensitivity of the layers{of}", sections.layers(result))
        add(f"ranges{own}", f"Activation ranges{of}", sections.ranges(result))
    for index, (name, result) in enumerate(results.items()):
        own = f"-{index}" if index else ""
        add(f"configuration{own}", f"Configuration: {name}", configuration(result, notes or {}))
    first = next(iter(results.values()))
    device = next(first.model.parameters()).device
    add("environment", "Environment", html.pairs(machine.describe(device).items()))

    contents = "".join(f'<a href="#{anchor}">{html.text(heading)}</a>' for anchor, heading, _ in parts)
    made = [f"{name}: {summary(result)}" for name, result in results.items()]
    subtitle = "; ".join([*made, f"zsq_ext, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"])
    body = [_figures(accuracy, results), f"<nav>{contents}</nav>", *(section for _, _, section in parts)]
    target = Path(folder) / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, html.page(title, subtitle, *body).encode())
    return target


def _figures(accuracy: Sequence[Accuracy], results: Mapping[str, Result]) -> Html:
    """The numbers a reader wants before anything else: the teacher, the runs of this page, and the first run's cost."""
    first = next(iter(results.values()))
    figures = [
        (f"{row.last:.2f} %", f"{row.name}, {title_of(row.figure)}")
        for row in accuracy
        if row.last is not None and (row.bits == "float" or row.name in results)
    ]
    if math.isnan(first.quality.agreement):  # no classifier
        figures.append((f"{min(first.quality.outputs_db.values()):.1f} dB", f"worst output, {first.qconfig.label}"))
    else:
        figures.append((f"{first.quality.agreement:.1f} %", f"agreement, {first.qconfig.label}"))
    if len(first.images):
        figures.append((str(len(first.images)), "synthetic images"))
    figures.append((duration(first.seconds), f"for {first.qconfig.label}"))
    cells = "".join(f"<div><b>{html.text(value)}</b><span>{html.text(name)}</span></div>" for value, name in figures)
    return Html(f'<div class="figures">{cells}</div>')


def _distinct_images(results: Mapping[str, Result]) -> list[tuple[list[str], Result]]:
    """Runs grouped by their image set, since several may have been tuned on one."""
    groups: list[tuple[list[str], Result]] = []
    for name, result in results.items():
        for names, other in groups:
            if other.images.shape == result.images.shape and bool((other.images == result.images).all()):
                names.append(name)
                break
        else:
            groups.append(([name], result))
    return groups
