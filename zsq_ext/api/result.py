"""What quantization gives back: the result, its file, and its accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq_ext.api.arguments import example_for, speaking_as
from zsq_ext.core.run import load_tensors, save_tensors
from zsq_ext.core.spec import InputSpec
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.prepare import prepare
from zsq_ext.quant.quality import Quality
from zsq_ext.report.result import title
from zsq_ext.synth.distance import ImageFigures

FORMAT = "zsq_ext.quantized"
FORMAT_VERSION = 1


@dataclass(frozen=True, repr=False)
class Result:
    """What quantization gives back.

    Attributes:
        model: the fake-quantized network, ready to evaluate or to train on; on the caller's model's device.
        images: the synthetic images (N, C, H, W) behind the tuning, in the network's normalised space, unfiltered; none
            where the weights alone were rewritten (``"dfq"``).
        labels: their labels (N,); None for a network that is no classifier.
        quality: agreement, divergence and per-layer figures on held-out synthetic images; needs no data.
        spec: what the network expects at its input.
        qconfig: bits and placement.
        config: method, hyperparameters, seed: everything that decided the result.
        histories: loss values by stage, [{"step": n, term: value}]; under ``"calibration"`` the activation ranges by
            batch, [{"step": n, "lo": [...], "hi": [...]}] with one value per site.
        evaluations: [{"epoch": n, "top1": percent}], or the figures of the measure that was asked for, on the test data
            of this call, if any; epoch 0 is a network that was not tuned by epochs.
        figures: how far the statistics of up to 512 of the images are from the stored ones, layer by layer, and how
            far the teacher's logits reach on them.
        seconds: wall time, of a resumed run that of all its calls as far as their work was kept.
        tuning: how the images were used, in words.
    """

    model: fx.GraphModule
    images: Tensor
    labels: Tensor | None
    quality: Quality
    spec: InputSpec
    qconfig: QConfig
    config: Mapping[str, Any]
    histories: Mapping[str, list[dict]]
    evaluations: list[dict]
    seconds: float
    figures: ImageFigures = field(default_factory=ImageFigures)
    tuning: str = ""
    measure_teacher: Callable[[], dict[str, float]] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def teacher_accuracy(self) -> dict[str, float]:
        """The float network's figures on the same test data, measured when first asked for; none without test data."""
        return {} if self.measure_teacher is None else self.measure_teacher()

    @property
    def accuracy(self) -> dict[str, float]:
        """The figures of ``model``, in percent by name, such as ``{"top1": 93.5}``; none without test data."""
        last = self.evaluations[-1] if self.evaluations else {}
        return {name: value for name, value in last.items() if name != "epoch"}

    @property
    def best_accuracy(self) -> dict[str, float]:
        """Each figure of its best epoch, none where there were no epochs. The test data chose it: quote it as such."""
        if not any(row["epoch"] > 0 for row in self.evaluations):
            return {}
        return {name: max(row[name] for row in self.evaluations) for name in self.accuracy}

    @property
    def teacher_top1(self) -> float | None:
        """The float network's top-1 in percent; None if that was not measured."""
        return self.teacher_accuracy.get("top1")

    @property
    def top1_last(self) -> float | None:
        """The top-1 of ``model``, after the last epoch where there were any, in percent; None if not measured."""
        return self.accuracy.get("top1")

    @property
    def top1_best(self) -> float | None:
        """The best epoch's top-1, in percent. The test data chose that epoch: quote it as such."""
        return self.best_accuracy.get("top1")

    def __repr__(self) -> str:
        measured = "".join(f", {title(name)} {value:.2f} %" for name, value in self.accuracy.items())
        if self.spec.num_classes is None:
            quality = f"outputs at least {min(self.quality.outputs_db.values()):.1f} dB above the noise"
        else:
            quality = f"agreement {self.quality.agreement:.1f} % on {self.quality.images} images"
        tuned = ", ".join(filter(None, [self.tuning, f"{len(self.images)} images" if len(self.images) else ""]))
        name = f"{self.config['method']} {self.qconfig.label}"
        return f"Result({name}, {tuned}, {quality}{measured}, {self.seconds:.0f} s)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: float latent weights, activation ranges, configuration (format version 1)."""
        info = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "qconfig": self.qconfig.to_dict(),
            "spec": self.spec.to_dict(),
            "config": dict(self.config),
        }
        target = Path(path)
        try:
            save_tensors(target, self.model.state_dict(), info)
        except OSError as error:
            raise ValueError(f"save: path must be in a folder that can be written, got {target}: {error}") from error


def _what(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> str:
    """What a file that is no quantized model is, as far as it says."""
    return "images that synthesize made" if "held_out" in tensors else f"format {info.get('format')!r}"


def load(path: str | os.PathLike[str], model: nn.Module) -> fx.GraphModule:
    """Rebuilds a saved quantized network on the architecture it came from.

    Args:
        path: what ``Result.save`` wrote.
        model: a network of the same architecture; its weights do not matter and it is not touched.

    Returns:
        The fake-quantized network, equal bit for bit to the one that was saved.

    Raises:
        ValueError: the file is missing, truncated, foreign, of a newer format, or of another architecture.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load: model must be a torch.nn.Module, got {type(model).__name__}")
    tensors, info = load_tensors(path)
    if info.get("format") != FORMAT:
        raise ValueError(f"load: {path} must be a quantized model of zsq_ext, got {_what(tensors, info)}")
    if info.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"load: {path} must have format version {FORMAT_VERSION}, got {info.get('format_version')!r}")
    try:
        spec, qconfig = InputSpec.from_dict(info["spec"]), QConfig.from_dict(info["qconfig"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"load: {path} must have a complete header, but: {error}") from error
    with speaking_as("load"):
        student = prepare(capture(model, example_for(model, spec.shape)), qconfig)
    own = student.state_dict()
    for name in sorted({*own, *tensors}):
        there, here = (
            "missing" if t is None else f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
            for t in (tensors.get(name), own.get(name))
        )
        if there != here:
            raise ValueError(f"load: model must be the saved architecture; '{name}' is {there} there, {here} here")
    student.load_state_dict(tensors)
    return student.to(memory_format=torch.channels_last).eval()
