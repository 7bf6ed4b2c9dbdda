"""The margin of AGM's loss: given, or found on the way, since one number cannot suit 3 and 5 bits.

Early in tuning the discrepancy of the networks is about the margin, and the generator half pushed; as the student
catches up it falls below, and the push grows to its full strength: in the middle of a run and late, where a generator
otherwise stands still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_ext.synth.adversarial import SMALLEST_DISCREPANCY
from zsq_ext.tune.ideas import Agm


class AgmMargin:
    """m and s, and when AGM's loss counts.

        m = margin_factor * mean of the batches' median discrepancies over the first epoch behind the warm-up
        s = sigma_factor * m

    A given value is what it is. Where nothing has to be found AGM begins with the end of the warm-up, else an epoch
    later; then both stand still.

    Args:
        idea: what is given, and the factors.
        warmup: steps before the student is trained.
        per_epoch: steps of an epoch, >= 1.
        device: the networks'.

    Attributes:
        margin, sigma: m and s, 0-d fp32 on the device; 1 as long as they are to be found.
    """

    def __init__(self, idea: Agm, warmup: int, per_epoch: int, device: torch.device) -> None:
        self._idea = idea
        # without a given margin, a given s is enough for the forms that have no m
        self._finds = idea.margin is None and (idea.sigma is None or idea.form == "smooth_hinge")
        self._first, self._begin = warmup, warmup + (per_epoch if self._finds else 0)
        margin = 1.0 if idea.margin is None else idea.margin
        sigma = idea.sigma_factor * margin if idea.sigma is None else idea.sigma
        self.margin, self.sigma = torch.tensor(margin, device=device), torch.tensor(sigma, device=device)
        self._sum, self._batches = torch.zeros((), device=device), torch.zeros((), device=device)

    def counts(self, step: int) -> bool:
        """True if AGM's loss is part of that step."""
        return step >= self._begin

    def watches(self, step: int) -> bool:
        """True if that step's discrepancy is wanted, to find the margin by."""
        return self._first <= step < self._begin

    @torch.no_grad()
    def watch(self, step: int, median: Tensor) -> None:
        """Sees the median discrepancy of a step that is watched; a NaN, of a batch passed over, does not count.

        Args:
            step: its number; behind the last one m and s are there.
            median: 0-d, on the device.
        """
        usable = ~median.isnan()
        self._sum += torch.where(usable, median, 0.0)
        self._batches += usable
        if step + 1 == self._begin:
            mean = self._sum / self._batches.clamp_min(1)
            self.margin.copy_((self._idea.margin_factor * mean).clamp_min(SMALLEST_DISCREPANCY))
            if self._idea.sigma is None:
                self.sigma.copy_(self._idea.sigma_factor * self.margin)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"margin": self.margin, "sigma": self.sigma, "margin.sum": self._sum, "margin.batches": self._batches}
