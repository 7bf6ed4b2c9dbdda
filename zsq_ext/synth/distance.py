"""How near an image set is to the data that its teacher knew, and how far the teacher's outputs reach on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zsq_ext.quant.graph import batch_norms, is_classifier
from zsq_ext.synth.teacher import Teacher


@dataclass(frozen=True)
class LayerDistance:
    """How far the statistics of one batch norm's input are from the stored ones, root mean square over the channels.

    ``mean`` is the gap of the means in units of the stored standard deviation, ``std`` the relative gap of the standard
    deviations: 0 where the set is like the training data, 1 where it has no spread at all.
    """

    layer: str
    mean: float
    std: float


@torch.no_grad()
def layer_distances(
    module: fx.GraphModule, images: Tensor, batch: int = 64, std_eps: float = 1e-6
) -> list[LayerDistance]:
    """The distance of a whole set, layer by layer.

        mean = sqrt( mean_c ((m - mu) / sg)^2 ),     std = sqrt( mean_c (sd / sg - 1)^2 )

    Args:
        module: a captured network with batch norms.
        images: (N, C, H, W), at least one, in normalised space on the network's device.
        batch: how many are read at a time.
        std_eps: added to both variances before the root, so that a channel that never varied divides nothing by zero.

    Returns:
        One row per batch norm, in execution order.

    Raises:
        ValueError: the network has no batch norm.
    """
    teacher = Teacher(module)
    found, target = teacher.statistics(images, batch), teacher.target
    deviation = (target.variance + std_eps).sqrt()
    gaps = ((found.mean - target.mean) / deviation, (found.variance + std_eps).sqrt() / deviation - 1)
    mean, std = (
        torch.stack([part.square().mean().sqrt() for part in gap.split(target.channels)]).tolist() for gap in gaps
    )
    names = [norm.name for norm in batch_norms(module)]
    return [LayerDistance(*row) for row in zip(names, mean, std, strict=True)]


@torch.no_grad()
def logit_ranges(module: fx.GraphModule, images: Tensor, batch: int = 64) -> Tensor:
    """Largest less smallest logit of every image.

    Args:
        module: a captured network with one output (N, ...).
        images: (N, C, H, W), at least one, in normalised space on the network's device.
        batch: how many are read at a time.

    Returns:
        (N,), for a histogram: what the stretching loss widens.
    """
    logits = (module(chunk).flatten(1) for chunk in images.split(batch))
    return torch.cat([z.amax(1) - z.amin(1) for z in logits])


@dataclass(frozen=True)
class ImageFigures:
    """What a teacher says of an image set without being asked for labels.

    ``layers`` is empty for a network without batch norms, ``logit_ranges``, one value per image, for one that is no
    classifier.
    """

    layers: tuple[LayerDistance, ...] = ()
    logit_ranges: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the layers' distances."""
        return {"layers": [asdict(layer) for layer in self.layers]}


def figures(module: fx.GraphModule, images: Tensor) -> ImageFigures:
    """The distances of a set and its logit ranges, as far as the network has any.

    Args:
        module: a captured network.
        images: (N, C, H, W), at least one, in normalised space on the network's device.
    """
    return ImageFigures(
        tuple(layer_distances(module, images)) if batch_norms(module) else (),
        tuple(logit_ranges(module, images).tolist()) if is_classifier(module) else (),
    )
