"""The front door: quantize, synthesize, evaluate, save and load."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq_ext import methods, report
from zsq_ext.core.progress import Progress
from zsq_ext.core.run import Run, fingerprint, load_tensors, save_tensors
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.qat import Images, Job, QatConfig, hold_out, synthesise
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.prepare import prepare
from zsq_ext.quant.quality import Quality, measure
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
        teacher_top1: the float network's accuracy on the same test data, in percent; None without test data.
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
    teacher_top1: float | None = None

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
    chosen = methods.get(method)
    qconfig = QConfig(
        w_bits,
        a_bits,
        placement=placement or chosen.placement,
        edge_bits=edge_bits if edge_bits is not None else chosen.edge_bits,
        sites=sites or {},
    )
    settings = _settings(chosen, preset, profile, tune, ideas, config)
    begin = time.perf_counter()
    teacher, spec = _enter(model, input_shape, input_spec, num_classes, device)
    job = _job(
        teacher,
        spec,
        qconfig,
        settings,
        method,
        seed,
        out,
        resume,
        progress or Progress(),
        given=_given(images, labels, teacher, spec),
        evaluate=_evaluator(test),
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
        teacher_top1=None if test is None else evaluate(teacher, test()),
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
    chosen = methods.get(method)
    settings = _settings(chosen, preset, profile, None, (), config)
    teacher, spec = _enter(model, input_shape, input_spec, num_classes, device)
    # images do not depend on the bits; any configuration stands for all
    job = _job(teacher, spec, QConfig(8, 8), settings, method, seed, out, resume, progress or Progress())
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
        raise ValueError(f"load: {path} has format version {info.get('format_version')}, this release reads 1")
    try:
        spec, qconfig = InputSpec.from_dict(info["spec"]), QConfig.from_dict(info["qconfig"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"load: {path} has an incomplete header: {error}") from error
    student = prepare(capture(model, _example(model, spec.shape, None)), qconfig)
    own = student.state_dict()
    for name in sorted({*own, *tensors}):
        there, here = tensors.get(name), own.get(name)
        if there is None or here is None or there.shape != here.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (there, here)]
            raise ValueError(
                f"load: model must be the saved architecture; '{name}' is {shapes[0]} there, {shapes[1]} here"
            )
    student.load_state_dict(tensors)
    return student.to(memory_format=torch.channels_last).eval()


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
    """Checks the model and its input, and captures it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model must be a torch.nn.Module, got {type(model).__name__}")
    if (input_shape is None) == (input_spec is None):
        raise ValueError("quantize: exactly one of input_shape and input_spec must be given")
    spec = input_spec or InputSpec(tuple(input_shape))  # type: ignore[arg-type]
    wanted = num_classes if num_classes is not None else spec.num_classes
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"quantize: model weights must be finite, but '{name}' holds NaN or infinity")
    example = _example(model, spec.shape, device)
    teacher = capture(model, example)
    classes = int(teacher(example).shape[1])
    if wanted is not None and wanted != classes:
        raise ValueError(f"quantize: num_classes must equal the model's {classes} outputs, got {wanted}")
    teacher = teacher.to(device=example.device, memory_format=torch.channels_last)
    return teacher, replace(spec, num_classes=classes)


def _example(model: nn.Module, shape: tuple[int, int, int], device: torch.device | str | None) -> Tensor:
    """An input batch on the device to work on; two images, because a batch of one would be taken for a constant."""
    parameter = next(iter(model.parameters()), None)
    if parameter is None:
        raise ValueError("quantize: model must have parameters to quantize, got none")
    return torch.zeros(2, *shape, device=parameter.device if device is None else device)


def _given(
    images: Tensor | Images | None, labels: Tensor | None, teacher: fx.GraphModule, spec: InputSpec
) -> Images | None:
    if images is None:
        if labels is not None:
            raise ValueError("quantize: labels need images, got labels alone")
        return None
    device = next(teacher.parameters()).device
    if isinstance(images, Images):
        return images.to(device)
    if images.ndim != 4 or tuple(images.shape[1:]) != spec.shape or len(images) == 0:
        raise ValueError(
            f"quantize: images must have shape (N, {', '.join(map(str, spec.shape))}), got {tuple(images.shape)}"
        )
    images = images.detach().float().to(device)
    if labels is None:
        with torch.no_grad():
            labels = torch.cat([teacher(chunk).argmax(1) for chunk in images.split(256)])
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"quantize: labels must be int64 of shape ({len(images)},), got {labels.dtype} {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= int(spec.num_classes or 0):
        raise ValueError(
            f"quantize: labels must be in [0, {spec.num_classes}), got {int(labels.min())}..{int(labels.max())}"
        )
    return hold_out(images, labels.to(device), min(256, len(images) // 8))


def _job(
    teacher: fx.GraphModule,
    spec: InputSpec,
    qconfig: QConfig,
    settings: QatConfig,
    method: str,
    seed: int,
    out: str | os.PathLike[str] | None,
    resume: bool,
    progress: Progress,
    given: Images | None = None,
    evaluate: Callable[[fx.GraphModule], float] | None = None,
) -> Job:
    """The job, with a run folder that belongs to exactly this configuration."""
    hyperparameters = dataclasses.asdict(settings)
    hyperparameters["distill"]["ideas"] = [to_dict(idea) for idea in settings.distill.ideas]
    decided_by = {
        "method": method,
        "hyperparameters": hyperparameters,
        "qconfig": qconfig.to_dict(),
        "spec": spec.to_dict(),
        "seed": seed,
        "model": fingerprint(teacher.state_dict()),
        "images": None if given is None else fingerprint({"images": given.images, "labels": given.labels}),
    }
    run = Run(out, decided_by, resume=resume)
    return Job(run, teacher, spec, qconfig, seed, progress, evaluate, given)


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
