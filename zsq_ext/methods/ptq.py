"""Post-training quantization: reconstruction (BRECQ, Genie-M, AdaRound), data-free rewriting (DFQ), or ranges alone.

Each is one way to use images, whatever made them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from zsq_ext.core.check import require
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.job import Images, Job, Outcome
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import calibrating
from zsq_ext.quant.prepare import plan, prepare
from zsq_ext.tune.dfq import DfqConfig, check_ranges, dfq
from zsq_ext.tune.reconstruct import reconstruct
from zsq_ext.tune.reconstruct_config import ReconstructConfig


@dataclass(frozen=True)
class Reconstruction:
    """Block or layer reconstruction on the images; activation ranges are found unit by unit on the way."""

    config: ReconstructConfig = field(default_factory=ReconstructConfig)

    def qconfig(self, qconfig: QConfig) -> QConfig:
        """The same bits and places with ranges that reconstruction can work with: L2.4 searches, held still."""
        return replace(qconfig, w_range="lp", a_range="lp")

    def check(self, teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig) -> None:
        """Refuses what cannot be run, before any work begins.

        Raises:
            ValueError: the weight ranges would follow the live weights.
        """
        require("Reconstruction", "w_range", qconfig.w_range, qconfig.w_range == "lp", "be 'lp', which stands still")
        plan(teacher, qconfig)

    def run(self, job: Job, images: Images) -> Outcome:
        """Prepares the student and reconstructs it unit by unit."""
        self.check(job.teacher, job.spec, job.qconfig)
        student = prepare(job.teacher, job.qconfig)
        found = reconstruct(job.stage("reconstruct"), job.teacher, student, images.images, self.config)
        evaluations = [] if job.evaluate is None else [{"epoch": 1, **job.evaluate(student)}]
        histories = {"images": images.history, "tuning": found.history, "blocks": found.blocks}
        return Outcome(student, images, histories, evaluations)


@dataclass(frozen=True)
class RangesOnly:
    """Nothing is tuned: every weight goes to its nearest code, activation ranges come from the first images."""

    batch: int = 64
    batches: int = 8

    def __post_init__(self) -> None:
        for name in ("batch", "batches"):
            require("RangesOnly", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")

    def check(self, teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig) -> None:
        """Refuses what cannot be run, before any work begins."""
        plan(teacher, qconfig)

    def run(self, job: Job, images: Images) -> Outcome:
        """Prepares the student and shows it the images."""
        student = prepare(job.teacher, job.qconfig)
        with calibrating(student), torch.no_grad():
            for batch in images.images[: self.batch * self.batches].split(self.batch):
                student(batch.contiguous(memory_format=torch.channels_last))
        evaluations = [] if job.evaluate is None else [{"epoch": 0, **job.evaluate(student)}]
        return Outcome(student, images, {"images": images.history}, evaluations)


RANGES = ("batch_norms", "images")


@dataclass(frozen=True)
class Dfq:
    """Weight equalisation and bias correction, which need no images; activation ranges from the batch norms."""

    config: DfqConfig = field(default_factory=DfqConfig)
    ranges: str = "batch_norms"  # or "images", for networks whose batch norms do not tell every range
    batch: int = 64
    batches: int = 8

    def __post_init__(self) -> None:
        require("Dfq", "ranges", self.ranges, self.ranges in RANGES, f"be one of {', '.join(RANGES)}")
        for name in ("batch", "batches"):
            require("Dfq", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")

    def check(self, teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig) -> None:
        """Refuses what cannot be run, before any work begins.

        Raises:
            ValueError: ranges should come from the batch norms, and they do not tell them all.
        """
        plan(teacher, qconfig)
        if self.ranges == "batch_norms":
            check_ranges(teacher, qconfig)

    def run(self, job: Job, images: Images) -> Outcome:
        """Rewrites and quantizes; the images serve the ranges, if that is asked for."""
        self.check(job.teacher, job.spec, job.qconfig)
        shown = ()
        if self.ranges == "images":
            first = images.images[: self.batch * self.batches]
            shown = tuple(b.contiguous(memory_format=torch.channels_last) for b in first.split(self.batch))
        student = dfq(job.teacher, job.qconfig, self.config, images=shown, image_range=image_range(job.spec))
        evaluations = [] if job.evaluate is None else [{"epoch": 0, **job.evaluate(student)}]
        return Outcome(student, images, {"images": images.history}, evaluations)


def image_range(spec: InputSpec) -> tuple[float, float] | None:
    """The least and the largest value of an image in the network's normalised space, if the input says so."""
    if spec.valid_range is None:
        return None
    low, high = spec.valid_range
    ends = [((low - mean) / std, (high - mean) / std) for mean, std in zip(spec.mean, spec.std, strict=True)]
    return min(lo for lo, _ in ends), max(hi for _, hi in ends)
