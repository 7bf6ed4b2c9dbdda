"""Fine-tuning by distillation: what the ZeroQ, GDFQ, HAST and SynQ lineage does with its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.core.rng import stream
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.images import require_classes
from zsq_ext.methods.job import Images, Job, Outcome
from zsq_ext.methods.recipe import ImageSource, images_of
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.fuse import fuse
from zsq_ext.quant.modules import RangeTrace, activation_quantizers, calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.synth.filters import LowPass as LowPassFilter
from zsq_ext.synth.generate import GeneratorConfig, GeneratorTrainer, train_generator
from zsq_ext.synth.teacher import Teacher
from zsq_ext.tune.distill import DistillConfig, Distiller
from zsq_ext.tune.finetune import TuneConfig, Tuned, finetune
from zsq_ext.tune.ideas import Agm, LowPass, Mix
from zsq_ext.tune.mix import Mixer

RANGES = ("generator", "images")


@dataclass(frozen=True)
class Qat:
    """Activation ranges, then distillation. Defaults are SynQ's released ones for ImageNet (spec: section 3)."""

    a_range: ClassVar[str] = "ema"
    w_range: ClassVar[str] = "minmax"

    ranges: str = "generator"  # as released; "images" uses the (filtered) images themselves
    range_steps: int = 40  # of range_batch images each
    range_batch: int = 64
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    generator_steps: int = 800  # 4 epochs of 200, a batch of the generator each
    distill: DistillConfig = field(default_factory=DistillConfig)
    finetune: TuneConfig = field(default_factory=TuneConfig)

    def __post_init__(self) -> None:
        require("Qat", "ranges", self.ranges, self.ranges in RANGES, f"be one of {', '.join(RANGES)}")
        for name in ("range_steps", "range_batch", "generator_steps"):
            require("Qat", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")

    @property
    def title(self) -> str:
        return "fine-tuning" if self.finetune.epochs > 0 else "ranges alone"

    def check(self, teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig, source: ImageSource | None) -> None:
        if source is not None:
            source.check(teacher, spec)
        if self.finetune.epochs > 0 or self.ranges == "generator":
            require_classes("fine-tuning by distillation (tune='qat')", spec)
        if self.ranges == "generator" and qconfig.a_bits is not None and source is not None:
            self.generator.check(spec.shape, otherwise="; ranges='images' takes any")
        if self.distill.find(Agm) is not None:
            raise ValueError("quantize: ideas must not hold Agm where images stand still: it moves a generator")
        if self.finetune.epochs > 0:
            Distiller(teacher, teacher, self.distill)

    def run(self, job: Job, source: ImageSource) -> Outcome:
        """SynQ's Algorithm 1 from line 2 on; without its ideas, the lineage's."""
        images = images_of(job, source)
        filtered = images
        filter_once = self.low_pass(job, "once")
        if filter_once is not None:  # line 2, the first idea; the released code filters every batch instead
            filtered = replace(images, images=filter_once(images.images))
        student = prepare(job.teacher, job.qconfig)  # line 3: round the teacher to the bits that are asked for
        ranges = self.calibrate(job, student, filtered.images)
        if self.finetune.epochs == 0:
            return Outcome(student, images, {**ranges, "tuning": []})
        tuned = self.tune(job, student, filtered)  # lines 4-9: KD + CE on easy samples + CAM alignment (eq. 6)
        return Outcome(student, images, {**ranges, "tuning": tuned.history}, tuned.evaluations, self.finetune.epochs)

    def low_pass(self, job: Job, when: str) -> Callable[[Tensor], Tensor] | None:
        """The low-pass filter, if it is switched on for that moment (``"once"`` or ``"step"``)."""
        idea = self.distill.find(LowPass)
        if idea is None or idea.when != when:
            return None
        return LowPassFilter(job.spec.shape[1:], idea.d0).to(job.device)

    def calibrate(self, job: Job, student: fx.GraphModule, images: Tensor) -> dict[str, list[dict]]:
        """Finds the activation ranges, from the images or from a generator trained on the way (as released).

        Returns:
            Histories: ``"ranges"``, the generator's losses, and ``"calibration"``, the ranges by batch; empty where
            there is no generator and no activation quantizer.
        """
        if not activation_quantizers(student):
            return {"ranges": [], "calibration": []}
        # with the student's own quantizers, whose ranges come from the reads that make their values
        fused = fuse(student)
        with calibrating(student):
            if self.ranges == "generator" and job.given is None:  # given images are better than a generator's
                trace = RangeTrace(student, self.generator_steps)

                def observe(batch: Tensor) -> None:
                    with torch.no_grad():
                        fused(batch)
                    trace.record()

                buffers = {name: b for name, b in student.named_buffers() if name.startswith("quantizers.")}
                losses = train_generator(
                    GeneratorTrainer(job.stage("ranges"), job.num_classes, job.spec.shape, self.generator, job.device),
                    Teacher(job.teacher),
                    self.generator_steps,
                    on_images=observe,
                    extra_state={**buffers, "trace": trace.rows},
                )
                return {"ranges": losses, "calibration": trace.history()}
            return {"ranges": [], "calibration": self._observe_images(job, student, fused, images)}

    @torch.no_grad()
    def _observe_images(self, job: Job, student: fx.GraphModule, fused: fx.GraphModule, images: Tensor) -> list[dict]:
        trace = RangeTrace(student, self.range_steps)
        filter_images = self.low_pass(job, "step")
        size = min(self.range_batch, len(images))
        with job.progress.stage("ranges", self.range_steps) as stage:
            for n in range(self.range_steps):
                draw = torch.randint(len(images), (size,), generator=stream(job.seed, "ranges", n))
                batch = images[draw.to(job.device)]
                if filter_images is not None:
                    batch = filter_images(batch)
                fused(batch.contiguous(memory_format=torch.channels_last))
                trace.record()
                stage.advance()
        return trace.history()

    def tune(self, job: Job, student: fx.GraphModule, images: Images) -> Tuned:
        """The student learns the teacher's answers on the images."""
        stage, loss = job.stage("tuning"), Distiller(job.teacher, student, self.distill)
        mix = self.distill.find(Mix)
        return finetune(
            stage,
            student,
            images.images,
            images.the_labels(),
            loss,
            self.finetune,
            filter_batch=self.low_pass(job, "step"),
            mix=None if mix is None else Mixer(mix, stage, loss.ask),
            evaluate=job.evaluate,
        )
