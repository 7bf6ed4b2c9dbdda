"""The embedded task: textured shapes, drawn by formula.

Every image is a function of (seed, split, index): a shape with a texture, posed, lit, partly covered and noisy, in
front of a coloured background with clutter. A class is a pair (shape, texture), 40 in all. Nothing is stored and
nothing is downloaded; the three splits draw from disjoint streams of a counter-based hash.

Letters: N images, S image side, one float32 array (N, S, S) per map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from zsq_ext.core.spec import InputSpec

SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "bars")
TEXTURES = ("plain", "stripes", "checks", "dots", "rings")
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
        draw = _Draws(self.seed, SPLITS[self.split], index)
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


class _Draws:
    """Numbers per image by name: a hash of (seed, split, image index, name, lane), so that order plays no part."""

    def __init__(self, seed: int, split: int, index: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            key = _mix(np.array([seed], np.uint64) * np.uint64(3) + np.uint64(split))
            self._per_image = _mix(key + _mix(index))  # (N,)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(N, 1, 1) float32 in [low, high)."""
        return self._floats(self._hash(name, 1), low, high)[:, :, None]

    def vector(self, name: str, length: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(N, length, 1, 1) float32 in [low, high)."""
        return self._floats(self._hash(name, length), low, high)[:, :, None, None]

    def normal(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """(N, *shape) float32, zero mean, unit variance: the sum of four 16-bit uniforms, bounded by 3.5 sigma."""
        bits = self._hash(name, int(np.prod(shape))).view(np.uint16).reshape(len(self._per_image), -1, 4)
        total = bits.sum(axis=2, dtype=np.uint32).astype(np.float32)
        return ((total - 2 * 65535.0) / np.float32(65536 / np.sqrt(3.0))).reshape(-1, *shape)

    def _hash(self, name: str, lanes: int) -> np.ndarray:
        tag = np.frombuffer(name.encode().ljust(8, b"\0")[:8], np.uint64)
        with np.errstate(over="ignore"):
            lane = _mix(tag + np.arange(lanes, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
            return _mix(self._per_image[:, None] + lane[None])  # (N, lanes)

    @staticmethod
    def _floats(bits: np.ndarray, low: float, high: float) -> np.ndarray:
        unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return np.float32(low) + np.float32(high - low) * unit


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that scatters neighbours."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _render(draw: _Draws, shape: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Draws the images: (N, 3, S, S) uint8. ``shape`` and ``texture`` are (N,) indices into the two name lists."""
    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")  # the image plane is [-1, 1] x [-1, 1]

    u, v, scale = _pose(draw, x, y)
    cover = _coverage(_by_class(_SHAPE_DISTANCES, shape, u, v), scale)
    pattern = _texture(draw, texture, u, v)

    paint, ink, ground = _colours(draw)
    body = paint + (ink - paint) * pattern[:, None]
    image = _background(draw, x, y, ground)
    image = image + (body - image) * cover[:, None]
    image = _occlude(draw, x, y, image)
    image = image * _light(draw, x, y)[:, None]
    image = image + draw.uniform("noise", 0.03, 0.14)[:, None] * draw.normal("grain", (3, SIZE, SIZE))
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def _pose(draw: _Draws, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates in the shape's own frame, (N, S, S) each, and its scale: shift, turn, stretch, shear."""
    angle = draw.uniform("angle", -np.pi, np.pi)
    scale = draw.uniform("scale", 0.45, 0.82)
    stretch = np.exp(draw.uniform("stretch", -0.22, 0.22))
    shear = draw.uniform("shear", -0.25, 0.25)
    dx, dy = x - draw.uniform("dx", -0.25, 0.25), y - draw.uniform("dy", -0.25, 0.25)
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = (cos * dx + sin * dy) / scale, (-sin * dx + cos * dy) / scale
    return (u + shear * v) * stretch, v / stretch, scale


def _coverage(distance: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Signed distance in shape units to coverage in [0, 1], soft over about one pixel."""
    return np.clip(0.5 - distance * scale * (SIZE / 2) / 1.2, 0, 1)


def _box(u: np.ndarray, v: np.ndarray, half_u: float, half_v: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


def _polygon(u: np.ndarray, v: np.ndarray, sides: int, inner: float) -> np.ndarray:
    """Distance to a regular polygon of circumradius 1."""
    sector = 2 * np.pi / sides
    angle = np.mod(np.arctan2(v, u) + np.pi / 2, sector) - sector / 2
    return np.hypot(u, v) * np.cos(angle) - inner


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A five-pointed star, outer radius 1, inner radius 0.42."""
    half = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(v, u) + np.pi / 2, 2 * half) - half)
    radius = np.hypot(u, v)
    px, py = radius * np.cos(angle) - 0.42, radius * np.sin(angle)  # seen from the inner corner
    tip_x, tip_y = np.cos(half) - 0.42, np.sin(half)
    return (px * tip_y - py * tip_x) / np.hypot(tip_x, tip_y)


_SHAPE_DISTANCES = (
    lambda u, v: np.hypot(u, v) - 0.85,
    lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.24,
    lambda u, v: _box(u, v, 0.75, 0.75),
    lambda u, v: _polygon(u, v, 3, 0.5),
    _star,
    lambda u, v: np.minimum(_box(u, v, 0.95, 0.30), _box(u, v, 0.30, 0.95)),
    lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.72 - np.hypot(u - 0.45, v)),
    lambda u, v: np.minimum(_box(u, v + 0.55, 0.9, 0.28), _box(u, v - 0.55, 0.9, 0.28)),
)


def _by_class(functions: tuple, which: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Applies functions[which[n]] to image n."""
    out = np.empty_like(u)
    for k, function in enumerate(functions):
        rows = np.flatnonzero(which == k)
        if rows.size:
            out[rows] = function(u[rows], v[rows])
    return out


def _texture(draw: _Draws, texture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The share of ink at each point, (N, S, S) in [0, 1]; the texture turns and scales with the shape."""
    turn = draw.uniform("grainturn", 0, np.pi)
    pitch = draw.uniform("pitch", 2.2, 3.4) * np.pi
    p = (np.cos(turn) * u + np.sin(turn) * v) * pitch + draw.uniform("phase", 0, 2 * np.pi)
    q = (-np.sin(turn) * u + np.cos(turn) * v) * pitch + draw.uniform("phase2", 0, 2 * np.pi)
    waves = np.empty_like(p)
    for k in range(len(TEXTURES)):
        n = np.flatnonzero(texture == k)
        if n.size == 0:
            continue
        if k == 0:
            waves[n] = -1
        elif k == 1:
            waves[n] = np.sin(p[n])
        elif k == 2:
            waves[n] = np.sin(p[n]) * np.sin(q[n]) * 2
        elif k == 3:
            waves[n] = (np.cos(p[n]) + np.cos(q[n])) - 0.6
        else:
            waves[n] = np.sin(np.hypot(u[n], v[n]) * pitch[n] * 1.2 + p[n, :1, :1])
    return np.clip(0.5 + 1.5 * waves, 0, 1) * draw.uniform("ink", 0.5, 1.0)


def _colours(draw: _Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Body, ink and background colours (N, 3, 1, 1); the ink is brighter than a dark body, darker than a bright one."""
    paint = draw.vector("paint", 3, 0.1, 0.9)
    ground = draw.vector("ground", 3, 0.1, 0.9)
    away = np.where(paint.mean(axis=1, keepdims=True) > 0.5, -1.0, 1.0).astype(np.float32)
    ink = np.clip(paint + away * draw.vector("inkcolor", 3, 0.20, 0.65), 0, 1)
    # a body of the background's brightness could not be seen: push the background away from it
    gap = ground.mean(axis=1, keepdims=True) - paint.mean(axis=1, keepdims=True)
    push = np.where(gap >= 0, 1.0, -1.0).astype(np.float32) * np.clip(0.15 - np.abs(gap), 0, None)
    return paint, ink, np.clip(ground + push, 0, 1)


def _background(draw: _Draws, x: np.ndarray, y: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """A colour with a ramp, a faint wave and two soft blobs: (N, 3, S, S)."""
    ramp = x * draw.uniform("rampx", -0.15, 0.15) + y * draw.uniform("rampy", -0.15, 0.15)
    turn, pitch = draw.uniform("bgturn", 0, np.pi), draw.uniform("bgpitch", 2.0, 9.0)
    wave = np.sin((np.cos(turn) * x + np.sin(turn) * y) * pitch + draw.uniform("bgphase", 0, 2 * np.pi))
    image = ground + (ramp + draw.uniform("bgwave", 0.0, 0.10) * wave)[:, None]
    for blob in ("a", "b"):
        away = np.hypot(x - draw.uniform(f"blobx{blob}", -1, 1), y - draw.uniform(f"bloby{blob}", -1, 1))
        soft = np.clip(draw.uniform(f"blobr{blob}", 0.15, 0.4) * 4 - away * 4, 0, 1)
        image = image + (draw.vector(f"blobc{blob}", 3, 0, 1) - image) * (soft * 0.6)[:, None]
    return image


def _occlude(draw: _Draws, x: np.ndarray, y: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A bar of random colour, place and direction over part of the image, on three images of five."""
    turn = draw.uniform("occturn", 0, np.pi)
    across = np.cos(turn) * x + np.sin(turn) * y - draw.uniform("occat", -0.8, 0.8)
    width = draw.uniform("occwidth", -0.12, 0.18)  # negative: no bar
    cover = np.clip((width - np.abs(across)) * SIZE / 2 + 0.5, 0, 1) * (width > 0)
    return image + (draw.vector("occcolor", 3, 0, 1) - image) * cover[:, None]


def _light(draw: _Draws, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness over the image, (N, S, S): an overall level and a direction the light comes from."""
    turn = draw.uniform("lightturn", -np.pi, np.pi)
    slope = draw.uniform("lightslope", 0.0, 0.35)
    return draw.uniform("light", 0.75, 1.15) * (1 + slope * (np.cos(turn) * x + np.sin(turn) * y))
