"""What a caller may hand in: every check is made before any work begins."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq_ext import methods
from zsq_ext.api.measure import Batches, Measure, images_and_truth, pair_of
from zsq_ext.core.progress import Progress
from zsq_ext.core.rng import stream
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.alternating import Distilling
from zsq_ext.methods.job import Images, hold_out, predictions
from zsq_ext.methods.recipe import Recipe
from zsq_ext.ops import backend
from zsq_ext.ops.check import shown
from zsq_ext.quant.capture import capture
from zsq_ext.quant.graph import is_classifier
from zsq_ext.tune.ideas import Idea, merge


@contextmanager
def speaking_as(function: str) -> Iterator[None]:
    """Bad input is reported in the name of the function that was called, whichever floor noticed it."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        said = re.match(r"\w+: (.*)", str(error), re.DOTALL)
        if said is None:
            raise
        kinds = (NotImplementedError, TypeError, ValueError)
        raise next(kind for kind in kinds if isinstance(error, kind))(f"{function}: {said[1]}") from error


_NAME = str, "a name"
# what an argument is, unless it is None; the checks of its value are further down
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("preset", "profile", "tune", "placement", "a_range", "w_range"), _NAME),
    "num_classes": (int, "an integer"),
    "sites": (Mapping, "a mapping of sites to bits"),
    "device": ((str, int, torch.device), "a device"),
    "out": ((str, os.PathLike), "a path"),
    "progress": (Progress, "a Progress"),
}


def check_kinds(resume: object, **given: object) -> None:
    """What would otherwise be a puzzle further down."""
    if not isinstance(resume, bool):
        raise TypeError(f"quantize: resume must be True or False, got {shown(resume)}")
    for name, value in given.items():
        kind, words = _KINDS[name]
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise TypeError(f"quantize: {name} must be {words}, got {shown(value)}")


def settings_of(
    chosen: methods.Method,
    preset: str,
    profile: str | None,
    tune: str | None,
    ideas: tuple[Idea, ...],
    config: Recipe | None,
) -> Recipe:
    """The method's recipe, or the user's, with the tuning and the ideas that were asked for."""
    if preset not in methods.PRESETS:
        raise ValueError(f"quantize: preset must be one of {', '.join(methods.PRESETS)}, got {preset!r}")
    profile = profile or chosen.profiles[0]
    if profile not in chosen.profiles:
        raise ValueError(f"quantize: profile must be one of {', '.join(chosen.profiles)}, got {profile!r}")
    settings = config if config is not None else chosen.config(preset, profile)
    if not isinstance(settings, Recipe):
        raise TypeError(f"quantize: config must be a Recipe, got {type(settings).__name__}")
    if tune is not None:
        settings = replace(settings, tune=methods.tuning(tune, preset, settings.tune))
    if isinstance(ideas, Idea):
        ideas = (ideas,)
    if not isinstance(ideas, (tuple, list)):
        raise TypeError(f"quantize: ideas must be a tuple of ideas such as LowPass(d0=8), got {ideas!r}")
    if ideas:
        own = settings.tune
        if not isinstance(own, Distilling):
            raise ValueError(f"quantize: ideas must come with tune='qat', got {ideas!r} for {own.title}")
        distill = replace(own.distill, ideas=merge(own.distill.ideas, tuple(ideas)))
        settings = replace(settings, tune=replace(own, distill=distill))
    return settings


def replaced(
    chosen: methods.Method, preset: str, profile: str | None, config: Recipe | None, settings: Recipe
) -> list[tuple[Idea, Idea]]:
    """The method's own ideas that the user's took the place of, with other values, as (own, the user's)."""
    own = config if config is not None else chosen.config(preset, profile or chosen.profiles[0])
    if not isinstance(own.tune, Distilling) or not isinstance(settings.tune, Distilling):
        return []
    now = {type(idea): idea for idea in settings.tune.distill.ideas}
    return [(idea, now[type(idea)]) for idea in own.tune.distill.ideas if now.get(type(idea), idea) != idea]


def enter(
    model: nn.Module,
    input_shape: Sequence[int] | None,
    input_spec: InputSpec | None,
    num_classes: int | None,
    device: torch.device | str | None,
) -> tuple[fx.GraphModule, InputSpec]:
    """Checks the model and its input, and captures it on the device to work on."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model must be a torch.nn.Module, got {type(model).__name__}")
    spec = _spec(input_shape, input_spec)
    wanted = num_classes if num_classes is not None else spec.num_classes
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TypeError(f"quantize: model must have float32 weights, got {tensor.dtype} in '{name}'")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"quantize: model must have finite weights, got NaN or infinity in '{name}'")
    if device is not None:
        model = _on(model, device)
    example = example_for(model, spec.shape)
    reason = backend.refusal(example.device.type, torch.float32)
    if reason is not None:
        raise NotImplementedError(f"quantize: backend must be one that runs here, got {backend.choice()!r}: {reason}")
    teacher = capture(model, example)
    classes = int(teacher(example).shape[1]) if is_classifier(teacher) else None
    if classes is None and num_classes is not None:
        raise ValueError(f"quantize: num_classes must be left out for a model that is no classifier, got {num_classes}")
    if classes is not None and wanted not in (None, classes):
        raise ValueError(f"quantize: num_classes must be the model's {classes} outputs, got {wanted}")
    teacher = teacher.to(device=example.device, memory_format=torch.channels_last)
    return teacher, replace(spec, num_classes=classes)


def untrained(model: nn.Module) -> bool:
    """Whether every batch norm holds the statistics that it began with, as none does that has seen an image."""
    buffers = dict(model.named_buffers())
    means = [t for name, t in buffers.items() if name.endswith("running_mean")]
    variances = [t for name, t in buffers.items() if name.endswith("running_var")]
    return bool(means) and not any(bool(t.any()) for t in means) and all(bool((t == 1).all()) for t in variances)


def _spec(input_shape: Sequence[int] | None, input_spec: InputSpec | None) -> InputSpec:
    if input_spec is not None:
        if input_shape is not None:
            raise ValueError("quantize: input_shape must be left out where input_spec is given, got both")
        if not isinstance(input_spec, InputSpec):
            raise TypeError(f"quantize: input_spec must be an InputSpec, got {type(input_spec).__name__}")
        return input_spec
    try:
        return InputSpec(tuple(() if input_shape is None else input_shape))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"quantize: input_shape must be three positive integers (C, H, W) unless input_spec is given, "
            f"got {input_shape!r}"
        ) from error


def _on(model: nn.Module, device: torch.device | str) -> nn.Module:
    """The model itself, or a copy if it lives elsewhere."""
    try:
        example = torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
        reason = str(error).splitlines()[0]
        raise ValueError(f"quantize: device must be one that torch can use here, got {device!r}: {reason}") from error
    parameter = next(model.parameters(), None)
    return model if parameter is None or parameter.device == example.device else copy.deepcopy(model).to(device)


def example_for(model: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """An input batch on the model's device; two images, because a batch of one would be taken for a constant."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("quantize: model must have parameters to quantize, got none")
    return torch.zeros(2, *shape, device=parameter.device)


def given_images(
    images: Tensor | Images | None, labels: Tensor | None, teacher: fx.GraphModule, spec: InputSpec, seed: int
) -> Images | None:
    """The user's images, checked, on the teacher's device."""
    if images is None:
        if labels is not None:
            raise ValueError("quantize: labels must come with images, got labels alone")
        return None
    device = next(teacher.parameters()).device
    if isinstance(images, Images):
        if labels is not None:
            raise ValueError("quantize: labels must be left out where images bring their own, got both")
        _check_images(images.images, images.labels, spec)
        if len(images.held_out):
            _check_images(images.held_out, images.held_out_labels, spec)
        images = images.to(device)
        if images.labels is not None or spec.num_classes is None:
            return images
        known, others = (
            predictions(teacher, part) if len(part) else torch.zeros(0, dtype=torch.int64, device=device)
            for part in (images.images, images.held_out)
        )
        return replace(images, labels=known, held_out_labels=others)
    _check_images(images, labels, spec)
    images = images.detach().to(device)
    if labels is None and spec.num_classes is not None:
        labels = predictions(teacher, images)
    # at random, because data sets often come sorted by label
    order = torch.randperm(len(images), generator=stream(seed, "held out")).to(device)
    labels = None if labels is None else labels.to(device)[order]
    return hold_out(images[order], labels, min(256, -(-len(images) // 8), len(images) - 1))


def _check_images(images: Tensor, labels: Tensor | None, spec: InputSpec) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"quantize: images must be a float32 tensor in the network's normalised space, got {got}")
    if images.ndim != 4 or tuple(images.shape[1:]) != spec.shape or len(images) == 0:
        shape = ", ".join(map(str, spec.shape))
        raise ValueError(f"quantize: images must have shape (N, {shape}) with N >= 1, got {tuple(images.shape)}")
    if not bool(images.isfinite().all()):
        raise ValueError("quantize: images must be finite, got NaN or infinity")
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"quantize: labels must be an int64 tensor, got {got}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"quantize: labels must have shape ({len(images)},), got {tuple(labels.shape)}")
    if spec.num_classes is None:
        raise ValueError("quantize: labels must be left out for a network that is no classifier, got some")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= spec.num_classes:
        raise ValueError(f"quantize: labels must be in [0, {spec.num_classes}), got {low} to {high}")


def check_test(test: Batches | None, measure: Measure | None, spec: InputSpec) -> None:
    """Looks at the first batch of the test data, which would otherwise be met only after the images were made."""
    if measure is not None and not callable(measure):
        raise TypeError(f"quantize: measure must be a function of a network and batches, got {type(measure).__name__}")
    if test is None:
        if measure is not None:
            raise ValueError("quantize: measure must come with test, got measure alone")
        return
    if measure is None and spec.num_classes is None:
        raise ValueError(
            "quantize: test must come with a measure for a network that is no classifier, whose accuracy is no top-1, "
            "such as measure=zsq_ext.zoo.average_precision.precision_of"
        )
    if not callable(test):
        raise TypeError(f"quantize: test must be a function that gives batches, got {type(test).__name__}")
    first = next(iter(test()), None)
    if first is None:
        raise ValueError("quantize: test must give at least one batch at every call, got none")
    images, _ = pair_of(first) if measure is None else images_and_truth(first)
    if tuple(images.shape[1:]) != spec.shape:
        raise ValueError(f"quantize: test must give images of shape {spec.shape}, got {tuple(images.shape[1:])}")
