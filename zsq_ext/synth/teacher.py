"""The frozen network that images are made for: its logits and the statistics of what enters its batch norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from zsq_ext.ops import statistics_of
from zsq_ext.quant.fuse import fuse_with_statistics
from zsq_ext.quant.graph import attribute, batch_norms, find
from zsq_ext.synth.objectives import Statistics


@dataclass(frozen=True)
class Context:
    """What an objective of image synthesis sees after one forward of the teacher.

    ``statistics`` are those of every batch norm's input over the batch.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    statistics: Statistics


class Teacher:
    """A captured network, frozen, that shows the statistics of what enters its batch norms.

    Args:
        module: what ``capture`` returned.

    Attributes:
        target: the statistics that the batch norms have stored.
        places: how many values of an image each channel's sum adds up, (sum of C_l,).

    Raises:
        ValueError: the network has no batch norm, so it stores nothing that images could be matched to.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        taps = batch_norms(module)
        if not taps:
            raise ValueError(
                "Teacher: the model must have batch norms with running statistics to make images from, got none; "
                "pass images=... to use images of your own"
            )
        self.module = module
        self._fused = fuse_with_statistics(module)
        self.target = Statistics.of(
            [attribute(module, str(tap.mean)).float() for tap in taps],
            [attribute(module, str(tap.var)).float() for tap in taps],
        )
        places = [math.prod(int(n) for n in find(module, tap.input).meta["val"].shape[2:]) for tap in taps]
        channels = torch.tensor(self.target.channels)
        self.places = torch.tensor(places).repeat_interleave(channels).to(self.target.mean)

    def sums(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One forward, differentiable in the images.

        Returns:
            The logits, and (S1, S2) of all layers, (sum of C_l,) each: sums over the batch of u - mean and of its
            square, shifted by the stored means. They add across batches and processes.
        """
        logits, s1, s2 = self._fused(images)
        return logits, torch.cat(s1), torch.cat(s2)

    def statistics_of(self, s1: Tensor, s2: Tensor, images: int) -> Statistics:
        """Mean and biased variance per channel from the sums over that many images."""
        mean, variance = statistics_of(s1, s2, self.places * images, self.target.mean)
        return Statistics(mean, variance, self.target.channels)

    def observe(self, images: Tensor, labels: Tensor) -> Context:
        """One forward, differentiable in the images."""
        logits, s1, s2 = self.sums(images)
        return Context(images, labels, logits, self.statistics_of(s1, s2, len(images)))

    @torch.no_grad()
    def statistics(self, images: Tensor, batch: int) -> Statistics:
        """Statistics of every batch norm's input over a whole image set (N, C, H, W), read ``batch`` at a time."""
        sums = [torch.stack(self.sums(chunk)[1:]) for chunk in images.split(batch)]
        s1, s2 = torch.stack(sums).sum(0)
        return self.statistics_of(s1, s2, len(images))
