"""The frozen network that images are made for: its logits and the statistics of what enters its batch norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from zsq_ext.quant.graph import attribute, batch_norms, with_taps
from zsq_ext.synth.objectives import channel_statistics, merge_statistics


@dataclass(frozen=True)
class Context:
    """What an objective of image synthesis sees after one forward of the teacher.

    ``means`` and ``variances`` hold one (C_l,) tensor per batch norm, in execution order: the biased statistics of its
    input over the batch.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    means: list[Tensor]
    variances: list[Tensor]


class Teacher:
    """A captured network, frozen, with taps on the input of every batch norm.

    Args:
        module: what ``capture`` returned.

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
        self._tapped = with_taps(module, [tap.input for tap in taps])
        self.target_means = [attribute(module, str(tap.mean)).float() for tap in taps]
        self.target_variances = [attribute(module, str(tap.var)).float() for tap in taps]

    def observe(self, images: Tensor, labels: Tensor) -> Context:
        """One forward, differentiable in the images."""
        logits, inputs = self._tapped(images)
        statistics = [channel_statistics(u, mu) for u, mu in zip(inputs, self.target_means, strict=True)]
        return Context(images, labels, logits, [mean for mean, _ in statistics], [var for _, var in statistics])

    @torch.no_grad()
    def statistics(self, images: Tensor, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Statistics of every batch norm's input over a whole image set (N, C, H, W), read ``batch`` at a time."""
        parts, counts = [], []
        for chunk in images.split(batch):
            context = self.observe(chunk, torch.zeros(len(chunk), dtype=torch.int64, device=chunk.device))
            parts.append((context.means, context.variances))
            counts.append(len(chunk))
        merged = [
            merge_statistics([m[layer] for m, _ in parts], [v[layer] for _, v in parts], counts)
            for layer in range(len(self.target_means))
        ]
        return [mean for mean, _ in merged], [var for _, var in merged]
