"""Synthetic images as people look at them: pixels, grids and spectra.

Letters: N images, C channels, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.core.spec import InputSpec

GAP = 2
"""Pixels between the images of a grid."""


def to_pixels(images: Tensor, spec: InputSpec) -> np.ndarray:
    """Images in the network's space as bytes to look at.

    Args:
        images: (N, C, H, W), normalised.
        spec: its normalisation is undone; its valid range is what black and white mean, and values outside are
            clipped. Without a valid range each image is stretched between its own extremes.

    Returns:
        (N, H, W, 3) uint8; channels other than three are averaged to grey.
    """
    x = spec.denormalise(images.detach().float().cpu())
    if x.shape[1] != 3:
        x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    low, high = _extremes(x) if spec.valid_range is None else spec.valid_range
    unit = ((x - low) / (high - low)).nan_to_num(0.0)  # an image of one value has no extremes to stretch between
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def outside(images: Tensor, spec: InputSpec) -> float | None:
    """Percentage of values outside the valid range, which no picture can show; None if no range is known."""
    if spec.valid_range is None:
        return None
    x = spec.denormalise(images.detach().float().cpu())
    low, high = spec.valid_range
    return 100 * ((x < low) | (x > high)).float().mean().item()


def some(images: Tensor, labels: Tensor | None, count: int) -> list[int]:
    """Indices of up to ``count`` images to show: one of each class in turn, or the first ones where there are none."""
    return list(range(min(count, len(images)))) if labels is None else one_of_each(labels, count)


def one_of_each(labels: Tensor, count: int) -> list[int]:
    """Indices of up to ``count`` images, in label order: one per class, then a second one per class, and so on."""
    seen: dict[int, int] = {}
    ranked = []
    for index, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], label, index))
    return [index for _, _, index in sorted(ranked)[:count]]


def grid(pixels: np.ndarray, columns: int, largest: int = 128) -> np.ndarray:
    """Images side by side, row after row, with transparent gaps.

    Args:
        pixels: (N, H, W, 3) uint8, N >= 1.
        columns: images per row.
        largest: images with a longer side are shrunk to it (by area).

    Returns:
        (rows, width, 4) uint8, RGBA.
    """
    count, height, width, _ = pixels.shape
    if max(height, width) > largest:
        ratio = largest / max(height, width)
        size = max(1, round(height * ratio)), max(1, round(width * ratio))
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        shrunk = F.interpolate(x, size, mode="area").round().to(torch.uint8)
        pixels, (height, width) = shrunk.permute(0, 2, 3, 1).numpy(), size
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 4), np.uint8)
    for n, image in enumerate(pixels):
        top, left = n // columns * (height + GAP), n % columns * (width + GAP)
        canvas[top : top + height, left : left + width, :3] = image
        canvas[top : top + height, left : left + width, 3] = 255
    return canvas


def radial_spectrum(images: Tensor) -> list[float]:
    """Mean power by frequency: how much of the images is coarse and how much is fine.

    Each channel's mean is taken away first; the transform is orthonormal, so white noise of variance v gives v
    everywhere.

    Args:
        images: (N, C, H, W), N >= 1.

    Returns:
        The power at radius 1, 2, ..., min(H, W) // 2 in whole frequency bins.
    """
    x = images.detach().float().cpu()
    height, width = x.shape[2:]
    x = x - x.mean((2, 3), keepdim=True)
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean((0, 1)).flatten().double()
    v = torch.fft.fftfreq(height, 1 / height)[:, None]
    u = torch.fft.fftfreq(width, 1 / width)[None, :]
    radius = torch.hypot(u, v).round().long().flatten()
    total = torch.bincount(radius, power)
    members = torch.bincount(radius)
    return (total / members.clamp(min=1))[1 : min(height, width) // 2 + 1].tolist()


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
