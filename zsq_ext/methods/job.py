"""What a method is given and what it gives back, whichever method it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
        """How many classes there are; 0 for a network that is no classifier."""
        return self.spec.num_classes or 0  # the front door fills it in


@dataclass(frozen=True)
class Images:
    """An image set: the part that tunes and the part held out from tuning, (N, C, H, W) and (N,).

    Labels are None for a network that is no classifier.
    """

    images: Tensor
    labels: Tensor | None
    held_out: Tensor
    held_out_labels: Tensor | None
    history: list[dict] = field(default_factory=list)

    def to(self, device: torch.device) -> Images:
        """The same set on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """What a file of images holds: no labels where there are none."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def the_labels(self) -> Tensor:
        """The labels of the part that tunes.

        Raises:
            ValueError: there are none.
        """
        if self.labels is None:
            raise ValueError("images: labels must be given for fine-tuning, got images without labels")
        return self.labels


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


def hold_out(images: Tensor, labels: Tensor | None, count: int, history: list[dict] | None = None) -> Images:
    """Splits the last ``count`` images off."""
    cut = len(images) - count
    known, others = (None, None) if labels is None else (labels[:cut], labels[cut:])
    return Images(images[:cut], known, images[cut:], others, history or [])


@torch.no_grad()
def predictions(classifier: fx.GraphModule, images: Tensor, batch: int = 256) -> Tensor:
    """The class that a classifier finds in every image, (N,) int64, read ``batch`` at a time."""
    return torch.cat([classifier(chunk).argmax(1) for chunk in images.split(batch)])
