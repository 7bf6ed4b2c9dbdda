"""What a report reads, and how it writes figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx

from zsq_ext.core.spec import InputSpec
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.quality import Quality
from zsq_ext.synth.distance import ImageFigures

_TITLES = {"top1": "top-1", "AP50": "AP@0.5", "AP": "AP@[.5:.95]"}

DIVERGED = "diverged"
"""What a table says in place of an accuracy."""


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
    def tuning(self) -> str: ...
    @property
    def accuracy(self) -> Mapping[str, float]: ...
    @property
    def best_accuracy(self) -> Mapping[str, float]: ...
    @property
    def teacher_accuracy(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Accuracy:
    """One row of the accuracy table.

    Args:
        method: what was measured, such as ``"teacher"`` or ``"SynQ"``.
        bits: such as ``"W4A4"``, or ``"float"``.
        last: the figure in percent, after the last epoch where there are several; None where tuning diverged.
        best: that of the best epoch; the test data chose it. None where there are not several.
        seconds: wall time it took to make, if known.
        figure: what was measured: ``"top1"``, or a detector's ``"AP50"`` or ``"AP"``.
    """

    method: str
    bits: str
    last: float | None
    best: float | None = None
    seconds: float | None = None
    figure: str = "top1"

    @property
    def name(self) -> str:
        """Such as ``"SynQ W4A4"``."""
        return f"{self.method} {self.bits}"

    @property
    def shown(self) -> str:
        """The last epoch's accuracy as a table says it."""
        return DIVERGED if self.last is None else f"{self.last:.2f}"


def title(figure: str) -> str:
    """What a measured figure is called where people read it: ``"top-1"`` for ``"top1"``."""
    return _TITLES.get(figure, figure)


def summary(result: Result) -> str:
    """How a network was quantized, in a line: the tuning, the placement, and what has bits of its own."""
    config = result.qconfig
    parts = [result.tuning, f"placement {config.placement}"]
    if config.edge_bits is not None:
        parts.append(f"first and last layer {config.edge_bits} bits")
    if config.sites:
        parts.append(f"{len(config.sites)} sites with bits of their own")
    return ", ".join(filter(None, parts))


def number(value: float, form: str) -> str:
    """A figure, or a word where it is infinite (nothing was lost) or undefined."""
    if math.isnan(value):
        return "undefined"
    return format(value, form) if math.isfinite(value) else "∞"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
