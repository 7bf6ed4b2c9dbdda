"""A single-shot detector for 64 x 64 images, and what turns its raw heads into boxes.

A residual backbone, a feature pyramid (Lin et al. 2017: lateral 1x1 convolutions, nearest-neighbour upsampling,
additions) and, per level, a head of classes and one of boxes. Anchor-free as FCOS (Tian et al. 2019): every cell of a
map says what is around its centre and how far away the four sides are.

Letters: N images, K classes, L levels, P cells of all levels together, M detections of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_ext.core.check import require
from zsq_ext.zoo.small_nets import ConvBlock, ResUnit

STRIDES = (4, 8)
"""Pixels per cell of the maps that carry heads, finest first."""

Heads = dict[str, list[Tensor]]
"""Raw outputs: ``"classes"``, logits (N, K, H_l, W_l), and ``"boxes"``, sides (N, 4, H_l, W_l), one per level."""


class FpnDetector(nn.Module):
    """Three stages, two levels with heads; the third stage gives the levels a wider view.

    Args:
        num_classes: classes of objects.
        in_channels: image channels.

    Input (N, in_channels, H, W), H and W multiples of 16; output the raw ``Heads``, a dict of lists.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.stem = ConvBlock(in_channels, 16, 3, stride=2)
        self.stage1 = nn.Sequential(ResUnit(16, 32, 2), ResUnit(32, 32, 1))
        self.stage2 = nn.Sequential(ResUnit(32, 64, 2), ResUnit(64, 64, 1))
        self.stage3 = ResUnit(64, 64, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, width, 1) for inputs in (32, 64, 64))
        self.smooth = nn.ModuleList(ConvBlock(width, width, 3) for _ in STRIDES)
        self.classes = nn.ModuleList(_head(width, num_classes) for _ in STRIDES)
        self.boxes = nn.ModuleList(_head(width, 4) for _ in STRIDES)

    def forward(self, x: Tensor) -> Heads:
        fine = self.stage1(self.stem(x))
        middle = self.stage2(fine)
        coarse = self.stage3(middle)
        middle = self.lateral[1](middle) + _larger(self.lateral[2](coarse))
        fine = self.lateral[0](fine) + _larger(middle)
        levels = [smooth(level) for smooth, level in zip(self.smooth, (fine, middle), strict=True)]
        return {
            "classes": [head(level) for head, level in zip(self.classes, levels, strict=True)],
            "boxes": [head(level) for head, level in zip(self.boxes, levels, strict=True)],
        }


def _head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvBlock(width, width, 3), nn.Conv2d(width, outputs, 1))


def _larger(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def fpn_small(num_classes: int, in_channels: int = 3) -> FpnDetector:
    """The detector that ships: about 300,000 parameters."""
    return FpnDetector(num_classes, in_channels)


@dataclass(frozen=True)
class Detections:
    """What was found in one image, the surest first: ``boxes`` (M, 4), x0 y0 x1 y1 in pixels, ``scores`` and
    ``labels`` (M,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def cells(heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All levels side by side, nothing decided yet.

    Returns:
        Logits (N, P, K); boxes (N, P, 4), x0 y0 x1 y1 in pixels, differentiable in the heads; the cells' centres
        (P, 2), x and y in pixels; and their strides (P,). A side's distance is softplus(raw) strides, so that no box
        is empty.
    """
    logits, boxes, centres, strides = [], [], [], []
    for score, side, stride in zip(heads["classes"], heads["boxes"], STRIDES, strict=True):
        height, width = score.shape[2:]
        rows, columns = ((torch.arange(n, device=score.device) + 0.5) * stride for n in (height, width))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centre = torch.stack([x.flatten(), y.flatten()], 1)
        away = F.softplus(side.flatten(2).transpose(1, 2)) * stride
        logits.append(score.flatten(2).transpose(1, 2))
        boxes.append(torch.cat([centre - away[..., :2], centre + away[..., 2:]], 2))
        centres.append(centre)
        strides.append(torch.full_like(centre[:, 0], stride))
    return torch.cat(logits, 1), torch.cat(boxes, 1), torch.cat(centres), torch.cat(strides)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., A, 4) with boxes (..., B, 4), x0 y0 x1 y1: (..., A, B)."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b))
    return shared / (area_a[..., :, None] + area_b[..., None, :] - shared).clamp(min=1e-9)


@torch.no_grad()
def decode(
    heads: Heads, image_size: tuple[int, int], *, threshold: float = 0.05, overlap: float = 0.6, limit: int = 100
) -> list[Detections]:
    """From raw heads to detections: scores, then non-maximum suppression within each class.

    Greedy: of boxes of one class that overlap by more than ``overlap`` only the surest stays. A cell may be of several
    classes. Only the ``limit`` surest candidates of an image compete.

    Args:
        heads: what the network returned.
        image_size: (height, width); boxes end at the image's border.
        threshold: candidates have a higher score than this, in [0, 1).
        overlap: intersection over union, in (0, 1].
        limit: candidates per image, >= 1.

    Returns:
        One ``Detections`` per image.

    Raises:
        ValueError: an argument is out of its range.
    """
    require("decode", "threshold", threshold, 0 <= threshold < 1, "be in [0, 1)")
    require("decode", "overlap", overlap, 0 < overlap <= 1, "be in (0, 1]")
    require("decode", "limit", limit, limit >= 1, "be >= 1")
    logits, boxes, _, _ = cells(heads)
    classes = logits.shape[2]
    scores, index = logits.sigmoid().flatten(1).sort(descending=True, stable=True)
    scores, index = scores[:, :limit], index[:, :limit]
    labels, cell = index % classes, index // classes
    boxes = boxes.gather(1, cell[..., None].expand(-1, -1, 4))
    height, width = image_size
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    rivals = (box_iou(boxes, boxes) > overlap) & (labels[:, :, None] == labels[:, None, :])
    kept = scores > threshold
    for i in range(kept.shape[1]):
        beaten = rivals[:, i] & kept[:, i, None]
        beaten[:, : i + 1] = False
        kept = kept & ~beaten
    return [
        Detections(box[keep], score[keep], label[keep])
        for box, score, label, keep in zip(boxes, scores, labels, kept, strict=True)
    ]
