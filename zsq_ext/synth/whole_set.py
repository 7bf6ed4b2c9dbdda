"""The statistics of a whole image set, known at every step although one batch at a time passes the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from zsq_ext.ops import channel_sums, statistics_of
from zsq_ext.quant.fuse import fuse_with_statistics
from zsq_ext.quant.graph import batch_norms, with_taps
from zsq_ext.synth.objectives import Statistics
from zsq_ext.synth.teacher import Teacher


@dataclass(frozen=True)
class Seen:
    """What one forward of B images shows.

    ``sums`` are S1 and S2, the sums of u - mean and of its square: over the batch, (2, W), or over each image,
    (2, B, W). ``heads`` are the outputs of the heads, (B, ...) each, and ``last`` the mean and the unbiased variance of
    what enters the last batch norm, over the places of each image, (B, C); None without heads.
    """

    sums: Tensor
    heads: tuple[Tensor, ...]
    last: Statistics | None


class SetTeacher:
    """A frozen network that shows what a batch adds to the statistics of a set.

    The W channels are those of the image itself, layer 0, then of what enters each batch norm. Layer 0 is to have mean
    0 and variance 1 in normalised space, as it had for whoever trained the network.

    Args:
        module: what ``capture`` returned.
        heads: nodes whose outputs are shown, and with them each image at the last batch norm that runs.
        per_image: whether the sums are those of each image.

    Attributes:
        target: the stored statistics, (W,); ``last`` is the last batch norm's part of it.
        places: how many values of an image each channel's sum adds up, (W,).

    Raises:
        ValueError: the network has no batch norm.
    """

    def __init__(self, module: fx.GraphModule, *, heads: Sequence[str] = (), per_image: bool = False) -> None:
        teacher = Teacher(module)
        norms = [norm.node for norm in batch_norms(module)]
        each = norms if per_image else norms[-1:] if heads else []
        self.module, self.per_image, self._tapped = module, per_image, bool(heads)
        self._network = fuse_with_statistics(with_taps(module, tuple(heads)), each)
        image = next(node for node in module.graph.nodes if node.op == "placeholder").meta["val"].shape
        stored, zeros = teacher.target, teacher.target.mean.new_zeros(int(image[1]))
        self.target = Statistics(
            torch.cat([zeros, stored.mean]), torch.cat([zeros + 1, stored.variance]), (len(zeros), *stored.channels)
        )
        self.places = torch.cat([zeros + math.prod(int(n) for n in image[2:]), teacher.places])
        count = stored.channels[-1]
        self.last = Statistics(stored.mean[-count:], stored.variance[-count:], (count,))
        self._last_places = int(self.places[-1])

    def observe(self, images: Tensor) -> Seen:
        """One forward of (B, C, H, W), differentiable in the images."""
        (_, heads), s1, s2 = self._network(images)
        last = None
        if self._tapped:
            mean, variance = statistics_of(s1[-1], s2[-1], self._last_places, self.last.mean)
            # a map of one place has no spread
            last = Statistics(mean, variance * (self._last_places / max(self._last_places - 1, 1)), self.last.channels)
            if not self.per_image:
                s1, s2 = ((*sums[:-1], sums[-1].sum(0)) for sums in (s1, s2))
        parts = zip(self.image_sums(images), (s1, s2), strict=True)
        return Seen(torch.stack([torch.cat([image, *sums], -1) for image, sums in parts]), heads, last)

    def image_sums(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """S1 and S2 of layer 0, (C,), or (B, C) if they are those of each image."""
        zero = self.target.mean[: self.target.channels[0]]
        return channel_sums(images, zero, "sample" if self.per_image else "batch")

    def statistics(self, sums: Tensor) -> Statistics:
        """Mean and biased variance from the mean of the sums over the images in question."""
        mean = self.target.mean.to(sums.dtype)
        return Statistics(*statistics_of(sums[0], sums[1], self.places, mean), self.target.channels)


class RunningTotals:
    """The sums of a set whose batches change one at a time, as their mean over its images.

        total <- total - table[b] + share_b * sums,     share_b = 1 / N, or 1 / (batches * size_b)

    Replacing a batch costs the same however many there are. Kept in fp64, so that what a replacement rounds is nothing
    beside the fp32 sums themselves.

    Args:
        sizes: images of each batch.
        width: W.
        device: where to keep them.
        equal: give every batch the same weight, as DGH's released code does, instead of every image.
    """

    def __init__(self, sizes: Sequence[int], width: int, device: torch.device, *, equal: bool = False) -> None:
        self._shares = [1 / (len(sizes) * size if equal else sum(sizes)) for size in sizes]
        self.table = torch.zeros(len(sizes), 2, width, dtype=torch.float64, device=device)
        self.total = torch.zeros(2, width, dtype=torch.float64, device=device)

    def with_batch(self, index: int, sums: Tensor) -> Tensor:
        """The mean sums if batch ``index`` had these, (2, W) float64; the others' carry no gradient."""
        return (self.total - self.table[index]) + self._shares[index] * sums.double()

    @torch.no_grad()
    def replace(self, index: int, sums: Tensor) -> None:
        """Puts these sums in the place of what batch ``index`` had."""
        new = self._shares[index] * sums.double()
        # in this order a set of one batch is exact: old - old is zero
        self.total.sub_(self.table[index]).add_(new)
        self.table[index] = new

    def tensors(self) -> dict[str, Tensor]:
        return {"table": self.table, "total": self.total}
