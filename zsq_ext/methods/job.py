"""What a method is given and what it gives back, whichever method it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from zsq_ext.core.progress import Progress
from zsq_ext.core.run import Run
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import Stage
from zsq_ext.quant.config import QConfig


@dataclass(frozen=True)
class Job:
    """What a method is given: the captured teacher, what is asked for, and where to work."""

    run: Run
    teacher: fx.GraphModule
    spec: InputSpec
    qconfig: QConfig
    seed: int
    progress: Progress
    evaluate: Callable[[fx.GraphModule], dict[str, Any]] | None = None
    given: Images | None = None  # used instead of making images

    def stage(self, name: str) -> Stage:
        """A named part of the run."""
        return Stage(self.run, name, self.seed, self.progress)

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes or 0  # the front door fills it in


@dataclass(frozen=True)
class Images:
    """An image set: the part that tunes and the part held out from tuning, (N, C, H, W) and (N,)."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    history: list[dict] = field(default_factory=list)

    def to(self, device: torch.device) -> Images:
        """The same set on another device."""
        images, labels, held_out = self.images.to(device), self.labels.to(device), self.held_out.to(device)
        return Images(images, labels, held_out, self.held_out_labels.to(device), self.history)

    def tensors(self) -> dict[str, Tensor]:
        """What a file of images holds."""
        names = ("images", "labels", "held_out", "held_out_labels")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Outcome:
    """What a method returns.

    ``histories`` are rows by stage, ``evaluations`` the accuracy by epoch where the job could measure it, ``epochs``
    how many there were: 0 for a network that was not tuned.
    """

    student: fx.GraphModule
    images: Images
    histories: dict[str, list[dict]]
    evaluations: list[dict]
    epochs: int


def hold_out(images: Tensor, labels: Tensor, count: int, history: list[dict] | None = None) -> Images:
    """Splits the last ``count`` images off."""
    cut = len(images) - count
    return Images(images[:cut], labels[:cut], images[cut:], labels[cut:], history or [])
