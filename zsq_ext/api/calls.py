"""The two calls that work: quantize, and synthesize for the images alone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq_ext import __version__, methods, report
from zsq_ext.api.arguments import (
    check_kinds,
    check_test,
    enter,
    given_images,
    replaced,
    settings_of,
    speaking_as,
    untrained,
)
from zsq_ext.api.measure import Batches, Evaluator, Measure, measured, top1
from zsq_ext.api.result import Result
from zsq_ext.core.progress import Progress
from zsq_ext.core.run import Run, fingerprint
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.job import Images, Job, Outcome
from zsq_ext.methods.recipe import Recipe
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.prepare import plan
from zsq_ext.quant.quality import measure as measure_quality
from zsq_ext.synth.distance import ImageFigures, figures
from zsq_ext.tune.ideas import Idea


def quantize(
    model: nn.Module,
    method: str = "synq",
    *,
    w_bits: int,
    a_bits: int | None,
    input_shape: Sequence[int] | None = None,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
    preset: str = "smoke",
    profile: str | None = None,
    tune: str | None = None,
    ideas: tuple[Idea, ...] = (),
    placement: str | None = None,
    edge_bits: int | None = None,
    sites: Mapping[str, int] | None = None,
    a_range: str | None = None,
    w_range: str | None = None,
    config: Recipe | None = None,
    images: Tensor | Images | None = None,
    labels: Tensor | None = None,
    test: Batches | None = None,
    measure: Measure | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Turns a trained network into a low-bit one without any of its training data.

    Args:
        model: the trained network: one image batch in; logits (N, K) out, or for ``"dgh"`` any dicts and lists of
            tensors, such as a detector's heads. It is not touched.
        method: ``"synq"``, ``"hast"``, ``"dgh"``; ``"gdfq"``, ``"kmdfq"``, ``"adadfq"`` and ``"agm"``, which train a
            generator; ``"dfq"``; or a control: ``"minmax"`` (no tuning), ``"noise"``.
        w_bits: bits of the weights, 2 to 8.
        a_bits: bits of the activations, 2 to 8; None quantizes the weights only.
        input_shape: (C, H, W) of an image; or give ``input_spec``.
        input_spec: shape and normalisation of the input.
        num_classes: number of labels; read off the model's output if left out.
        preset: size of the run: ``"smoke"``, minutes to see it work; ``"cifar"`` and ``"imagenet"``, the literature's.
        profile: the variant where sources differ: ``"repo"`` or, for ``"synq"``, ``"paper"``, or, for ``"dgh"``,
            ``"mct"``; for ``"agm"`` what it is added to, ``"kmdfq"``, ``"gdfq"`` or ``"adadfq"``.
        tune: how the images are used: ``"qat"``, ``"brecq"``, ``"genie_m"``, ``"adaround"``, ``"dfq"`` or ``"none"``;
            None leaves it to the method.
        ideas: published ideas to add to the method, such as ``LowPass(d0=8)``; one of a kind replaces the method's own.
        placement, edge_bits, sites: see ``QConfig``; None leaves them to the method.
        a_range, w_range: how ranges are found, see ``QConfig``; None leaves it to the tuning.
        config: all hyperparameters at once, instead of ``preset`` and ``profile``.
        images, labels: use these instead of making images: what ``synthesize`` returned, or a tensor (N, C, H, W) in
            normalised space, of which an eighth (up to 256) is held out from tuning. Without labels, (N,) int64, the
            teacher's predictions are taken.
        test: test data for ``evaluations``: a function that gives batches of images in normalised space and labels. It
            decides nothing.
        measure: how a network is measured on them, ``measure(network, test())`` to figures in percent by name; top-1 if
            left out. For a detector such as ``zsq_ext.zoo.average_precision.precision_of``.
        seed: of every random stream of the run.
        device: where to work; the model's device if left out.
        out: a folder for checkpoints, images, the model and the report; None keeps nothing on disk.
        resume: continue the run that ``out`` holds; it must hold one.
        progress: where to report; a bar or plain lines on standard error if left out.

    Returns:
        The quantized network with its images, label-free quality and records.

    Raises:
        ValueError: an argument is out of its range or does not fit the model, naming it.
        NotImplementedError: the model cannot be captured, naming the module; or a forced backend is not here.
        Diverged: a loss stopped being finite, with the step, the term and what to try.

    Example:
        >>> result = zsq.quantize(model, "synq", w_bits=4, a_bits=4, input_shape=(3, 32, 32), preset="smoke")
        >>> result.save("w4a4.safetensors")
    """
    begin = time.perf_counter()
    with speaking_as("quantize"):
        check_kinds(resume, preset=preset, profile=profile, tune=tune, num_classes=num_classes)
        check_kinds(resume, placement=placement, sites=sites, a_range=a_range, w_range=w_range)
        check_kinds(resume, device=device, out=out, progress=progress)
        chosen = methods.get(method)
        settings = settings_of(chosen, preset, profile, tune, ideas, config)
        qconfig = QConfig(
            w_bits,
            a_bits,
            placement=placement or chosen.placement,
            edge_bits=edge_bits if edge_bits is not None else chosen.edge_bits,
            sites=sites or {},
            a_range=a_range or settings.tune.a_range,
            w_range=w_range or settings.tune.w_range,
        )
        for old, new in replaced(chosen, preset, profile, config, settings):
            (progress or Progress()).say(f"{new} replaces the method's own {old}")
        teacher, spec = enter(model, input_shape, input_spec, num_classes, device)
        given = given_images(images, labels, teacher, spec, seed)
        plan(teacher, qconfig)
        settings.check(teacher, spec, qconfig, given is not None)
        check_test(test, measure, spec)
        names = _names(chosen, method, preset, profile, config)
        measure = measure or top1
        evaluator = None if test is None else Evaluator(test, measure)
        run = _run(teacher, spec, qconfig, settings, names, seed, given, out=out, resume=resume, since=begin)
        job = Job(run, teacher, spec, qconfig, seed, progress or Progress(), evaluator, given)
    _warn(job, model)
    outcome = settings.run(job)
    unseen = len(outcome.images.held_out) > 0
    judges = outcome.images.held_out if unseen else outcome.images.images[:256]
    with job.progress.stage("quality", len(judges)) as meter:
        quality = measure_quality(
            teacher,
            outcome.student,
            qconfig,
            judges,
            reference=outcome.reference,
            unseen=unseen,
            advance=meter.advance,
        )
    result = Result(
        model=outcome.student.eval(),
        images=outcome.images.images,
        labels=outcome.images.labels,
        quality=quality,
        figures=figures(teacher, outcome.images.images[:512]) if len(outcome.images.images) else ImageFigures(),
        spec=spec,
        qconfig=qconfig,
        config=job.run.config,
        histories=outcome.histories,
        evaluations=_evaluations(evaluator, outcome),
        seconds=job.run.seconds,
        tuning=settings.tune.title,
        measure_teacher=None if test is None else lambda: measured(teacher, test(), measure),
    )
    _keep(job.run, result, outcome.images)
    return result


def synthesize(
    model: nn.Module,
    method: str = "synq",
    *,
    input_shape: Sequence[int] | None = None,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
    preset: str = "smoke",
    profile: str | None = None,
    config: Recipe | None = None,
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
    begin = time.perf_counter()
    with speaking_as("synthesize"):
        check_kinds(resume, preset=preset, profile=profile, num_classes=num_classes)
        check_kinds(resume, device=device, out=out, progress=progress)
        chosen = methods.get(method)
        if not chosen.makes_images:
            raise ValueError(f"synthesize: method must be one that makes images, got {method!r}, which needs none")
        settings = settings_of(chosen, preset, profile, None, (), config)
        teacher, spec = enter(model, input_shape, input_spec, num_classes, device)
        settings.images.check(teacher, spec)
        names = _names(chosen, method, preset, profile, config)
        qconfig = QConfig(8, 8)  # images do not depend on the bits; any configuration stands for all
        run = _run(teacher, spec, qconfig, settings, names, seed, None, out=out, resume=resume, since=begin)
        job = Job(run, teacher, spec, qconfig, seed, progress or Progress())
    _warn(job, model)
    made = settings.images.make(job)
    job.run.save("images", made.tensors(), {"spec": spec.to_dict()})
    return made


def _warn(job: Job, model: nn.Module) -> None:
    if untrained(model):
        job.progress.say("warning: the model's batch norms have seen no image: were its trained weights loaded?")


def _names(
    chosen: methods.Method, method: str, preset: str, profile: str | None, config: Recipe | None
) -> dict[str, str | None]:
    """What the run calls itself; a configuration made by hand is no preset and no profile."""
    if config is not None:
        return {"method": method, "preset": None, "profile": None}
    return {"method": method, "preset": preset, "profile": profile or chosen.profiles[0]}


def _run(
    teacher: fx.GraphModule,
    spec: InputSpec,
    qconfig: QConfig,
    settings: Recipe,
    names: Mapping[str, str | None],
    seed: int,
    given: Images | None,
    **where: Any,
) -> Run:
    """A run whose folder belongs to exactly this configuration; `where` is what ``Run`` takes besides."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"quantize: seed must be an integer, got {seed!r}")
    decided_by = {
        **names,
        "hyperparameters": settings.to_dict(),
        "qconfig": qconfig.to_dict(),
        "spec": spec.to_dict(),
        "seed": seed,
        "version": __version__,
        "model": fingerprint(teacher.state_dict()),
        "images": None if given is None else _fingerprint_of(given),
    }
    return Run(config=decided_by, **where)


def _fingerprint_of(given: Images) -> str:
    return fingerprint({name: value for name, value in given.tensors().items() if name != "held_out_labels"})


def _evaluations(evaluator: Evaluator | None, outcome: Outcome) -> list[dict[str, Any]]:
    """The figures by epoch, all on one set of test data: this call's, if it was given any."""
    by_epoch = {row["epoch"]: row for row in outcome.evaluations}
    if evaluator is not None and not evaluator.used:  # nothing was tuned by epochs, or it was before this call
        by_epoch[outcome.epochs] = {"epoch": outcome.epochs, **evaluator(outcome.student)}
    rows = [{key: value for key, value in row.items() if key != "step"} for row in by_epoch.values()]
    same = [row for row in rows if row["test"] == rows[-1]["test"] and row.keys() == rows[-1].keys()]
    return [{key: value for key, value in row.items() if key != "test"} for row in same]


def _keep(run: Run, result: Result, images: Images) -> None:
    """Puts the result into the run folder, if there is one."""
    if run.folder is None:
        return
    result.save(run.folder / "model.safetensors")
    run.save("images", images.tensors(), {"spec": result.spec.to_dict()})
    run.write_json(
        "result.json",
        {
            "teacher_accuracy": result.teacher_accuracy,
            "accuracy": result.accuracy,
            "evaluations": result.evaluations,
            "quality": result.quality.to_dict(),
            "images": result.figures.to_dict(),
            "histories": dict(result.histories),
            "seconds": result.seconds,
        },
    )
    report.write(result, run.folder)
    run.finish(result.seconds)
