"""The embedded task: textured shapes, drawn by formula.

Every image is a function of (seed, split, index): a shape with a texture, posed, lit, partly covered and noisy, in
front of a coloured background with clutter. A class is a pair (shape, texture), 40 in all. Nothing is stored and
nothing is downloaded; the three splits draw from disjoint streams of a counter-based hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from zsq_ext.core.spec import InputSpec
from zsq_ext.zoo import drawing
from zsq_ext.zoo.drawing import SHAPES, TEXTURES, Draws

CLASSES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
SIZE = 32
SPLITS = {"train": 0, "val": 1, "test": 2}
TEST_IMAGES = 10_000

# mean and std measured once over 20,000 training images (seed 0) and rounded
SPEC = InputSpec(
    shape=(3, SIZE, SIZE),
    mean=(0.47, 0.47, 0.47),
    std=(0.255, 0.255, 0.255),
    valid_range=(0.0, 1.0),
    num_classes=len(CLASSES),
)


@dataclass(frozen=True)
class TexturedShapes:
    """One split of the task.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``. Decisions are taken on ``val``; ``test`` only reports.
        seed: another seed is another data set of the same kind. The shipped teachers were trained on seed 0.
    """

    split: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"TexturedShapes: split must be one of {sorted(SPLITS)}, got {self.split!r}")

    def pixels(self, indices: np.ndarray | range) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws images as bytes: (N, 3, 32, 32) uint8 and labels (N,) int64; labels cycle through the classes."""
        index = np.asarray(indices, dtype=np.uint64)
        draw = Draws(self.seed, SPLITS[self.split], index)
        label = (index % len(CLASSES)).astype(np.int64)
        image = _render(draw, label // len(TEXTURES), label % len(TEXTURES))
        return torch.from_numpy(image), torch.from_numpy(label)

    def images(self, indices: np.ndarray | range) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws images in the network's space: (N, 3, 32, 32) float32 and labels (N,) int64."""
        pixels, labels = self.pixels(indices)
        return SPEC.normalise(pixels.float().div_(255)), labels

    def batches(self, count: int, batch_size: int = 500) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The first ``count`` images of the split, in order, in the network's space."""
        for start in range(0, count, batch_size):
            yield self.images(range(start, min(start + batch_size, count)))


def _render(draw: Draws, shape: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Draws the images: (N, 3, 32, 32) uint8. ``shape`` and ``texture`` are (N,) indices into the two name lists."""
    x, y = drawing.plane(SIZE)
    u, v, scale = drawing.pose(draw, x, y)
    cover = drawing.coverage(drawing.by_class(drawing.SHAPE_DISTANCES, shape, u, v), scale)
    pattern = drawing.texture(draw, texture, u, v)

    paint = draw.vector("paint", 3, 0.1, 0.9)
    ink = drawing.ink_on(draw, paint)
    ground = drawing.apart(draw.vector("ground", 3, 0.1, 0.9), paint)
    body = paint + (ink - paint) * pattern[:, None]
    image = drawing.background(draw, x, y, ground)
    image = image + (body - image) * cover[:, None]
    image = drawing.occlude(draw, x, y, image)
    return drawing.expose(draw, x, y, image)
