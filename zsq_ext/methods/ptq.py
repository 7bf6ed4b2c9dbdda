"""Post-training quantization: reconstruction (BRECQ, Genie-M, AdaRound) on an image set, whatever made it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from zsq_ext.core.check import require
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.job import Job, Outcome
from zsq_ext.methods.recipe import ImageSource, images_of
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.prepare import plan, prepare
from zsq_ext.tune.reconstruct import reconstruct
from zsq_ext.tune.reconstruct_config import ADAROUND, BRECQ, GENIE_M, ReconstructConfig, reconstruct_config

PUBLISHED = {"BRECQ": BRECQ, "Genie-M": GENIE_M, "AdaRound": ADAROUND}


@dataclass(frozen=True)
class Reconstruction:
    """Block or layer reconstruction on the images; activation ranges are found unit by unit on the way."""

    a_range: ClassVar[str] = "lp"  # searched on the images, and held still while steps are learned
    w_range: ClassVar[str] = "lp"

    config: ReconstructConfig = field(default_factory=ReconstructConfig)

    @property
    def title(self) -> str:
        """Such as ``"block reconstruction (BRECQ)"``; lengths and rates do not change the name."""
        own = self.config.granularity, self.config.joint
        names = [name for name, kind in PUBLISHED.items() if (kind.granularity, kind.joint) == own]
        return f"{self.config.granularity} reconstruction" + "".join(f" ({name})" for name in names)

    def check(self, teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig, source: ImageSource | None) -> None:
        """Refuses what cannot be run, before any work begins.

        Raises:
            ValueError: the weight ranges would follow the live weights.
        """
        if source is not None:
            source.check(teacher, spec)
        require("Reconstruction", "w_range", qconfig.w_range, qconfig.w_range == "lp", "be 'lp', which stands still")
        plan(teacher, qconfig)

    def run(self, job: Job, source: ImageSource) -> Outcome:
        """Prepares the student and reconstructs it unit by unit."""
        images = images_of(job, source)
        student = prepare(job.teacher, job.qconfig)
        found = reconstruct(job.stage("reconstruct"), job.teacher, student, images.images, self.config)
        return Outcome(student, images, {"tuning": found.history, "blocks": found.blocks})


def reconstruction(kind: str, preset: str) -> Reconstruction:
    """A published algorithm (``"brecq"``, ``"genie_m"`` or ``"adaround"``) at the length of a preset."""
    return Reconstruction(reconstruct_config(kind, preset))
