"""DFQ: Data-Free Quantization Through Weight Equalization and Bias Correction. Nagel et al., arXiv 1906.04721.

The classic baseline: no images are made, the weights are rewritten so that they round well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.images import GaussianImages
from zsq_ext.methods.job import Job, Outcome
from zsq_ext.methods.recipe import ImageSource, Recipe, images_of
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.prepare import plan
from zsq_ext.tune.dfq import DfqConfig, check_ranges, dfq, rewrite

RANGES = ("batch_norms", "images")


@dataclass(frozen=True)
class Dfq:
    """Weight equalisation and bias correction, which need no images; activation ranges from the batch norms."""

    a_range: ClassVar[str] = "ema"
    w_range: ClassVar[str] = "minmax"

    config: DfqConfig = field(default_factory=DfqConfig)
    ranges: str = "batch_norms"  # or "images", for networks whose batch norms do not tell every range
    batch: int = 64
    batches: int = 8

    def __post_init__(self) -> None:
        require("Dfq", "ranges", self.ranges, self.ranges in RANGES, f"be one of {', '.join(RANGES)}")
        for name in ("batch", "batches"):
            require("Dfq", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")

    @property
    def title(self) -> str:
        return "weights equalised, biases corrected"

    def check(self, teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig, source: ImageSource | None) -> None:
        """Refuses what cannot be run, before any work begins.

        Raises:
            ValueError: ranges should come from the batch norms, and they do not tell them all.
        """
        if source is not None:
            source.check(teacher, spec)
        plan(teacher, qconfig)
        if self.ranges == "batch_norms":
            check_ranges(teacher, qconfig)

    def run(self, job: Job, source: ImageSource) -> Outcome:
        """Rewrites and quantizes; images serve the ranges, if that is asked for, and otherwise only to judge by."""
        images = images_of(job, source)
        shown: tuple[Tensor, ...] = ()
        if self.ranges == "images":
            first = images.images[: self.batch * self.batches]
            shown = tuple(b.contiguous(memory_format=torch.channels_last) for b in first.split(self.batch))
        else:
            images = images.unused()
        rewritten = rewrite(job.teacher, self.config)
        student = dfq(
            job.teacher,
            job.qconfig,
            self.config,
            images=shown,
            image_range=image_range(job.spec),
            rewritten=rewritten,
        )
        return Outcome(student, images, {}, reference=rewritten.network)


def config(preset: str, profile: str) -> Recipe:
    """Ranges from the batch norms too; Gaussian noise serves the label-free quality alone."""
    return Recipe(GaussianImages(images=256, held_out=64), Dfq())


def image_range(spec: InputSpec) -> tuple[float, float] | None:
    """The least and the largest value of an image in the network's normalised space, if the input says so."""
    if spec.valid_range is None:
        return None
    low, high = spec.valid_range
    ends = [((low - mean) / std, (high - mean) / std) for mean, std in zip(spec.mean, spec.std, strict=True)]
    return min(lo for lo, _ in ends), max(hi for _, hi in ends)
