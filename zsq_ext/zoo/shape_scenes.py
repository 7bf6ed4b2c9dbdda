"""The embedded detection task: scenes of textured shapes, whose boxes are known because they were drawn.

Every scene is a function of (seed, split, index): one to four shapes of many sizes, each with a texture of its own, in
front of a coloured background with clutter. A class is a shape, 8 in all. Nothing is stored and nothing is downloaded;
the three splits draw from disjoint streams of the hash that textured shapes draw from, and none is theirs.

Letters: N images, M objects at most, S image side, W side of the window that one object is drawn in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zsq_ext.core.spec import InputSpec
from zsq_ext.zoo import drawing
from zsq_ext.zoo.drawing import SHAPES, TEXTURES, Draws
from zsq_ext.zoo.textured_shapes import SPLITS

CLASSES = SHAPES
SIZE = 64
OBJECTS = 4
TEST_IMAGES = 1_000

WINDOW = 40  # no pose makes an object longer
SCALES = (0.30, 0.66)  # radii of 6 to 13 pixels
TRIES = 8  # places an object may try
OVERLAP = 0.25  # of the smaller of two boxes, at most

# mean and std measured once over 20,000 training images (seed 0) and rounded
SPEC = InputSpec(
    shape=(3, SIZE, SIZE),
    mean=(0.47, 0.47, 0.47),
    std=(0.25, 0.25, 0.25),
    valid_range=(0.0, 1.0),
    num_classes=len(CLASSES),
)


class Objects(NamedTuple):
    """What is in N images: ``boxes`` (N, M, 4) float32, x0 y0 x1 y1 in pixels, and ``labels`` (N, M) int64.

    A place without an object has label -1. An object's box holds all of it, also what a later object covers.
    """

    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ShapeScenes:
    """One split of the task.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``. Decisions are taken on ``val``; ``test`` only reports.
        seed: another seed is another data set of the same kind. The shipped detector was trained on seed 0.
    """

    split: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"ShapeScenes: split must be one of {sorted(SPLITS)}, got {self.split!r}")

    def pixels(self, indices: np.ndarray | range) -> tuple[Tensor, Objects]:
        """Draws scenes as bytes: (N, 3, 64, 64) uint8, and what is in them."""
        index = np.asarray(indices, dtype=np.uint64)
        image, boxes, labels = _render(self.seed, SPLITS[self.split], index)
        return torch.from_numpy(image), Objects(torch.from_numpy(boxes), torch.from_numpy(labels))

    def images(self, indices: np.ndarray | range) -> tuple[Tensor, Objects]:
        """Draws scenes in the network's space: (N, 3, 64, 64) float32, and what is in them."""
        pixels, objects = self.pixels(indices)
        return SPEC.normalise(pixels.float().div_(255)), objects

    def batches(self, count: int, batch_size: int = 250) -> Iterator[tuple[Tensor, Objects]]:
        """The first ``count`` scenes of the split, in order, in the network's space."""
        for start in range(0, count, batch_size):
            yield self.images(range(start, min(start + batch_size, count)))


def _render(seed: int, split: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws scenes: (N, 3, S, S) uint8, boxes (N, M, 4) float32, labels (N, M) int64."""
    scene = Draws(seed, split, index, "scene")
    x, y = drawing.plane(SIZE)
    ground = scene.vector("ground", 3, 0.1, 0.9)
    # a margin all around, because the window of an object near the border reaches beyond it
    canvas = np.zeros((len(index), 3, SIZE + 2 * WINDOW, SIZE + 2 * WINDOW), np.float32)
    inside = np.s_[:, :, WINDOW : WINDOW + SIZE, WINDOW : WINDOW + SIZE]
    canvas[inside] = drawing.background(scene, x, y, ground)
    wanted = scene.uniform("objects", 1, OBJECTS + 1).astype(np.int64)[:, 0, 0]
    boxes = np.zeros((len(index), OBJECTS, 4), np.int64)
    labels = np.full((len(index), OBJECTS), -1)
    for slot in range(OBJECTS):
        n = np.flatnonzero(slot < wanted)
        draw = Draws(seed, split, index[n] * np.uint64(OBJECTS) + np.uint64(slot), "object")
        shape = draw.uniform("shape", 0, len(SHAPES)).astype(np.int64)[:, 0, 0]
        body, cover = _object(draw, shape, ground[n])
        box = _extent(cover)
        corner, fits = _place(draw, box, boxes[n, :slot])
        _paste(canvas, n[fits], body[fits], cover[fits], (corner - box[:, :2] + WINDOW)[fits])
        boxes[n, slot] = np.concatenate([corner, corner + box[:, 2:] - box[:, :2]], 1) * fits[:, None]
        labels[n, slot] = np.where(fits, shape, -1)
    return drawing.expose(scene, x, y, canvas[inside]), boxes.astype(np.float32), labels


def _object(draw: Draws, shape: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One object in the middle of its window: colours (N, 3, W, W) and coverage (N, W, W)."""
    x, y = drawing.plane(WINDOW)
    half_a_pixel = 1 / WINDOW
    u, v, scale = drawing.pose(draw, x, y, SCALES, half_a_pixel)
    cover = drawing.coverage(drawing.by_class(drawing.SHAPE_DISTANCES, shape, u, v), scale)
    texture = draw.uniform("texture", 0, len(TEXTURES)).astype(np.int64)[:, 0, 0]
    pattern = drawing.texture(draw, texture, u, v)
    paint = drawing.apart(draw.vector("paint", 3, 0.1, 0.9), ground)
    ink = drawing.ink_on(draw, paint)
    return paint + (ink - paint) * pattern[:, None], cover


def _extent(cover: np.ndarray) -> np.ndarray:
    """The box (N, 4) int64, x0 y0 x1 y1, around all pixels that are covered by half or more."""
    solid = cover >= 0.5
    ends = []
    for axis in (1, 2):  # which columns, which rows
        lines = np.any(solid, axis)
        ends.append((lines.argmax(1), WINDOW - lines[:, ::-1].argmax(1)))
    (x0, x1), (y0, y1) = ends
    return np.stack([x0, y0, x1, y1], 1)


def _place(draw: Draws, box: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of a few random places that leaves the others in sight.

    Returns:
        The box's upper left corner (N, 2) int64, x and y, anywhere in the image; and whether there was such a place.
    """
    size = box[:, 2:] - box[:, :2]
    corner = np.zeros_like(size)
    found = np.zeros(len(box), bool)
    places = draw.vector("place", 2 * TRIES)[:, :, 0, 0].reshape(-1, TRIES, 2)
    for attempt in range(TRIES):
        at = (places[:, attempt] * (SIZE - size + 1)).astype(np.int64)
        low = np.maximum(at[:, None], others[..., :2])
        high = np.minimum((at + size)[:, None], others[..., 2:])
        shared = np.clip(high - low, 0, None).prod(-1)  # (N, M)
        smaller = np.minimum(size.prod(-1)[:, None], (others[..., 2:] - others[..., :2]).prod(-1))
        free = (shared <= OVERLAP * smaller).all(1)
        corner[free & ~found] = at[free & ~found]
        found |= free
    return corner, found


def _paste(canvas: np.ndarray, n: np.ndarray, body: np.ndarray, cover: np.ndarray, corner: np.ndarray) -> None:
    """Blends windows into images ``n`` of the canvas, each with its upper left corner (N, 2), x and y, at its place."""
    step = np.arange(WINDOW)
    columns = (corner[:, 0, None] + step)[:, None, :]
    rows = (corner[:, 1, None] + step)[:, :, None]
    for channel in range(canvas.shape[1]):
        place = n[:, None, None], channel, rows, columns
        canvas[place] += (body[:, channel] - canvas[place]) * cover
