"""Noise-optimised images, which ZeroQ, IntraQ, HAST and SynQ share, and the Gaussian noise they are held against."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.core.rng import stream
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import Terms
from zsq_ext.methods.job import Images, Job, hold_out
from zsq_ext.synth.objectives import (
    bn_statistics_loss,
    calibration_centre_loss,
    cross_entropy,
    focal_ce,
    layered_bn_statistics_loss,
)
from zsq_ext.synth.pixels import Objective, PixelConfig, make_images
from zsq_ext.synth.teacher import Context, Teacher

BNS_FORMS = ("mean_var", "mean_std")


@dataclass(frozen=True)
class GaussianImages:
    """Gaussian noise with random labels: the control of every method that makes images."""

    images: int = 5120
    held_out: int = 256  # made on top, for the label-free quality

    def __post_init__(self) -> None:
        require("GaussianImages", "images", self.images, self.images >= 1, "be at least 1")
        require("GaussianImages", "held_out", self.held_out, self.held_out >= 0, "be at least 0")

    def check(self, teacher: fx.GraphModule, spec: InputSpec) -> None:
        """Noise needs nothing of the network."""

    def make(self, job: Job) -> Images:
        total = self.images + self.held_out
        noise = torch.randn(total, *job.spec.shape, generator=stream(job.seed, "noise"))
        labels = random_labels(job, total) if job.num_classes else None
        return hold_out(noise.to(job.device), labels, self.held_out)


@dataclass(frozen=True)
class PixelImages:
    """Labelled images whose pixels are optimised: hard-sample inception + BN statistics (+ L-BNS).

    Defaults are SynQ's released ones for ImageNet (spec: section 3).
    """

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

    def __post_init__(self) -> None:
        require("PixelImages", "images", self.images, self.images >= 1, "be at least 1")
        require("PixelImages", "held_out", self.held_out, self.held_out >= 0, "be at least 0")
        forms = f"be one of {', '.join(BNS_FORMS)}"
        require("PixelImages", "bns_form", self.bns_form, self.bns_form in BNS_FORMS, forms)
        for name in ("bns", "beta", "gamma", "lbns"):
            require("PixelImages", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")
        require("PixelImages", "lbns", self.lbns, self.lbns == 0 or self.centres, "be 0 without centres")

    def check(self, teacher: fx.GraphModule, spec: InputSpec) -> None:
        require_classes("images with labels", spec)
        Teacher(teacher)  # refuses a network without statistics

    def make(self, job: Job) -> Images:
        labels = random_labels(job, self.images + self.held_out)
        teacher = Teacher(job.teacher)
        centres = self._calibration_centres(job, teacher) if self.centres else None
        objective = self.inception(teacher, centres)
        images, history = make_images(job.stage("images"), teacher, labels, job.spec.shape, objective, self.pixels)
        made = hold_out(images, labels, self.held_out, history)
        if centres is None or self.lbns > 0:
            return made
        # without L-BNS the centres join the tuning set
        own = torch.arange(job.num_classes, device=job.device)
        return replace(made, images=torch.cat([made.images, centres]), labels=torch.cat([made.the_labels(), own]))

    def inception(self, teacher: Teacher, centres: Tensor | None) -> Objective:
        """The images' loss: hard-sample inception + BN statistics (+ L-BNS towards the calibration centres)."""
        targets = teacher.statistics(centres, self.pixels.batch) if centres is not None and self.lbns > 0 else None

        def objective(seen: Context) -> Terms:
            bns = bn_statistics_loss(seen.statistics, teacher.target, form=self.bns_form)
            terms = {
                "hil": focal_ce(seen.logits, seen.labels, beta=self.beta, gamma=self.gamma),
                "bns": self.bns * bns,
            }
            if targets is not None:
                lbns = layered_bn_statistics_loss(seen.statistics, targets, divide_by=self.lbns_divide_by)
                terms["lbns"] = self.lbns * lbns
            return terms

        return objective

    def _calibration_centres(self, job: Job, teacher: Teacher) -> Tensor:
        """One image per class, in order: 5 CE + the layered BN statistics (TexQ's idea, SynQ's form)."""

        def objective(seen: Context) -> Terms:
            bns = calibration_centre_loss(seen.statistics, teacher.target)
            return {"ce": 5 * cross_entropy(seen.logits, seen.labels), "bns": bns}

        labels = torch.arange(job.num_classes, device=job.device)
        centres, _ = make_images(job.stage("centres"), teacher, labels, job.spec.shape, objective, self.centre_pixels)
        return centres


def require_classes(what: str, spec: InputSpec) -> None:
    """Raises ValueError for a network that is no classifier."""
    if spec.num_classes is None:
        raise ValueError(f"quantize: model must be a classifier, with one output (N, K), for {what}")


def random_labels(job: Job, count: int) -> Tensor:
    """(count,) int64, any class equally often, the same for every source of images of a run."""
    return torch.randint(job.num_classes, (count,), generator=stream(job.seed, "labels")).to(job.device)
