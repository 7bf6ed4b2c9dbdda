"""Images that a generator draws once it knows what the teacher was trained on: GDFQ's family, on its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from zsq_ext.core.check import require
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import end_stage
from zsq_ext.methods.images import require_classes
from zsq_ext.methods.job import Images, Job, hold_out
from zsq_ext.synth.generate import EntropyBand, GeneratorConfig, GeneratorTrainer, train_generator
from zsq_ext.synth.teacher import Teacher


@dataclass(frozen=True)
class GeneratedImages:
    """A generator learns from the teacher, then draws labelled images.

    The published methods let it learn beside the student and show every batch once. Made this way the images serve any
    tuning. Defaults are GDFQ's for ImageNet.
    """

    images: int = 5120  # ours: as many as the noise-optimised methods make
    held_out: int = 256  # drawn on top, for the label-free quality
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    steps: int = 80_000  # 400 epochs of 200
    band: EntropyBand | None = None  # AdaSG's and AdaDFQ's terms, which need a student to disagree with

    def __post_init__(self) -> None:
        for name in ("images", "steps"):
            require("GeneratedImages", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        require("GeneratedImages", "held_out", self.held_out, self.held_out >= 0, "be at least 0")
        learns = self.band is not None or self.generator.ce + self.generator.bns > 0
        require("GeneratedImages", "generator.bns", self.generator.bns, learns, "be positive where ce is 0")

    def check(self, teacher: fx.GraphModule, spec: InputSpec) -> None:
        """Refuses, before any work begins, what images cannot be made for on their own.

        Raises:
            ValueError: as ``check_network``, or the generator is to learn from a student.
        """
        self.check_network(teacher, spec)
        rule = "be None where images are made on their own (the generator learns from the quantized network)"
        require("GeneratedImages", "band", self.band, self.band is None, rule)

    def check_network(self, teacher: fx.GraphModule, spec: InputSpec) -> None:
        """Refuses a network or an input that the generator cannot make images for, whatever it learns from.

        Raises:
            ValueError: no classifier, no batch norms, or a size that is no multiple of 4.
        """
        require_classes("a generator", spec)
        Teacher(teacher)  # refuses a network without statistics
        self.generator.check(spec.shape)

    def make(self, job: Job) -> Images:
        """Trains the generator by CE + BNS and draws all images from it, those held out too."""
        self.check(job.teacher, job.spec)
        stage = job.stage("images").part(0, 1)
        held = stage.run.load(stage.name)
        if held is not None:
            tensors, info = held
            images, labels = (tensors[name].to(job.device) for name in ("images", "labels"))
            return hold_out(images, labels, self.held_out, info["history"])
        trainer = GeneratorTrainer(stage, job.num_classes, job.spec.shape, self.generator, job.device)
        history = train_generator(trainer, Teacher(job.teacher), self.steps)
        images, labels = trainer.sample(self.images + self.held_out)
        stage.run.save(stage.name, {"images": images, "labels": labels}, {"history": history})
        end_stage(stage)
        return hold_out(images, labels, self.held_out, history)
