"""Random resized crop and flip for a whole batch at once, differentiable, on the images' device.

Every image gets its own crop. `zsq_ext.ops.resize_crops` cuts, resizes and flips them all in one read; compared with a
`grid_sample` its backward pass is deterministic (no scattered additions) and a full-size crop is exact.

Sampling convention, that of torchvision's `resized_crop` on tensors without antialiasing
(`align_corners=False`): output pixel o of `size` reads the crop at (o + 1/2) * extent / size - 1/2, clamped
to the crop, so no pixel outside the crop is ever read.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zsq_ext import ops

ATTEMPTS = 10
"""Draws per image before the central fallback crop, as in torchvision."""


class Crops(NamedTuple):
    """One crop per image, each field of shape (B,): whole pixels as int64, and flip as bool."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor


def draw_crops(
    batch: int,
    size: tuple[int, int],
    generator: torch.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Crops:
    """Crop parameters distributed as those of torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Up to ten times, area = H W * U(scale) and aspect = exp(U(log ratio)) give

        width = round(sqrt(area * aspect)),     height = round(sqrt(area / aspect))

    and the first pair that fits the image is placed uniformly. If none fits, the central crop of the nearest allowed
    aspect is taken. All attempts are drawn at once, so there is no loop and nothing is read back to the host.

    Args:
        batch: B, number of images.
        size: (H, W) of the images.
        generator: the stream to draw from; the result lies on its device.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.
        flip: probability of a horizontal flip.

    Returns:
        The crops, on the generator's device.

    Raises:
        ValueError: scale or ratio not positive and ascending, scale above 1, or flip not a probability.

    Source: torchvision's documented definition of RandomResizedCrop.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"draw_crops: scale must be ascending within (0, 1], got {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"draw_crops: ratio must be positive and ascending, got {ratio}")
    if not 0 <= flip <= 1:
        raise ValueError(f"draw_crops: flip must be a probability, got {flip}")
    full_height, full_width = size
    draws = torch.rand((batch, 2 * ATTEMPTS + 3), generator=generator, device=generator.device)
    area = full_height * full_width * (scale[0] + (scale[1] - scale[0]) * draws[:, :ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS])
    width = torch.round(torch.sqrt(area * aspect)).long()
    height = torch.round(torch.sqrt(area / aspect)).long()

    fits = (width > 0) & (width <= full_width) & (height > 0) & (height <= full_height)
    # argmax of booleans as integers is the first attempt that fits
    first = fits.byte().argmax(1, keepdim=True)
    any_fits = fits.any(1)
    central_height, central_width = _central_crop(full_height, full_width, ratio)
    height = torch.where(any_fits, height.gather(1, first)[:, 0], central_height)
    width = torch.where(any_fits, width.gather(1, first)[:, 0], central_width)

    free_rows, free_columns = full_height - height, full_width - width
    top = torch.where(any_fits, _uniform_integer(draws[:, -3], free_rows), free_rows // 2)
    left = torch.where(any_fits, _uniform_integer(draws[:, -2], free_columns), free_columns // 2)
    return Crops(top, left, height, width, draws[:, -1] < flip)


def resize_crops(x: Tensor, crops: Crops, size: tuple[int, int] | None = None) -> Tensor:
    """Cut one crop per image, resize it bilinearly and flip it where asked: `zsq_ext.ops.resize_crops`.

    Args:
        x: images (B, C, H, W), floating point. A NaN or infinite pixel reaches the pixels that read it, and no other.
        crops: from `draw_crops`, or made by hand; moved to x's device.
        size: (H_out, W_out); None keeps (H, W).

    Returns:
        (B, C, H_out, W_out) in x's dtype and memory format, differentiable in x. Computed in fp32 or wider.

    Raises:
        ValueError: x not (B, C, H, W), or crops for another number of images.
    """
    if x.ndim != 4 or crops.top.shape != x.shape[:1]:
        raise ValueError(
            f"resize_crops: x must be (B, C, H, W) with B = {crops.top.shape[0]} crops, got shape {tuple(x.shape)}"
        )
    here = Crops(*(field.to(x.device, non_blocking=True) for field in crops))
    return ops.resize_crops(x, *here, (x.shape[2], x.shape[3]) if size is None else size)


def random_resized_crop_flip(
    x: Tensor,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """A random resized crop and horizontal flip of every image, each with its own draw.

    Args:
        x: images (B, C, H, W), floating point.
        generator: the stream to draw from. On x's device nothing crosses to the host; a CPU generator works
            for images anywhere and draws the same crops on every machine.
        scale, ratio, flip: as for `draw_crops`. Published: 0.5 to 1 while tuning and for IntraQ's images, 0.4
            to 1 for HAST's and SynQ's ImageNet images.
        size: (H_out, W_out); None keeps the size.

    Returns:
        The augmented images, in x's dtype, differentiable in x.

    Raises:
        ValueError: as for `draw_crops` and `resize_crops`.

    Example:
        >>> x = torch.arange(16.0).view(1, 1, 4, 4)
        >>> same = random_resized_crop_flip(x, torch.Generator(), scale=(1, 1), ratio=(1, 1), flip=0)
        >>> torch.equal(same, x)
        True

    Source: the augmentation of IntraQ, HAST and SynQ.
    """
    if x.ndim != 4:
        raise ValueError(f"random_resized_crop_flip: x must be (B, C, H, W), got shape {tuple(x.shape)}")
    crops = draw_crops(x.shape[0], (x.shape[2], x.shape[3]), generator, scale, ratio, flip)
    return resize_crops(x, crops, size)


def _central_crop(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """(height, width) of the largest crop whose aspect lies within ratio."""
    aspect = width / height
    if aspect < ratio[0]:
        return round(width / ratio[0]), width
    if aspect > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def _uniform_integer(draw: Tensor, largest: Tensor) -> Tensor:
    """0 .. largest from a uniform draw in [0, 1); the product may round up to largest + 1."""
    return (draw * (largest + 1)).long().minimum(largest)
