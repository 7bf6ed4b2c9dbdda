"""A method as a value: how its images are made, and how they are used."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import fx

from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.job import Images, Job, Outcome
from zsq_ext.quant.config import QConfig
from zsq_ext.tune.ideas import BY_NAME
from zsq_ext.tune.ideas import to_dict as idea_to_dict


class ImageSource(Protocol):
    """How images are made: a frozen dataclass of hyperparameters.

    ``images`` is how many there are to tune on, ``held_out`` how many more to judge by.
    """

    @property
    def images(self) -> int: ...

    @property
    def held_out(self) -> int: ...

    def check(self, teacher: fx.GraphModule, spec: InputSpec) -> None:
        """Raises ValueError for a network that these images cannot be made from, before any work begins."""

    def make(self, job: Job) -> Images:
        """Makes them, or goes on where the job's run folder stands."""


class Tuning(Protocol):
    """How images are used: a frozen dataclass of hyperparameters.

    ``a_range`` and ``w_range`` are how ranges are found unless told otherwise, see ``QConfig``.
    """

    a_range: ClassVar[str]
    w_range: ClassVar[str]

    @property
    def title(self) -> str:
        """What it does to the network, in words for a report."""

    def check(self, teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig, source: ImageSource | None) -> None:
        """Raises ValueError for what cannot work, the source's images too, before any work begins.

        No source: the images are the user's.
        """

    def run(self, job: Job, source: ImageSource) -> Outcome:
        """From the teacher to the quantized network: on ``images_of(job, source)``, or on what the source's generator
        makes on the way."""


@dataclass(frozen=True)
class Recipe:
    """Every hyperparameter of a method: ``images`` says how they are made, ``tune`` how they are used.

    Either half can be replaced by any other: ``dataclasses.replace(recipe, tune=...)``.
    """

    images: ImageSource
    tune: Tuning

    def check(self, teacher: fx.GraphModule, spec: InputSpec, qconfig: QConfig, given: bool) -> None:
        """Raises ValueError for what would otherwise be noticed only after the images were made."""
        self.tune.check(teacher, spec, qconfig, None if given else self.images)

    def run(self, job: Job) -> Outcome:
        """All of it; images that the job brings are used instead of making any."""
        outcome = self.tune.run(job, self.images)
        return replace(outcome, histories={"images": outcome.images.history, **outcome.histories})

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for a run's configuration; each half says what it is."""
        return {name: {"kind": type(half).__name__, **_plain(half)} for name, half in vars(self).items()}


def images_of(job: Job, source: ImageSource) -> Images:
    """The images to tune on: those that the job brings, or the source's."""
    return job.given if job.given is not None else source.make(job)


def _plain(value: Any) -> Any:
    if type(value) in BY_NAME.values():
        return idea_to_dict(value)
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
