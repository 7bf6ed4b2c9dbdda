"""Linear interpolation of images, with both labels: AGM's second idea, as mixup does it (arXiv 1710.09412).

    x~ = lam x + (1 - lam) x[order],     CE~ = lam CE(y) + (1 - lam) CE(y[order]),     lam ~ Beta(a, a)

The student alone is trained on what is mixed: a generator's own losses need images of one class, and activation ranges
those that will be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zsq_ext.core.steps import Stage
from zsq_ext.tune.ideas import Mix


class MixedLabels(NamedTuple):
    """The labels of a mixed batch.

    ``first`` and ``second`` are (B,) int64, ``share`` is the first's, 0-d or (B,), ``answers`` the teacher's logits
    (B, K) where it is not to be asked about the mixed images.
    """

    first: Tensor
    second: Tensor
    share: Tensor
    answers: Tensor | None = None

    @property
    def larger(self) -> Tensor:
        """The label with the larger share, (B,)."""
        return torch.where(self.share >= 0.5, self.first, self.second)


Labels = Tensor | MixedLabels
"""(B,) int64, or both labels of a mixed batch."""


class Mixing(NamedTuple):
    """How a batch is mixed: with itself in another order, (B,) int64, and the share of the first, 0-d or (B,)."""

    order: Tensor
    share: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Images, or anything else with one row per sample: share x + (1 - share) x[order]; x itself at share 1."""
        share = self.share.to(x.dtype)
        return torch.lerp(x[self.order], x, share if share.dim() == 0 else share.view(-1, *[1] * (x.dim() - 1)))

    def labels(self, labels: Tensor, answers: Tensor | None = None) -> MixedLabels:
        """Both labels, and the teacher's answers where they are mixed instead of asked for."""
        return MixedLabels(labels, labels[self.order], self.share, answers)


def draw(stage: Stage, step: int, batch: int, idea: Mix, device: torch.device) -> Mixing | None:
    """The mixing of one step, from the stage's stream "mix" of that step, on the host: the same wherever it runs.

    Args:
        stage: whose stream.
        step: its number.
        batch: B.
        idea: a, probability, one share or B.
        device: where the tensors are wanted.

    Returns:
        The mixing, or None for a step whose batch stays as it is.
    """
    stream = stage.stream("mix", step)
    if idea.probability < 1 and torch.rand((), generator=stream) >= idea.probability:
        return None
    order = torch.randperm(batch, generator=stream)
    # numpy's, since torch's Beta draws from its global stream only
    beta = np.random.default_rng(stream.initial_seed()).beta(idea.a, idea.a, batch if idea.per_sample else None)
    share = torch.as_tensor(beta, dtype=torch.float32)
    return Mixing(order.to(device, non_blocking=True), share.to(device, non_blocking=True))


class Mixer:
    """Mixes the batches of a fine-tuning.

    Args:
        idea: how.
        stage: the fine-tuning's.
        ask: from images to the teacher's logits, for an idea that mixes those.
    """

    def __init__(self, idea: Mix, stage: Stage, ask: Callable[[Tensor], Tensor]) -> None:
        self._idea, self._stage, self._ask = idea, stage, ask

    def __call__(self, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Labels]:
        """The batch that step is trained on, and its labels."""
        mixing = draw(self._stage, step, len(images), self._idea, images.device)
        if mixing is None:
            return images, labels
        answers = None if self._idea.teacher else mixing.of(self._ask(images))
        return mixing.of(images), mixing.labels(labels, answers)
