"""The network inside a torchvision detector: without its transform, its anchors and its post-processing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zsq_ext.core.spec import InputSpec


class RawHeads(nn.Module):
    """A detector's backbone and head as one network: an image batch in, raw head outputs out.

    For torchvision's single-shot detectors (RetinaNet, FCOS, SSD, SSDLite) and whatever else has a ``backbone`` that
    gives a map or a dict of maps, and a ``head`` that takes their list. Resizing, anchors and suppression are no part
    of it: they stay with the detector, which shares its modules with this one, under the same names.

    Args:
        detector: the whole detector. It is not changed.

    Input (N, C, H, W), normalised as the detector's transform would; output what the head returns, for torchvision a
    dict of (N, P, K) tensors.

    Raises:
        ValueError: the detector has no backbone or no head, or a second stage that needs proposals.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        for name in ("rpn", "roi_heads"):
            if name in detector._modules:
                raise ValueError(f"RawHeads: detector must be of a single shot, got one with '{name}'")
        for name in ("backbone", "head"):
            if not isinstance(detector._modules.get(name), nn.Module):
                raise ValueError(f"RawHeads: detector must have a module '{name}', got {type(detector).__name__}")
        self.backbone, self.head = detector.get_submodule("backbone"), detector.get_submodule("head")
        self.training = detector.training

    def forward(self, x: Tensor) -> Any:
        maps = self.backbone(x)
        return self.head(list(maps.values()) if isinstance(maps, dict) else [maps])


def input_spec(detector: nn.Module, height: int, width: int) -> InputSpec:
    """What the network inside a detector expects: the normalisation that the detector's ``transform`` holds.

    Args:
        detector: as for ``RawHeads``, with ``transform.image_mean`` and ``transform.image_std``.
        height, width: of the images, which the transform would have resized and padded to this size.

    Raises:
        ValueError: the detector does not say how it normalises.
    """
    transform = getattr(detector, "transform", None)
    mean, std = (getattr(transform, name, None) for name in ("image_mean", "image_std"))
    if mean is None or std is None:
        raise ValueError("input_spec: detector must have transform.image_mean and transform.image_std, got none")
    return InputSpec((len(mean), height, width), tuple(mean), tuple(std), valid_range=(0.0, 1.0))
