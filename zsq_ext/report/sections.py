"""The sections of a report: what was lost, by how much at which layer, and what the images look like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zsq_ext.quant.modules import activation_quantizers
from zsq_ext.report import html, pictures, png, temporal
from zsq_ext.report.blocks import HISTORY
from zsq_ext.report.html import Html
from zsq_ext.report.result import Accuracy, Result, duration, number, title
from zsq_ext.report.svg import COLOURS, Line, chart, sparkline
from zsq_ext.synth.filters import LowPass

SHOWN = 80
"""Images in the grid."""
ANALYSED = 512
"""Images whose spectra are averaged."""

_STAGES = {"images": "Making the images", "ranges": "Training the range generator", "tuning": "Tuning"}
_VARIANT = "_perturbed"
_CALIBRATION = "calibration"
_NO_LOSSES = (_CALIBRATION, HISTORY, temporal.HISTORY)  # they have sections of their own


def accuracy(rows: Sequence[Accuracy], measured_on: str) -> Html:
    """A table per measured figure."""
    words = f"Measured on {measured_on}. " if measured_on else ""
    words += "Test data decided nothing in these runs."
    if any(row.best is not None for row in rows):
        words += " The best epoch was picked by it: quote the last one."
    figures = dict.fromkeys(row.figure for row in rows)
    tables = [_accuracies(title(figure), [row for row in rows if row.figure == figure]) for figure in figures]
    return Html("".join(tables) + html.note(words))


def _accuracies(figure: str, rows: Sequence[Accuracy]) -> Html:
    teacher = next((row.last for row in rows if row.bits == "float"), None)
    several = any(row.best is not None for row in rows)
    header = ["method", "bits", f"{figure} (%)", "against teacher", "time"]
    if several:
        header[2:4] = [f"{figure}, last epoch (%)", f"{figure}, best epoch (%)", "last against teacher"]
    cells = []
    for row in rows:
        loss = ""
        if teacher is not None and row.last is not None and row.bits != "float":
            loss = f"{row.last - teacher:+.2f}"
        best = [] if not several else ["" if row.best is None else f"{row.best:.2f}"]
        took = "" if row.seconds is None else duration(row.seconds)
        cells.append((row.method, row.bits, row.shown, *best, loss, took))
    return html.table(header, cells, numeric=range(2, len(header)))


def epochs(results: Mapping[str, Result]) -> Html:
    """The figures by epoch, where more than one epoch was measured."""
    lines: dict[str, list[Line]] = {}
    for index, (name, result) in enumerate(results.items()):
        rows = result.evaluations
        for figure in result.accuracy if len(rows) > 1 else ():
            own = Line(name, [row["epoch"] for row in rows], [row[figure] for row in rows], index)
            lines.setdefault(figure, []).append(own)
    return Html("".join(chart(own, "epoch", f"{title(figure)} (%)") for figure, own in lines.items()))


def quality(results: Mapping[str, Result]) -> Html:
    rows = []
    seen = [name for name, result in results.items() if not result.quality.unseen]
    for name, result in results.items():
        quality = result.quality
        figures = number(quality.agreement, ".2f"), number(quality.kl, ".4g")
        outputs = ", ".join(f"{path} {number(db, '.1f')}".strip() for path, db in quality.outputs_db.items())
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


def layers(result: Result) -> Html:
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
            number(layer.sqnr_db, ".1f"),
            number(layer.kl_alone, ".3g") if classes else number(layer.output_db_alone, ".1f"),
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
    if result.quality.rewritten:
        words += " Weights were rewritten before they were rounded: both compare with the float network as rewritten."
    header = ("site", "kind", "bits", "SQNR (dB)", "divergence alone" if classes else "output alone (dB)", "")
    return Html(html.note(words) + html.table(header, rows, numeric=(2, 3, 4)))


def ranges(result: Result) -> Html:
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


def losses(result: Result) -> Html:
    parts = []
    for stage, history in result.histories.items():
        if not history or stage in _NO_LOSSES:
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


def images(result: Result) -> Html:
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


def spectra(result: Result) -> Html:
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
