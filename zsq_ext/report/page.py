"""The report of a run: what was lost, what the images look like, how it was made. One file that loads nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, fx

from zsq_ext.core import machine
from zsq_ext.core.run import write_atomically
from zsq_ext.core.spec import InputSpec
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import activation_quantizers
from zsq_ext.quant.quality import Quality
from zsq_ext.report import html, pictures, png
from zsq_ext.report.blocks import HISTORY, blocks
from zsq_ext.report.html import Html
from zsq_ext.report.likeness import likeness
from zsq_ext.report.svg import COLOURS, Line, chart, sparkline
from zsq_ext.synth.distance import ImageFigures
from zsq_ext.synth.filters import LowPass

FILE = "report.html"
SHOWN = 80
"""Images in the grid."""
ANALYSED = 512
"""Images whose spectra are averaged."""

DIVERGED = "diverged"
"""What a table says in place of an accuracy."""

_STAGES = {"images": "Making the images", "ranges": "Training the range generator", "tuning": "Tuning"}
_VARIANT = "_perturbed"
_CALIBRATION = "calibration"


class Result(Protocol):
    """What the report reads off a finished run: the attributes of ``zsq_ext.Result``, which lives a floor above."""

    @property
    def model(self) -> fx.GraphModule: ...
    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def quality(self) -> Quality: ...
    @property
    def figures(self) -> ImageFigures: ...
    @property
    def spec(self) -> InputSpec: ...
    @property
    def qconfig(self) -> QConfig: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def histories(self) -> Mapping[str, list[dict]]: ...
    @property
    def evaluations(self) -> list[dict]: ...
    @property
    def seconds(self) -> float: ...
    @property
    def teacher_top1(self) -> float | None: ...


@dataclass(frozen=True)
class Accuracy:
    """One row of the accuracy table.

    Args:
        method: what was measured, such as ``"teacher"`` or ``"SynQ"``.
        bits: such as ``"W4A4"``, or ``"float"``.
        last: top-1 in percent after the last epoch (or the only one there is); None where tuning diverged.
        best: top-1 of the best epoch; the test data chose it. None where only one epoch was measured.
        seconds: wall time it took to make, if known.
    """

    method: str
    bits: str
    last: float | None
    best: float | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """Such as ``"SynQ W4A4"``."""
        return f"{self.method} {self.bits}"

    @property
    def shown(self) -> str:
        """The last epoch's accuracy as a table says it."""
        return DIVERGED if self.last is None else f"{self.last:.2f}"


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
    rows = [] if result.teacher_top1 is None else [Accuracy("teacher", "float", result.teacher_top1)]
    if result.evaluations:
        top1 = [row["top1"] for row in result.evaluations]
        best = max(top1) if len(top1) > 1 else None
        rows.append(Accuracy(method, result.qconfig.label, top1[-1], best, result.seconds))
    return write_report(folder, title=name, results={name: result}, accuracy=rows, measured_on=measured_on, notes=notes)


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
    sections: list[tuple[str, str, Html]] = []

    def add(anchor: str, heading: str, *body: str) -> None:
        sections.append((anchor, heading, html.section(anchor, heading, *body)))

    if accuracy:
        add("accuracy", "Accuracy", _accuracy(accuracy, measured_on), _epochs(results))
    add("quality", "Quality without labels", _quality(results))
    for index, (names, result) in enumerate(_distinct_images(results)):
        own = f"-{index}" if index else ""
        of = f": {', '.join(names)}" if len(results) > 1 else ""
        add(f"images{own}", f"Synthetic images{of}", _images(result))
        add(f"spectra{own}", f"Spectra of the images{of}", _spectra(result))
        if result.figures != ImageFigures():
            add(f"likeness{own}", f"The images as the teacher sees them{of}", likeness(result.figures))
    for index, (name, result) in enumerate(results.items()):
        own = f"-{index}" if index else ""
        of = f": {name}" if len(results) > 1 else ""
        add(f"losses{own}", f"Losses{of}", _losses(result))
        if result.histories.get(HISTORY):
            add(f"blocks{own}", f"Reconstruction{of}", blocks(result.histories[HISTORY]))
        add(f"layers{own}", f"Sensitivity of the layers{of}", _layers(result))
        add(f"ranges{own}", f"Activation ranges{of}", _ranges(result))
    for index, (name, result) in enumerate(results.items()):
        own = f"-{index}" if index else ""
        add(f"configuration{own}", f"Configuration: {name}", _configuration(result, notes or {}))
    first = next(iter(results.values()))
    device = next(first.model.parameters()).device
    add("environment", "Environment", html.pairs(machine.describe(device).items()))

    contents = "".join(f'<a href="#{anchor}">{html.text(heading)}</a>' for anchor, heading, _ in sections)
    subtitle = f"zsq_ext, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    body = [_figures(accuracy, results), f"<nav>{contents}</nav>", *(section for _, _, section in sections)]
    target = Path(folder) / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, html.page(title, subtitle, *body).encode())
    return target


def _figures(accuracy: Sequence[Accuracy], results: Mapping[str, Result]) -> Html:
    """The numbers a reader wants before anything else: the teacher, the runs of this page, and the first run's cost."""
    first = next(iter(results.values()))
    figures = [
        (f"{row.last:.2f} %", f"{row.name}, top-1")
        for row in accuracy
        if row.last is not None and (row.bits == "float" or row.name in results)
    ]
    if math.isnan(first.quality.agreement):  # no classifier
        figures.append((f"{min(first.quality.outputs_db.values()):.1f} dB", f"worst output, {first.qconfig.label}"))
    else:
        figures.append((f"{first.quality.agreement:.1f} %", f"agreement, {first.qconfig.label}"))
    figures.append((str(len(first.images)), "synthetic images"))
    figures.append((_duration(first.seconds), f"for {first.qconfig.label}"))
    cells = "".join(f"<div><b>{html.text(value)}</b><span>{html.text(name)}</span></div>" for value, name in figures)
    return Html(f'<div class="figures">{cells}</div>')


def _accuracy(rows: Sequence[Accuracy], measured_on: str) -> Html:
    teacher = next((row.last for row in rows if row.bits == "float"), None)
    several = any(row.best is not None for row in rows)
    header = ["method", "bits", "top-1, last epoch (%)", "last against teacher", "time"]
    words = f"Measured on {measured_on}. " if measured_on else ""
    words += "Test data decided nothing in these runs."
    if several:
        header.insert(3, "top-1, best epoch (%)")
        words += " The best epoch was picked by it: quote the last one."
    cells = []
    for row in rows:
        loss = ""
        if teacher is not None and row.last is not None and row.bits != "float":
            loss = f"{row.last - teacher:+.2f}"
        best = [] if not several else ["" if row.best is None else f"{row.best:.2f}"]
        took = "" if row.seconds is None else _duration(row.seconds)
        cells.append((row.method, row.bits, row.shown, *best, loss, took))
    return Html(html.table(header, cells, numeric=range(2, len(header))) + html.note(words))


def _epochs(results: Mapping[str, Result]) -> Html:
    """Accuracy by epoch, where more than one was measured."""
    lines = [
        Line(name, [row["epoch"] for row in result.evaluations], [row["top1"] for row in result.evaluations], index)
        for index, (name, result) in enumerate(results.items())
        if len(result.evaluations) > 1
    ]
    return Html(chart(lines, "epoch", "top-1 (%)")) if lines else Html("")


def _quality(results: Mapping[str, Result]) -> Html:
    rows = []
    seen = [name for name, result in results.items() if not result.quality.unseen]
    for name, result in results.items():
        quality = result.quality
        figures = _number(quality.agreement, ".2f"), _number(quality.kl, ".4g")
        outputs = ", ".join(f"{path} {_number(db, '.1f')}".strip() for path, db in quality.outputs_db.items())
        rows.append((name, quality.images, *figures, outputs))
    words = (
        "Student against teacher on synthetic images that tuning never saw. Agreement is the share of images on which "
        "both predict the same class; the divergence is the mean of KL(teacher || student). Neither is an accuracy: on "
        "real images the two networks may agree less, or be wrong together. The last column compares the values that "
        "the networks return, signal to quantization noise; it is all there is to say of a network without classes."
    )
    if seen:
        words += f" In {', '.join(seen)} none were held out: the tuned images had to serve, and the figures flatter."
    header = ("run", "images", "agreement (%)", "divergence (nats)", "SQNR of the outputs (dB)")
    return Html(html.table(header, rows, numeric=(1, 2, 3)) + html.note(words))


def _layers(result: Result) -> Html:
    layers = result.quality.layers
    classes = not math.isnan(result.quality.kl)
    # the noise's share of the worst output where there is no divergence
    costs = [layer.kl_alone if classes else 10 ** (-layer.output_db_alone / 20) for layer in layers]
    worst = max(filter(math.isfinite, costs), default=0.0)
    rows = [
        (
            layer.site,
            layer.kind,
            layer.bits,
            _number(layer.sqnr_db, ".1f"),
            _number(layer.kl_alone, ".3g") if classes else _number(layer.output_db_alone, ".1f"),
            html.bar(0, cost / worst if worst > 0 and math.isfinite(cost) else 0),
        )
        for layer, cost in zip(layers, costs, strict=True)
    ]
    words = (
        "Divergence alone: KL(teacher || teacher with only this site quantized), which says what the site costs. "
        if classes
        else "Output alone: signal to quantization noise of the worst output with only this site quantized. "
    )
    words += (
        "SQNR: signal to quantization noise of the site's values in the quantized network, errors of the layers before "
        "included."
    )
    header = ("site", "kind", "bits", "SQNR (dB)", "divergence alone" if classes else "output alone (dB)", "")
    return Html(html.note(words) + html.table(header, rows, numeric=(2, 3, 4)))


def _ranges(result: Result) -> Html:
    quantizers = activation_quantizers(result.model)
    if not quantizers:
        return html.note("Activations are not quantized.")
    ranges = [tuple(bound.item() for bound in quantizer.range()) for quantizer in quantizers]
    low, high = min(0.0, *(lo for lo, _ in ranges)), max(0.0, *(hi for _, hi in ranges))
    span = high - low or 1.0
    curves = _range_curves(result, len(quantizers))
    rows = [
        (
            quantizer.name,
            quantizer.bits,
            f"{lo:.4g}",
            f"{hi:.4g}",
            f"{quantizer.params()[0].item():.4g}",
            html.bar((lo - low) / span, (hi - low) / span),
            *curve,
        )
        for quantizer, (lo, hi), curve in zip(quantizers, ranges, curves, strict=True)
    ]
    words = f"The range each activation is rounded in; the bars share one axis from {low:.4g} to {high:.4g}."
    header = ["site", "bits", "low", "high", "step", ""]
    batches = len(result.histories.get(_CALIBRATION, ()))
    if batches:
        header.append("high, by batch")
        words += f" The curve is the upper bound over the {batches} calibration batches, from 0 to its own maximum."
    return Html(html.note(words) + html.table(header, rows, numeric=(1, 2, 3, 4)))


def _range_curves(result: Result, sites: int) -> list[list[Html]]:
    """Per site the cell with its upper bound over the calibration batches; no cell where nothing was recorded."""
    history = result.histories.get(_CALIBRATION, ())
    if not history:
        return [[] for _ in range(sites)]
    curves = zip(*(row["hi"] for row in history), strict=True)
    return [[Html(sparkline(curve, 0.0, max(curve)))] for curve in curves]


def _losses(result: Result) -> Html:
    parts = []
    for stage, history in result.histories.items():
        if not history or stage in (_CALIBRATION, HISTORY):  # no losses: they have sections of their own
            continue
        batches = len({row.get("batch", 0) for row in history})
        parts_of = "parts" if result.histories.get(HISTORY) and stage == "tuning" else "batches"
        words = f", mean of {batches} {parts_of}" if batches > 1 else ""
        parts.append(f"<h3>{html.text(_STAGES.get(stage, stage) + words)}</h3>")
        parts.append(chart(_terms(history), "step", "weighted loss term", log=True))
    return Html("".join(parts)) if parts else html.note("Nothing was optimised in this run.")


def _terms(history: Sequence[Mapping[str, float]]) -> list[Line]:
    """One line per loss term; image batches, which are optimised one after the other, are averaged step by step."""
    values: dict[str, dict[float, list[float]]] = {}
    for row in history:
        for term, value in row.items():
            if term not in ("step", "batch", "block"):
                values.setdefault(term, {}).setdefault(row["step"], []).append(value)
    colours = {term: n % COLOURS for n, term in enumerate(term for term in values if not term.endswith(_VARIANT))}
    lines = []
    for term, by_step in values.items():
        base = term.removesuffix(_VARIANT)
        means = [sum(found) / len(found) for found in by_step.values()]
        colour = colours.get(base, len(colours))
        lines.append(Line(term.replace("_", " "), list(by_step), means, colour, dashed=term != base))
    return lines


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


def _images(result: Result) -> Html:
    chosen = pictures.some(result.images, result.labels, SHOWN)
    pixels = pictures.to_pixels(result.images[chosen], result.spec)
    columns = 10 if pixels.shape[2] < 64 else 5
    if pixels.shape[2] >= 64:
        pixels = pixels[: SHOWN // 4]  # large images make large pages
    drawn = pictures.grid(pixels, columns)
    scale = 2 if pixels.shape[2] < 64 else 1
    share = pictures.outside(result.images, result.spec)
    clipped = (
        "no range of valid values is known, so each image is stretched between its extremes."
        if share is None
        else f"{share:.1f} % of the values lie outside the valid range and are clipped here."
    )
    order = "the first" if result.labels is None else "in turn one of each class, in label order"
    words = f"{len(pixels)} of {len(result.images)} images, {order}; {clipped}"
    return Html(html.image(png.encode(drawn), drawn.shape[1] * scale, "synthetic images") + html.note(words))


def _spectra(result: Result) -> Html:
    images = result.images[:ANALYSED].detach().float().cpu()
    before = pictures.radial_spectrum(images)
    radii = list(range(1, len(before) + 1))
    lines = [Line("images", radii, before)]
    words = "Mean power by distance from the spectrum's centre, in whole frequency bins, of the normalised images."
    idea = _low_pass(result.config)
    if idea is not None:
        after = pictures.radial_spectrum(LowPass(result.spec.shape[1:], idea["d0"])(images))
        lines.append(Line(f"after the low-pass filter, d0 = {idea['d0']:g}", radii, after, 1))
        words += " At d0 bins the filter leaves exp(-1/2) of the amplitude."
    return Html(chart(lines, "frequency (bins)", "power", log=True) + html.note(words))


def _low_pass(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    ideas = config.get("hyperparameters", {}).get("tune", {}).get("distill", {}).get("ideas", [])
    return next((idea for idea in ideas if idea.get("idea") == "LowPass"), None)


def _configuration(result: Result, notes: Mapping[str, object]) -> Html:
    config = result.config
    names = {name: config[name] for name in ("method", "preset", "profile") if config.get(name) is not None}
    run = {**names, "bits": result.qconfig.label, "seed": config.get("seed"), "model": config.get("model"), **notes}
    tables = {"run": run, "quantizers": result.qconfig.to_dict(), "input": result.spec.to_dict()}
    tables |= _groups(config.get("hyperparameters", {}))
    cells = "".join(
        f"<div><h3>{html.text(_readable(name))}</h3>{html.pairs(_shown(rows))}</div>" for name, rows in tables.items()
    )
    return Html(f'<div class="columns">{cells}</div>')


def _groups(settings: Mapping[str, Any], title: str = "method") -> dict[str, dict[str, Any]]:
    """Nested hyperparameters as one flat table per level; the ideas, a list, become a table of their own."""
    own: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {title: own}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            groups |= _groups(value, name)
        elif name == "ideas":
            groups["ideas"] = {idea["idea"]: _parameters(idea) for idea in value}
        else:
            own[name] = value
    return {name: rows for name, rows in groups.items() if rows}


def _shown(rows: Mapping[str, Any]) -> list[tuple[object, object]]:
    return [(_readable(name), _plain(value)) for name, value in rows.items()]


def _parameters(idea: Mapping[str, Any]) -> str:
    return ", ".join(f"{_readable(name)} {_plain(value)}" for name, value in idea.items() if name != "idea")


def _readable(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: Any) -> str:
    """A configuration's value as people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float, form: str) -> str:
    """A figure, or a word where it is infinite (nothing was lost) or undefined."""
    if math.isnan(value):
        return "undefined"
    return format(value, form) if math.isfinite(value) else "∞"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
