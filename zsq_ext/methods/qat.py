"""Noise-optimised images, then distillation: the phases that ZeroQ, IntraQ, HAST and SynQ share.

A method of this lineage is a ``QatConfig`` and the order in which it calls these phases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.core.rng import stream
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import Terms
from zsq_ext.methods.job import Images, Job, hold_out
from zsq_ext.quant.fuse import fuse
from zsq_ext.quant.modules import RangeTrace, activation_quantizers, calibrating
from zsq_ext.synth.filters import LowPass as LowPassFilter
from zsq_ext.synth.generator import GeneratorConfig, train_generator
from zsq_ext.synth.objectives import (
    bn_statistics_loss,
    calibration_centre_loss,
    cross_entropy,
    focal_ce,
    layered_bn_statistics_loss,
)
from zsq_ext.synth.pixels import Objective, PixelConfig, make_images
from zsq_ext.synth.teacher import Context, Teacher
from zsq_ext.tune.distill import DistillConfig, Distiller
from zsq_ext.tune.finetune import TuneConfig, Tuned, finetune
from zsq_ext.tune.ideas import LowPass

SOURCES = ("pixels", "noise")
RANGES = ("generator", "images")
BNS_FORMS = ("mean_var", "mean_std")


@dataclass(frozen=True)
class QatConfig:
    """Every hyperparameter of the lineage. Defaults are SynQ's released ones for ImageNet (spec: section 3)."""

    # stage A: images
    source: str = "pixels"  # or "noise": Gaussian images, the control
    images: int = 5120
    held_out: int = 256  # made on top, for the label-free quality
    pixels: PixelConfig = field(default_factory=PixelConfig)
    bns: float = 1.0  # weight of the BN statistics; 0.4 beside L-BNS
    bns_form: str = "mean_var"  # released; "mean_std" in the paper
    beta: float = 0.1  # hard-sample inception loss; (10, 2) on CIFAR in HAST
    gamma: float = 0.5
    lbns: float = 0.0  # L-BNS weight; 0.02 where it is on
    lbns_divide_by: str = "layers"  # "released" also divides by 256, which switches it off in effect
    centres: bool = False  # calibration centres: made for L-BNS, or to join the tuning set
    centre_pixels: PixelConfig = field(default_factory=lambda: PixelConfig(iterations=1500, min_lr=0.05))
    # stage B: ranges and tuning
    ranges: str = "generator"  # as released; "images" uses the (filtered) images themselves
    range_steps: int = 40
    range_batch: int = 64
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)

    def __post_init__(self) -> None:
        require("QatConfig", "source", self.source, self.source in SOURCES, f"be one of {', '.join(SOURCES)}")
        require("QatConfig", "images", self.images, self.images >= 1, "be at least 1")
        require("QatConfig", "held_out", self.held_out, self.held_out >= 0, "be at least 0")
        require("QatConfig", "bns_form", self.bns_form, self.bns_form in BNS_FORMS, f"be one of {', '.join(BNS_FORMS)}")
        require("QatConfig", "ranges", self.ranges, self.ranges in RANGES, f"be one of {', '.join(RANGES)}")
        require("QatConfig", "range_steps", self.range_steps, self.range_steps >= 1, "be at least 1")
        require("QatConfig", "range_batch", self.range_batch, self.range_batch >= 1, "be at least 1")
        for name in ("bns", "beta", "gamma", "lbns"):
            require("QatConfig", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")
        require("QatConfig", "lbns", self.lbns, self.lbns == 0 or self.centres, "be 0 without centres")


def low_pass(config: QatConfig, spec: InputSpec, device: torch.device, when: str) -> Callable[[Tensor], Tensor] | None:
    """The low-pass filter, if it is switched on for that moment (``"once"`` or ``"step"``)."""
    idea = config.distill.find(LowPass)
    if idea is None or idea.when != when:
        return None
    return LowPassFilter(spec.shape[1:], idea.d0).to(device)


def synthesise(job: Job, config: QatConfig) -> Images:
    """Stage A: labelled images from the teacher alone (or noise, or what the user gave)."""
    if job.given is not None:
        return job.given
    total = config.images + config.held_out
    labels = torch.randint(job.num_classes, (total,), generator=stream(job.seed, "labels")).to(job.device)
    if config.source == "noise":
        noise = torch.randn(total, *job.spec.shape, generator=stream(job.seed, "noise"))
        return hold_out(noise.to(job.device), labels, config.held_out)
    teacher = Teacher(job.teacher)
    centres = calibration_centres(job, config, teacher) if config.centres else None
    objective = inception(config, teacher, centres)
    images, history = make_images(job.stage("images"), teacher, labels, job.spec.shape, objective, config.pixels)
    made = hold_out(images, labels, config.held_out, history)
    if centres is None or config.lbns > 0:
        return made
    # without L-BNS the centres join the tuning set
    own = torch.arange(job.num_classes, device=job.device)
    return replace(made, images=torch.cat([made.images, centres]), labels=torch.cat([made.labels, own]))


def inception(config: QatConfig, teacher: Teacher, centres: Tensor | None) -> Objective:
    """The images' loss: hard-sample inception + BN statistics (+ L-BNS towards the calibration centres)."""
    targets = teacher.statistics(centres, config.pixels.batch) if centres is not None and config.lbns > 0 else None

    def objective(seen: Context) -> Terms:
        bns = bn_statistics_loss(seen.statistics, teacher.target, form=config.bns_form)
        terms = {
            "hil": focal_ce(seen.logits, seen.labels, beta=config.beta, gamma=config.gamma),
            "bns": config.bns * bns,
        }
        if targets is not None:
            lbns = layered_bn_statistics_loss(seen.statistics, targets, divide_by=config.lbns_divide_by)
            terms["lbns"] = config.lbns * lbns
        return terms

    return objective


def calibration_centres(job: Job, config: QatConfig, teacher: Teacher) -> Tensor:
    """One image per class, in order: 5 CE + the layered BN statistics (TexQ's idea, SynQ's form)."""

    def objective(seen: Context) -> Terms:
        bns = calibration_centre_loss(seen.statistics, teacher.target)
        return {"ce": 5 * cross_entropy(seen.logits, seen.labels), "bns": bns}

    labels = torch.arange(job.num_classes, device=job.device)
    centres, _ = make_images(job.stage("centres"), teacher, labels, job.spec.shape, objective, config.centre_pixels)
    return centres


def calibrate(job: Job, config: QatConfig, student: fx.GraphModule, images: Tensor) -> dict[str, list[dict]]:
    """Finds the activation ranges, from the images or from a generator that is trained on the way (as released).

    Returns:
        Histories: ``"ranges"``, the generator's losses, and ``"calibration"``, the ranges by batch; empty where there
        is no generator and no activation quantizer.
    """
    if not activation_quantizers(student):
        return {"ranges": [], "calibration": []}
    fused = fuse(student)  # with the student's own quantizers, whose ranges come from the reads that make their values
    with calibrating(student):
        if config.ranges == "generator" and job.given is None:  # given images are better than a generator's
            trace = RangeTrace(student, config.generator.steps)

            def observe(batch: Tensor) -> None:
                with torch.no_grad():
                    fused(batch)
                trace.record()

            buffers = {name: b for name, b in student.named_buffers() if name.startswith("quantizers.")}
            losses = train_generator(
                job.stage("ranges"),
                Teacher(job.teacher),
                job.num_classes,
                job.spec.shape,
                config.generator,
                on_images=observe,
                extra_state={**buffers, "trace": trace.rows},
            )
            return {"ranges": losses, "calibration": trace.history()}
        return {"ranges": [], "calibration": _observe_images(job, config, student, fused, images)}


@torch.no_grad()
def _observe_images(
    job: Job, config: QatConfig, student: fx.GraphModule, fused: fx.GraphModule, images: Tensor
) -> list[dict]:
    trace = RangeTrace(student, config.range_steps)
    filter_images = low_pass(config, job.spec, job.device, "step")
    with job.progress.stage("ranges", config.range_steps) as stage:
        for n in range(config.range_steps):
            draw = torch.randint(
                len(images), (min(config.range_batch, len(images)),), generator=stream(job.seed, "ranges", n)
            )
            batch = images[draw.to(job.device)]
            if filter_images is not None:
                batch = filter_images(batch)
            fused(batch.contiguous(memory_format=torch.channels_last))
            trace.record()
            stage.advance()
    return trace.history()


def tune(job: Job, config: QatConfig, student: fx.GraphModule, images: Images) -> Tuned:
    """Stage B: the student learns the teacher's answers on the images."""
    return finetune(
        job.stage("tuning"),
        student,
        images.images,
        images.labels,
        Distiller(job.teacher, student, config.distill),
        config.tune,
        filter_batch=low_pass(config, job.spec, job.device, "step"),
        evaluate=job.evaluate,
    )
