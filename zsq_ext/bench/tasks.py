"""The embedded tasks: what is drawn, which networks know it, and how a network is measured on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from zsq_ext import api
from zsq_ext.core.spec import InputSpec
from zsq_ext.zoo import average_precision, shape_scenes, teachers, textured_shapes
from zsq_ext.zoo.shape_scenes import ShapeScenes
from zsq_ext.zoo.textured_shapes import TexturedShapes


@dataclass(frozen=True)
class Task:
    """One embedded task.

    Attributes:
        name: such as ``"textured_shapes"``.
        spec: the input of its networks.
        test_images: how many images its test split has.
        split: its ``"train"``, ``"val"`` or ``"test"`` images.
        networks: the names of the networks that ship for it.
        network: one of them by name.
        measure: how one is measured.
        require: refuses, before any work begins, what measuring lacks.
    """

    name: str
    spec: InputSpec
    test_images: int
    split: Callable[[str], TexturedShapes | ShapeScenes]
    networks: tuple[str, ...]
    network: Callable[[str], nn.Module]
    measure: api.Measure
    require: Callable[[], object] = lambda: None


TASKS = {
    task.name: task
    for task in (
        Task(
            "textured_shapes",
            textured_shapes.SPEC,
            textured_shapes.TEST_IMAGES,
            TexturedShapes,
            teachers.NAMES,
            teachers.teacher,
            api.top1,
        ),
        Task(
            "shape_scenes",
            shape_scenes.SPEC,
            shape_scenes.TEST_IMAGES,
            ShapeScenes,
            teachers.DETECTORS,
            teachers.detector,
            average_precision.precision_of,
            average_precision.pycocotools,
        ),
    )
}


def task_of(network: str) -> Task | None:
    """The task that a shipped network knows; None if none of that name ships."""
    return next((task for task in TASKS.values() if network in task.networks), None)


class TestSet:
    """The first images of a task's split, drawn when they are first asked for and kept as bytes."""

    def __init__(
        self,
        count: int | None = None,
        split: str = "test",
        batch: int = 500,
        on_draw: Callable[[], None] = lambda: None,
        task: str = "textured_shapes",
    ) -> None:
        self.task, self.split, self.batch, self._on_draw = TASKS[task], split, batch, on_draw
        self.count = self.task.test_images if count is None else count

    @cached_property
    def _drawn(self) -> tuple[Tensor, Any]:
        self._on_draw()
        return self.task.split(self.split).pixels(range(self.count))

    def __call__(self) -> Iterator[tuple[Tensor, Any]]:
        pixels, truth = self._drawn
        for start in range(0, self.count, self.batch):
            rows = slice(start, start + self.batch)
            yield self.task.spec.normalise(pixels[rows].float().div_(255)), _rows(truth, rows)


def _rows(truth: Any, rows: slice) -> Any:
    """Those rows of labels, or of what is in the images, a tuple of tensors."""
    return truth[rows] if isinstance(truth, Tensor) else type(truth)(*(part[rows] for part in truth))
