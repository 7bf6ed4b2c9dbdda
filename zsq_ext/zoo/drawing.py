"""Drawing by formula: shapes, textures, backgrounds and light, posed and coloured by a counter-based hash.

What the embedded tasks share. Every picture is a function of numbers that are drawn by name, and of nothing else.

Letters: N images, S side of a map, one float32 array (N, S, S) per map. The plane's unit is half a map's side.
"""

from __future__ import annotations

import numpy as np

SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "bars")
TEXTURES = ("plain", "stripes", "checks", "dots", "rings")


class Draws:
    """Numbers per image by name: a hash of (task, seed, split, image index, name, lane), so that order plays no part.

    Only the first eight letters of a name count.
    """

    def __init__(self, seed: int, split: int, index: np.ndarray, task: str = "") -> None:
        with np.errstate(over="ignore"):
            key = _mix(np.array([seed], np.uint64) * np.uint64(3) + np.uint64(split))
            key = _mix(key + _tag(task)) if task else key
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
        with np.errstate(over="ignore"):
            lane = _mix(_tag(name) + np.arange(lanes, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
            return _mix(self._per_image[:, None] + lane[None])  # (N, lanes)

    @staticmethod
    def _floats(bits: np.ndarray, low: float, high: float) -> np.ndarray:
        unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return np.float32(low) + np.float32(high - low) * unit


def _tag(name: str) -> np.ndarray:
    return np.frombuffer(name.encode().ljust(8, b"\0")[:8], np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that scatters neighbours."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def plane(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixels' centres, (S, S) each, over [-1, 1] x [-1, 1]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def pose(
    draw: Draws, x: np.ndarray, y: np.ndarray, scales: tuple[float, float] = (0.45, 0.82), shift: float = 0.25
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates in the shape's own frame, (N, S, S) each, and its scale: shift, turn, stretch, shear."""
    angle = draw.uniform("angle", -np.pi, np.pi)
    scale = draw.uniform("scale", *scales)
    stretch = np.exp(draw.uniform("stretch", -0.22, 0.22))
    shear = draw.uniform("shear", -0.25, 0.25)
    dx, dy = x - draw.uniform("dx", -shift, shift), y - draw.uniform("dy", -shift, shift)
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = (cos * dx + sin * dy) / scale, (-sin * dx + cos * dy) / scale
    return (u + shear * v) * stretch, v / stretch, scale


def coverage(distance: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Signed distance in shape units to coverage in [0, 1], soft over about one pixel."""
    return np.clip(0.5 - distance * scale * (distance.shape[-1] / 2) / 1.2, 0, 1)


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


SHAPE_DISTANCES = (
    lambda u, v: np.hypot(u, v) - 0.85,
    lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.24,
    lambda u, v: _box(u, v, 0.75, 0.75),
    lambda u, v: _polygon(u, v, 3, 0.5),
    _star,
    lambda u, v: np.minimum(_box(u, v, 0.95, 0.30), _box(u, v, 0.30, 0.95)),
    lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.72 - np.hypot(u - 0.45, v)),
    lambda u, v: np.minimum(_box(u, v + 0.55, 0.9, 0.28), _box(u, v - 0.55, 0.9, 0.28)),
)


def by_class(functions: tuple, which: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Applies functions[which[n]] to image n."""
    out = np.empty_like(u)
    for k, function in enumerate(functions):
        rows = np.flatnonzero(which == k)
        if rows.size:
            out[rows] = function(u[rows], v[rows])
    return out


def texture(draw: Draws, which: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The share of ink at each point, (N, S, S) in [0, 1]; the texture turns and scales with the shape."""
    turn = draw.uniform("grainturn", 0, np.pi)
    pitch = draw.uniform("pitch", 2.2, 3.4) * np.pi
    p = (np.cos(turn) * u + np.sin(turn) * v) * pitch + draw.uniform("phase", 0, 2 * np.pi)
    q = (-np.sin(turn) * u + np.cos(turn) * v) * pitch + draw.uniform("phase2", 0, 2 * np.pi)
    waves = np.empty_like(p)
    for k in range(len(TEXTURES)):
        n = np.flatnonzero(which == k)
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


def apart(colour: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A colour (N, 3, 1, 1) pushed away from another's brightness, in which it could not be seen."""
    gap = colour.mean(axis=1, keepdims=True) - other.mean(axis=1, keepdims=True)
    push = np.where(gap >= 0, 1.0, -1.0).astype(np.float32) * np.clip(0.15 - np.abs(gap), 0, None)
    return np.clip(colour + push, 0, 1)


def ink_on(draw: Draws, paint: np.ndarray) -> np.ndarray:
    """The texture's colour (N, 3, 1, 1): brighter than a dark body, darker than a bright one."""
    away = np.where(paint.mean(axis=1, keepdims=True) > 0.5, -1.0, 1.0).astype(np.float32)
    return np.clip(paint + away * draw.vector("inkcolor", 3, 0.20, 0.65), 0, 1)


def background(draw: Draws, x: np.ndarray, y: np.ndarray, ground: np.ndarray) -> np.ndarray:
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


def occlude(draw: Draws, x: np.ndarray, y: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A bar of random colour, place and direction over part of the image, on three images of five."""
    turn = draw.uniform("occturn", 0, np.pi)
    across = np.cos(turn) * x + np.sin(turn) * y - draw.uniform("occat", -0.8, 0.8)
    width = draw.uniform("occwidth", -0.12, 0.18)  # negative: no bar
    cover = np.clip((width - np.abs(across)) * x.shape[-1] / 2 + 0.5, 0, 1) * (width > 0)
    return image + (draw.vector("occcolor", 3, 0, 1) - image) * cover[:, None]


def light(draw: Draws, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness over the image, (N, S, S): an overall level and a direction the light comes from."""
    turn = draw.uniform("lightturn", -np.pi, np.pi)
    slope = draw.uniform("lightslope", 0.0, 0.35)
    return draw.uniform("light", 0.75, 1.15) * (1 + slope * (np.cos(turn) * x + np.sin(turn) * y))


def expose(draw: Draws, x: np.ndarray, y: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The picture (N, 3, S, S) as a camera would take it, uint8: lit, noisy, rounded to bytes."""
    image = image * light(draw, x, y)[:, None]
    image = image + draw.uniform("noise", 0.03, 0.14)[:, None] * draw.normal("grain", image.shape[1:])
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
