"""Does a generator still move? Its images of fixed noise, seen by the teacher, from one checkpoint to the next.

AGM's finding is that in the middle of a run and late the generator stands still, and its images grow alike: feature
drift and gradient fall to nothing while the student's loss stays where it is. These are the curves to see it by; they
decide nothing. The rate of the published schedule falls to 1e-6, which alone would do as much: compare with one kept
constant (``GeneratorConfig(lr_epochs=())``) before anything else is credited.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.quant.fuse import fuse
from zsq_ext.quant.graph import LINEARS, outputs, through_quantizer, with_taps
from zsq_ext.synth.generate import GeneratorTrainer

SHARING = 8
"""The least number of fixed images that share a class, so that there is a spread within it."""


@dataclass(frozen=True)
class DriftConfig:
    """When a generator is looked at, and by how many images. Ours."""

    latents: int = 512
    every_epochs: int = 10

    def __post_init__(self) -> None:
        require("DriftConfig", "latents", self.latents, self.latents >= 2, "be at least 2")
        require("DriftConfig", "every_epochs", self.every_epochs, self.every_epochs >= 1, "be at least 1")


class Drift:
    """Temporal diagnostics of a generator, with the teacher's features phi at its classifier's input.

        drift               mean_i (1 - cos(phi_i now, phi_i at the look before))
        spread              sqrt( mean_i ||phi_i - mean of its class||^2 / mean_i ||phi_i||^2 )
        gradient_norm       mean over the steps since the look before of the norm of the generator's gradient
        median_discrepancy  mean over them of the batches' median discrepancy (``synth.adversarial``)

    Noise and labels are drawn once, from the stream "drift" of the generator's stage; classes are as many as have
    ``SHARING`` images each. Looking changes nothing, and draws nothing from any other stream.

    Args:
        teacher: the captured network; of one whose last layer is not linear, phi are its logits.
        trainer: the generator. It draws the fixed images in batches of its own size, by whose statistics it goes.
        config: how many images, how often.
        steps_per_epoch: of the run.
    """

    def __init__(
        self, teacher: fx.GraphModule, trainer: GeneratorTrainer, config: DriftConfig, steps_per_epoch: int
    ) -> None:
        self._trainer, self._every = trainer, config.every_epochs * steps_per_epoch
        stream, count, device = trainer.stage.stream("drift"), config.latents, trainer.device
        classes = max(1, min(trainer.num_classes, count // SHARING))
        members = torch.arange(count) % classes
        order = torch.randperm(count, generator=stream)  # so that a batch's statistics are not those of a few classes
        self._z = torch.randn(count, trainer.config.latent, generator=stream).to(device)
        self._members = members[order].to(device)
        self._labels = (self._members * trainer.num_classes) // classes
        features = _features(teacher)
        self._network = fuse(with_taps(teacher, [features.name]))
        width = math.prod(int(n) for n in features.meta["val"].shape[1:])
        self._phi = torch.zeros(count, width, device=device)
        self._looks, self._steps, self._gradients, self._batches, self._discrepancies = (
            torch.zeros((), device=device) for _ in range(5)
        )

    @torch.no_grad()
    def note(self, gradients: Sequence[Tensor], median: Tensor | None = None) -> None:
        """Sees one step: the generator's gradients, and the median discrepancy where the step has one (NaN: none)."""
        self._gradients += torch.nn.utils.get_total_norm(gradients)
        self._steps += 1
        if median is not None:
            usable = median.isfinite()
            self._discrepancies += torch.where(usable, median, 0.0)
            self._batches += usable

    def row(self, step: int) -> dict[str, float] | None:
        """Behind a step that ends an epoch to look at, what is to be said of the steps since the last one.

        Args:
            step: its number, from 0; the other steps give None.

        Returns:
            A value per name; no drift in the first row, and no discrepancy where no step had one.
        """
        if (step + 1) % self._every:
            return None
        phi = self._seen()
        drift = (_directions(phi) - _directions(self._phi)).square().sum(1).mean() / 2  # 1 - cos, without its rounding
        found = {
            "drift": torch.where(self._looks > 0, drift, math.nan),
            "spread": self._spread(phi),
            "gradient_norm": self._gradients / self._steps,
            "median_discrepancy": self._discrepancies / self._batches,
        }
        self._phi.copy_(phi)
        self._looks += 1
        for total in (self._steps, self._gradients, self._batches, self._discrepancies):
            total.zero_()
        values = torch.stack([value.float() for value in found.values()]).tolist()
        return {name: value for name, value in zip(found, values, strict=True) if math.isfinite(value)}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {
            "drift.features": self._phi,
            "drift.looks": self._looks,
            "drift.steps": self._steps,
            "drift.gradients": self._gradients,
            "drift.batches": self._batches,
            "drift.discrepancies": self._discrepancies,
        }

    @torch.no_grad()
    def _seen(self) -> Tensor:
        """phi of the fixed images, (latents, width) fp32."""
        batch = self._trainer.config.batch
        parts = zip(self._z.split(batch), self._labels.split(batch), strict=True)
        return torch.cat([self._network(self._trainer.images(*part))[1][0].flatten(1).float() for part in parts])

    def _spread(self, phi: Tensor) -> Tensor:
        # a product instead of scattered sums: the same bits on every run
        member = F.one_hot(self._members).to(phi)
        means = member.T @ phi / member.sum(0)[:, None]
        within = (phi - means[self._members]).square().sum(1).mean()
        return (within / phi.square().sum(1).mean().clamp_min(torch.finfo(phi.dtype).tiny)).sqrt()


def _features(teacher: fx.GraphModule) -> fx.Node:
    """What the classifier reads, or the logits of a network that ends otherwise."""
    (logits,) = outputs(teacher).values()
    last = through_quantizer(logits)
    return last.args[0] if last.target in LINEARS else logits


def _directions(phi: Tensor) -> Tensor:
    return F.normalize(phi, dim=1)
