"""What quantization gives back: the result, its file, and its accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq_ext.api.arguments import example_for, pair_of, speaking_as
from zsq_ext.core.run import load_tensors, save_tensors
from zsq_ext.core.spec import InputSpec
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.prepare import prepare
from zsq_ext.quant.quality import Quality
from zsq_ext.synth.distance import ImageFigures

FORMAT = "zsq_ext.quantized"
FORMAT_VERSION = 1


@dataclass(frozen=True, repr=False)
class Result:
    """What quantization gives back.

    Attributes:
        model: the fake-quantized network, ready to evaluate or to train on; on the caller's model's device.
        images: the synthetic images (N, C, H, W) behind the tuning, in the network's normalised space, unfiltered.
        labels: their labels (N,); None for a network that is no classifier.
        quality: agreement, divergence and per-layer figures on held-out synthetic images; needs no data.
        spec: what the network expects at its input.
        qconfig: bits and placement.
        config: method, hyperparameters, seed: everything that decided the result.
        histories: loss values by stage, [{"step": n, term: value}]; under ``"calibration"`` the activation ranges by
            batch, [{"step": n, "lo": [...], "hi": [...]}] with one value per site.
        evaluations: [{"epoch": n, "top1": percent}] on the test data of this call, if any; epoch 0 is a network that
            was not tuned at all.
        figures: how far the statistics of up to 512 of the images are from the stored ones, layer by layer, and how
            far the teacher's logits reach on them.
        seconds: wall time, of a resumed run that of all its calls as far as their work was kept.
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
    measure_teacher: Callable[[], float] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def teacher_top1(self) -> float | None:
        """The float network's accuracy on the same test data, in percent, measured when first asked for; else None."""
        return None if self.measure_teacher is None else self.measure_teacher()

    @property
    def top1_last(self) -> float | None:
        """Accuracy after the last epoch, in percent; None without test data."""
        return self.evaluations[-1]["top1"] if self.evaluations else None

    @property
    def top1_best(self) -> float | None:
        """The best epoch's accuracy, in percent. The test data chose that epoch: quote it as such."""
        return max(row["top1"] for row in self.evaluations) if self.evaluations else None

    def __repr__(self) -> str:
        top1 = "" if self.top1_last is None else f", top-1 {self.top1_last:.2f} % after the last epoch"
        if self.spec.num_classes is None:
            quality = f"outputs at least {min(self.quality.outputs_db.values()):.1f} dB above the noise"
        else:
            quality = f"agreement {self.quality.agreement:.1f} % on {self.quality.images} images"
        tuned = f"{len(self.images)} images" if self.histories.get("tuning") else "not tuned"
        return f"Result({self.config['method']} {self.qconfig.label}, {tuned}, {quality}{top1}, {self.seconds:.0f} s)"

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


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy in percent.

    Args:
        model: any image classifier; it is run in eval mode, and has its own modes again afterwards.
        batches: pairs of images (N, C, H, W) in the model's input space and labels (N,).

    Raises:
        TypeError: a batch is not a pair of tensors.
        ValueError: there is no image, a batch does not have one label per image, or the model is no classifier.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"evaluate: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"evaluate: batches must give pairs of tensors (images, labels), got {type(batches).__name__}")
    parameter = next(iter(model.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    right = total = 0
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    try:
        for batch in batches:
            images, labels = pair_of(batch)
            logits = model(images.to(device, memory_format=torch.channels_last))
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"evaluate: model must be a classifier that returns logits (N, K), got {got}")
            right += int((logits.argmax(1) == labels.to(device)).sum())
            total += len(labels)
    finally:
        for layer, training in modes:
            layer.training = training
    if total == 0:
        raise ValueError("evaluate: batches must hold at least one image, got none")
    return 100 * right / total


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
