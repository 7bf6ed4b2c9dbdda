"""How near an image set is to the data that its teacher knew, and how far the teacher's outputs reach on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zsq_ext.quant.graph import batch_norms, is_classifier
from zsq_ext.synth.objectives import Statistics
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


@torch.no_grad()
def figures(module: fx.GraphModule, images: Tensor, batch: int = 64, std_eps: float = 1e-6) -> ImageFigures:
    """The distances of a whole set, layer by layer, and its logit ranges, as far as the network has any: one forward.

        mean = sqrt( mean_c ((m - mu) / sg)^2 ),     std = sqrt( mean_c (sd / sg - 1)^2 )

    Args:
        module: a captured network.
        images: (N, C, H, W), at least one, in normalised space on the network's device.
        batch: how many are read at a time.
        std_eps: added to both variances before the root, so that a channel that never varied divides nothing by zero.
    """
    norms, classifier = batch_norms(module), is_classifier(module)
    if not norms and not classifier:
        return ImageFigures()
    teacher = Teacher(module) if norms else None
    sums, ranges = [], []
    for chunk in images.split(batch):
        if teacher is None:
            logits = module(chunk)
        else:
            logits, *found = teacher.sums(chunk)
            sums.append(torch.stack(found))
        if classifier:
            ranges.append(logits.amax(1) - logits.amin(1))
    reach = tuple(torch.cat(ranges).tolist()) if classifier else ()
    if teacher is None:
        return ImageFigures(logit_ranges=reach)
    s1, s2 = torch.stack(sums).sum(0)
    layers = _distances(teacher.statistics_of(s1, s2, len(images)), teacher.target, std_eps)
    rows = zip((norm.name for norm in norms), *layers, strict=True)
    return ImageFigures(tuple(LayerDistance(*row) for row in rows), reach)


def _distances(found: Statistics, target: Statistics, std_eps: float) -> tuple[list[float], list[float]]:
    """The distances of the means and of the standard deviations, a value per layer."""
    deviation = (target.variance + std_eps).sqrt()
    gaps = ((found.mean - target.mean) / deviation, (found.variance + std_eps).sqrt() / deviation - 1)
    mean, std = (
        torch.stack([part.square().mean().sqrt() for part in gap.split(target.channels)]).tolist() for gap in gaps
    )
    return mean, std
