"""What a method is given and what it gives back, whichever method it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.core.progress import Progress
from zsq_ext.core.run import Run
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import Stage
from zsq_ext.quant.config import QConfig


@dataclass(frozen=True)
class Job:
    """What a method is given: the captured teacher, what is asked for, and where to work.

    Raises:
        ValueError: ``spec`` describes another input than the teacher was captured with.
    """

    run: Run
    teacher: fx.GraphModule
    spec: InputSpec
    qconfig: QConfig
    seed: int
    progress: Progress
    evaluate: Callable[[fx.GraphModule], dict[str, Any]] | None = None
    given: Images | None = None  # used instead of making images

    def __post_init__(self) -> None:
        entry = next(node for node in self.teacher.graph.nodes if node.op == "placeholder")
        shape = tuple(entry.meta["val"].shape[1:])
        holds = self.spec.shape == shape
        require("Job", "spec.shape", self.spec.shape, holds, f"be {shape} as the captured model's input")

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

    def unused(self) -> Images:
        """The same set where nothing was tuned on it: all that there is to judge by is what was not made for tuning."""
        judges, labels = self.held_out, self.held_out_labels
        if len(judges) == 0:
            judges, labels = self.images[:256], None if self.labels is None else self.labels[:256]
        return Images(self.images[:0], None if self.labels is None else self.labels[:0], judges, labels, self.history)

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
    how many there were: 0 for a network that was not trained by epochs. ``reference`` is the float network whose layers
    the student rounds, where that is not the teacher.
    """

    student: fx.GraphModule
    images: Images
    histories: dict[str, list[dict]]
    evaluations: list[dict] = field(default_factory=list)
    epochs: int = 0
    reference: fx.GraphModule | None = None


def hold_out(images: Tensor, labels: Tensor | None, count: int, history: list[dict] | None = None) -> Images:
    """Splits the last ``count`` images off."""
    cut = len(images) - count
    known, others = (None, None) if labels is None else (labels[:cut], labels[cut:])
    return Images(images[:cut], known, images[cut:], others, history or [])


@torch.no_grad()
def predictions(classifier: fx.GraphModule, images: Tensor, batch: int = 256) -> Tensor:
    """The class that a classifier finds in every image, (N,) int64, read ``batch`` at a time."""
    return torch.cat([classifier(chunk).argmax(1) for chunk in images.split(batch)])
