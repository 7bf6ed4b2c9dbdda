"""The front door: quantize, synthesize, evaluate, save and load."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq_ext import methods, report
from zsq_ext.core.progress import Progress
from zsq_ext.core.rng import stream
from zsq_ext.core.run import Run, fingerprint, load_tensors, save_tensors
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.qat import Images, Job, QatConfig, hold_out, synthesise
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.prepare import plan, prepare
from zsq_ext.quant.quality import Quality, measure
from zsq_ext.synth.generator import Generator
from zsq_ext.synth.teacher import Teacher
from zsq_ext.tune.distill import Distiller
from zsq_ext.tune.ideas import Idea, merge, to_dict

FORMAT = "zsq_ext.quantized"
FORMAT_VERSION = 1
TUNES = ("qat", "none")

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives an iterable of (images in normalised space (N, C, H, W), labels (N,)), afresh at every call."""


@dataclass(frozen=True)
class Result:
    """What quantization gives back.

    Attributes:
        model: the fake-quantized network, ready to evaluate or to train on; on the caller's model's device.
        images: the synthetic images (N, C, H, W) it was tuned on, in the network's normalised space.
        labels: their labels (N,).
        quality: agreement, divergence and per-layer figures on held-out synthetic images; needs no data.
        spec: what the network expects at its input.
        qconfig: bits and placement.
        config: method, hyperparameters, seed: everything that decided the result.
        histories: loss values by stage, [{"step": n, term: value}].
        evaluations: [{"epoch": n, "top1": percent}], only where test data was given; epoch 0 is a network that was not
            tuned at all.
        seconds: wall time of the whole run.
    """

    model: fx.GraphModule
    images: Tensor
    labels: Tensor
    quality: Quality
    spec: InputSpec
    qconfig: QConfig
    config: Mapping[str, Any]
    histories: Mapping[str, list[dict]]
    evaluations: list[dict]
    seconds: float
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


def quantize(
    model: nn.Module,
    method: str = "synq",
    *,
    w_bits: int,
    a_bits: int | None,
    input_shape: Sequence[int] | None = None,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
    preset: str = "cifar",
    profile: str | None = None,
    tune: str | None = None,
    ideas: tuple[Idea, ...] = (),
    placement: str | None = None,
    edge_bits: int | None = None,
    sites: Mapping[str, int] | None = None,
    config: QatConfig | None = None,
    images: Tensor | Images | None = None,
    labels: Tensor | None = None,
    test: Batches | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Turns a trained network into a low-bit one without any of its training data.

    Args:
        model: the trained network: one image batch in, logits (N, K) out. It is not touched.
        method: ``"synq"``, ``"hast"``, or a control: ``"minmax"`` (no tuning), ``"noise"``.
        w_bits: bits of the weights, 2 to 8.
        a_bits: bits of the activations, 2 to 8; None quantizes the weights only.
        input_shape: (C, H, W) of an image; or give ``input_spec``.
        input_spec: shape and normalisation of the input.
        num_classes: number of labels; read off the model's output if left out.
        preset: size of the run: ``"smoke"`` (minutes), ``"cifar"``, ``"imagenet"``.
        profile: the variant where a paper and its released code differ, for ``"synq"``: ``"repo"`` or ``"paper"``.
        tune: how the images are used: ``"qat"`` or ``"none"``; None leaves it to the method.
        ideas: published ideas to add to the method, such as ``LowPass(d0=8)``; one of a kind replaces the method's own.
        placement, edge_bits, sites: see ``QConfig``; None leaves them to the method.
        config: all hyperparameters at once, instead of ``preset`` and ``profile``.
        images, labels: use these instead of making images: what ``synthesize`` returned, or a tensor (N, C, H, W) in
            normalised space, of which an eighth (up to 256) is held out from tuning. Without labels, (N,) int64, the
            teacher's predictions are taken.
        test: test data for the per-epoch accuracy in ``evaluations``; it decides nothing.
        seed: of every random stream of the run.
        device: where to work; the model's device if left out.
        out: a folder for checkpoints, images, the model and the report; None keeps nothing on disk.
        resume: continue the run that ``out`` holds.
        progress: where to report; a bar or plain lines on standard error if left out.

    Returns:
        The quantized network with its images, label-free quality and records.

    Raises:
        ValueError: an argument is out of its range or does not fit the model, naming it.
        NotImplementedError: the model cannot be captured, naming the module.
        Diverged: a loss stopped being finite, with the step, the term and what to try.

    Example:
        >>> result = zsq.quantize(model, "synq", w_bits=4, a_bits=4, input_shape=(3, 32, 32), preset="smoke")
        >>> result.save("w4a4.safetensors")
    """
    begin = time.perf_counter()
    with _speaking_as("quantize"):
        chosen = methods.get(method)
        qconfig = QConfig(
            w_bits,
            a_bits,
            placement=placement or chosen.placement,
            edge_bits=edge_bits if edge_bits is not None else chosen.edge_bits,
            sites=sites or {},
        )
        settings = _settings(chosen, preset, profile, tune, ideas, config)
        teacher, spec = _enter(model, input_shape, input_spec, num_classes, device)
        given = _given(images, labels, teacher, spec, seed)
        _check_early(teacher, spec, qconfig, settings, given)
        names = _names(chosen, method, preset, profile, config)
        job = _job(
            teacher, spec, qconfig, settings, names, seed, out, resume, progress or Progress(), given, _evaluator(test)
        )
    outcome = chosen.run(job, settings)
    evaluations = outcome.evaluations
    if test is not None and not evaluations:
        evaluations = [{"epoch": 0, "top1": evaluate(outcome.student, test())}]
    held_out = outcome.images.held_out if len(outcome.images.held_out) else outcome.images.images[:256]
    result = Result(
        model=outcome.student.eval(),
        images=outcome.images.images,
        labels=outcome.images.labels,
        quality=measure(teacher, outcome.student, qconfig, held_out),
        spec=spec,
        qconfig=qconfig,
        config=job.run.config,
        histories=outcome.histories,
        evaluations=evaluations,
        seconds=time.perf_counter() - begin,
        measure_teacher=None if test is None else lambda: evaluate(teacher, test()),
    )
    _keep(job.run, result)
    return result


def synthesize(
    model: nn.Module,
    method: str = "synq",
    *,
    input_shape: Sequence[int] | None = None,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
    preset: str = "cifar",
    profile: str | None = None,
    config: QatConfig | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Images:
    """Makes a method's synthetic images and stops there. Arguments as for ``quantize``.

    Returns:
        The images and labels, the part for tuning and the part held out.
    """
    with _speaking_as("synthesize"):
        chosen = methods.get(method)
        settings = _settings(chosen, preset, profile, None, (), config)
        teacher, spec = _enter(model, input_shape, input_spec, num_classes, device)
        if settings.source != "noise":
            Teacher(teacher)  # refuses a network that images cannot be made from
        names = _names(chosen, method, preset, profile, config)
        # images do not depend on the bits; any configuration stands for all
        job = _job(teacher, spec, QConfig(8, 8), settings, names, seed, out, resume, progress or Progress())
    made = synthesise(job, settings)
    job.run.save("images", {"images": made.images, "labels": made.labels}, {"spec": spec.to_dict()})
    return made


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy in percent.

    Args:
        model: any classifier; it is run as it is, in eval mode if it is a result's model.
        batches: (images in the model's input space, labels (N,)).

    Raises:
        ValueError: there was no image.
    """
    device = next(iter(model.parameters())).device
    right = total = 0
    for images, labels in batches:
        images = images.to(device, memory_format=torch.channels_last)
        right += int((model(images).argmax(1) == labels.to(device)).sum())
        total += len(labels)
    if total == 0:
        raise ValueError("evaluate: batches must hold at least one image, got none")
    return 100 * right / total


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
    tensors, info = load_tensors(path)
    if info.get("format") != FORMAT:
        raise ValueError(f"load: {path} must be a quantized model of zsq_ext, got format {info.get('format')!r}")
    if info.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"load: {path} must have format version {FORMAT_VERSION}, got {info.get('format_version')!r}")
    try:
        spec, qconfig = InputSpec.from_dict(info["spec"]), QConfig.from_dict(info["qconfig"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"load: {path} must have a complete header, but: {error}") from error
    with _speaking_as("load"):
        student = prepare(capture(model, _example(model, spec.shape)), qconfig)
    own = student.state_dict()
    for name in sorted({*own, *tensors}):
        there, here = (
            None if t is None else f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
            for t in (tensors.get(name), own.get(name))
        )
        if there != here:
            raise ValueError(f"load: model must be the saved architecture; '{name}' is {there} there, {here} here")
    student.load_state_dict(tensors)
    return student.to(memory_format=torch.channels_last).eval()


@contextmanager
def _speaking_as(function: str) -> Iterator[None]:
    """Bad input is reported in the name of the function that was called, whichever floor noticed it."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        said = re.match(r"\w+: (.*)", str(error), re.DOTALL)
        if said is None:
            raise
        kinds = (NotImplementedError, TypeError, ValueError)
        raise next(kind for kind in kinds if isinstance(error, kind))(f"{function}: {said[1]}") from error


def _settings(
    chosen: methods.Method,
    preset: str,
    profile: str | None,
    tune: str | None,
    ideas: tuple[Idea, ...],
    config: QatConfig | None,
) -> QatConfig:
    if preset not in methods.PRESETS:
        raise ValueError(f"quantize: preset must be one of {', '.join(methods.PRESETS)}, got {preset!r}")
    profile = profile or chosen.profiles[0]
    if profile not in chosen.profiles:
        raise ValueError(f"quantize: profile must be one of {', '.join(chosen.profiles)}, got {profile!r}")
    if tune is not None and tune not in TUNES:
        raise ValueError(f"quantize: tune must be one of {', '.join(TUNES)}, got {tune!r}")
    settings = config or chosen.config(preset, profile)
    if not isinstance(settings, QatConfig):
        raise TypeError(f"quantize: config must be a QatConfig, got {type(settings).__name__}")
    if isinstance(ideas, Idea):
        ideas = (ideas,)
    if ideas:
        distill = replace(settings.distill, ideas=merge(settings.distill.ideas, tuple(ideas)))
        settings = replace(settings, distill=distill)
    if tune == "none":
        settings = replace(settings, tune=replace(settings.tune, epochs=0))
    return settings


def _enter(
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
    example = _example(model, spec.shape)
    teacher = capture(model, example)
    classes = int(teacher(example).shape[1])
    if wanted is not None and wanted != classes:
        raise ValueError(f"quantize: num_classes must be the model's {classes} outputs, got {wanted}")
    teacher = teacher.to(device=example.device, memory_format=torch.channels_last)
    return teacher, replace(spec, num_classes=classes)


def _spec(input_shape: Sequence[int] | None, input_spec: InputSpec | None) -> InputSpec:
    if input_spec is not None:
        if input_shape is not None:
            raise ValueError("quantize: input_shape must be left out where input_spec is given, got both")
        if not isinstance(input_spec, InputSpec):
            raise TypeError(f"quantize: input_spec must be an InputSpec, got {type(input_spec).__name__}")
        return input_spec
    try:
        return InputSpec(tuple(input_shape or ()))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"quantize: input_shape must be three positive integers (C, H, W), got {input_shape!r}"
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


def _example(model: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """An input batch on the model's device; two images, because a batch of one would be taken for a constant."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("quantize: model must have parameters to quantize, got none")
    return torch.zeros(2, *shape, device=parameter.device)


def _given(
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
        return images.to(device)
    _check_images(images, labels, spec)
    images = images.detach().to(device)
    if labels is None:
        with torch.no_grad():
            labels = torch.cat([teacher(chunk).argmax(1) for chunk in images.split(256)])
    # at random, because data sets often come sorted by label
    order = torch.randperm(len(images), generator=stream(seed, "held out")).to(device)
    return hold_out(images[order], labels.to(device)[order], min(256, len(images) // 8))


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
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= int(spec.num_classes or 0):
        raise ValueError(f"quantize: labels must be in [0, {spec.num_classes}), got {low} to {high}")


def _check_early(
    teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig, settings: QatConfig, given: Images | None
) -> None:
    """What would otherwise be noticed only after the images were made."""
    plan(teacher, qconfig)
    if given is None:
        if settings.source != "noise":
            Teacher(teacher)  # refuses a network that images cannot be made from
        if settings.ranges == "generator" and qconfig.a_bits is not None:
            Generator.check(spec.shape)
    if settings.tune.epochs > 0:
        Distiller(teacher, teacher, settings.distill)


def _names(
    chosen: methods.Method, method: str, preset: str, profile: str | None, config: QatConfig | None
) -> dict[str, str | None]:
    """What the run calls itself; a configuration made by hand is no preset and no profile."""
    if config is not None:
        return {"method": method, "preset": None, "profile": None}
    return {"method": method, "preset": preset, "profile": profile or chosen.profiles[0]}


def _job(
    teacher: fx.GraphModule,
    spec: InputSpec,
    qconfig: QConfig,
    settings: QatConfig,
    names: Mapping[str, str | None],
    seed: int,
    out: str | os.PathLike[str] | None,
    resume: bool,
    progress: Progress,
    given: Images | None = None,
    evaluate: Callable[[fx.GraphModule], float] | None = None,
) -> Job:
    """The job, with a run folder that belongs to exactly this configuration."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"quantize: seed must be an integer, got {seed!r}")
    hyperparameters = dataclasses.asdict(settings)
    hyperparameters["distill"]["ideas"] = [to_dict(idea) for idea in settings.distill.ideas]
    decided_by = {
        **names,
        "hyperparameters": hyperparameters,
        "qconfig": qconfig.to_dict(),
        "spec": spec.to_dict(),
        "seed": seed,
        "model": fingerprint(teacher.state_dict()),
        "images": None if given is None else _fingerprint_of(given),
    }
    run = Run(out, decided_by, resume=resume)
    return Job(run, teacher, spec, qconfig, seed, progress, evaluate, given)


def _fingerprint_of(given: Images) -> str:
    return fingerprint({"images": given.images, "labels": given.labels, "held_out": given.held_out})


def _evaluator(test: Batches | None) -> Callable[[fx.GraphModule], float] | None:
    return None if test is None else lambda student: evaluate(student, test())


def _keep(run: Run, result: Result) -> None:
    """Puts the result into the run folder, if there is one."""
    if run.folder is None:
        return
    result.save(run.folder / "model.safetensors")
    run.save("images", {"images": result.images, "labels": result.labels}, {"spec": result.spec.to_dict()})
    run.write_json(
        "result.json",
        {
            "teacher_top1": result.teacher_top1,
            "top1_last": result.top1_last,
            "top1_best": result.top1_best,
            "evaluations": result.evaluations,
            "quality": result.quality.to_dict(),
            "histories": dict(result.histories),
            "seconds": result.seconds,
        },
    )
    report.write(result, run.folder)
