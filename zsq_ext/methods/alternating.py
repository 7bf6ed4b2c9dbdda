"""Generator and quantized network trained in turns: what the GDFQ lineage does in place of tuning on a fixed set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import Terms
from zsq_ext.methods.generated import GeneratedImages
from zsq_ext.methods.job import Job, Outcome, hold_out
from zsq_ext.methods.qat import Qat
from zsq_ext.methods.recipe import ImageSource
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.prepare import prepare
from zsq_ext.synth.adversarial import agreement, disagreement, entropy_band
from zsq_ext.synth.drift import Drift, DriftConfig
from zsq_ext.synth.filters import LowPass as LowPassFilter
from zsq_ext.synth.generate import GeneratorTrainer, generator_terms
from zsq_ext.synth.teacher import Context, Teacher
from zsq_ext.tune.alternate import AlternateConfig, Objective, alternate
from zsq_ext.tune.distill import DistillConfig, Distiller
from zsq_ext.tune.ideas import LowPass


@dataclass(frozen=True)
class Alternating:
    """The alternating trainer as a tuning; its images come from the recipe's generator, which it trains on the way."""

    a_range: ClassVar[str] = "ema"
    w_range: ClassVar[str] = "minmax"

    distill: DistillConfig = field(default_factory=DistillConfig)
    train: AlternateConfig = field(default_factory=AlternateConfig)
    drift: DriftConfig | None = field(default_factory=DriftConfig)  # None: nobody looks

    @property
    def title(self) -> str:
        return "fine-tuning in turns with the generator"

    def check(self, teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig, source: ImageSource | None) -> None:
        """Refuses what cannot be trained, before any work begins.

        Raises:
            ValueError: images were given, the recipe's come from no generator, or as ``GeneratedImages.check_network``
                and ``Distiller``.
        """
        if source is None:
            raise ValueError(
                "quantize: images must be left out where a generator makes them on the way, got images; "
                "method='noise' fine-tunes on yours"
            )
        made, train = _generated(source), self.train
        made.check_network(teacher, spec)
        epoch, rule = made.generator.steps_per_epoch, f"be {train.steps_per_epoch}, the student's"
        require("Alternating", "generator.steps_per_epoch", epoch, epoch == train.steps_per_epoch, rule)
        known = made.band is None or train.range_start == 0
        require("Alternating", "range_start", train.range_start, known, "be 0 where the generator sees the student")
        Distiller(teacher, teacher, self.distill)

    def run(self, job: Job, source: ImageSource) -> Outcome:
        """Trains both, then draws the images that are handed back: those of the generator as it ended."""
        made, stage, teacher = _generated(source), job.stage("training"), Teacher(job.teacher)
        student = prepare(job.teacher, job.qconfig)
        generator = GeneratorTrainer(stage, job.num_classes, job.spec.shape, made.generator, job.device)
        idea = self.distill.find(LowPass)
        rounds = self.train.steps_per_epoch
        looks = None if self.drift is None else Drift(job.teacher, generator, self.drift, rounds)
        trained = alternate(
            stage,
            student,
            generator,
            teacher,
            self.objective(made, teacher),
            Distiller(job.teacher, student, self.distill),
            self.train,
            sees_student=made.band is not None,
            drift=looks,
            filter_batch=None if idea is None else LowPassFilter(job.spec.shape[1:], idea.d0).to(job.device),
            evaluate=job.evaluate,
        )
        images, labels = generator.sample(made.images + made.held_out)
        histories = {"tuning": trained.history, "calibration": trained.calibration, "temporal": trained.temporal}
        drawn = hold_out(images, labels, made.held_out)
        return Outcome(student, drawn, histories, trained.evaluations, self.train.epochs)

    @staticmethod
    def objective(made: GeneratedImages, teacher: Teacher) -> Objective:
        """What the generator descends: what the teacher knows of the images, and AdaDFQ's band where it is on."""
        band = made.band

        def objective(seen: Context, student: Tensor | None) -> Terms:
            terms = generator_terms(seen, teacher.target, made.generator)
            if band is not None and student is not None:
                terms["band"] = band.weight * entropy_band(student, seen.logits, band.low, band.high)
                terms["disagreement"] = band.disagreement * disagreement(student, seen.logits, seen.labels)
                terms["agreement"] = band.agreement * agreement(student, seen.logits, seen.labels)
            return terms

        return objective


Distilling = Qat | Alternating
"""The tunings by distillation: those that take ideas."""


def _generated(source: ImageSource) -> GeneratedImages:
    if not isinstance(source, GeneratedImages):
        raise ValueError(f"Alternating: images must come from a generator, got {type(source).__name__}")
    return source
