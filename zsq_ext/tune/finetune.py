"""Fine-tuning (QAT): SGD on the student over a fixed set of images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.core.steps import Stage, State, Terms, run_steps
from zsq_ext.synth.augment import random_resized_crop_flip
from zsq_ext.tune.mix import Labels
from zsq_ext.tune.sgd import Sgd, SgdConfig

Loss = Callable[[Tensor, Any], Terms]
"""From a batch (images, labels) to weighted loss terms; the labels are `Labels` where batches are mixed."""

ADVICE = "Try a lower learning rate (tune.lr), more bits, or longer range calibration."


@dataclass(frozen=True)
class TuneConfig(SgdConfig):
    """The fine-tuning loop. Defaults: the lineage's optimiser, SynQ's augmentation."""

    batch: int = 256
    crop_scale: tuple[float, float] | None = (0.5, 1.0)  # None: no augmentation

    def __post_init__(self) -> None:
        super().__post_init__()
        require("TuneConfig", "batch", self.batch, self.batch >= 1, "be at least 1")


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning leaves behind besides the student itself."""

    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def finetune(
    stage: Stage,
    student: fx.GraphModule,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    config: TuneConfig,
    *,
    filter_batch: Callable[[Tensor], Tensor] | None = None,
    mix: Callable[[int, Tensor, Tensor], tuple[Tensor, Labels]] | None = None,
    evaluate: Callable[[fx.GraphModule], dict[str, Any]] | None = None,
) -> Tuned:
    """Trains all parameters of the student in place; batch-norm statistics and activation ranges stand still.

    Args:
        stage: checkpoints, random streams, reporting.
        student: a prepared, calibrated network.
        images: (N, C, H, W) in normalised space, on the student's device.
        labels: (N,) int64.
        loss: terms of one batch.
        config: length, batch size, learning rate.
        filter_batch: applied to every batch after augmentation (SynQ's released low-pass).
        mix: makes the batch that a step is trained on, from its number, images and labels; last before the loss.
        evaluate: called after every epoch, gives a record such as {"top1": percent}; it decides nothing.

    Returns:
        The loss history and the evaluations [{"step": n, "epoch": n, "top1": percent, ...}].

    Raises:
        Diverged: a loss term was not finite.
    """
    sgd = Sgd(student, config)
    batch = min(config.batch, len(images))
    per_pass = len(images) // batch
    device = images.device

    @functools.lru_cache(maxsize=1)
    def order_of(number: int) -> Tensor:
        return torch.randperm(len(images), generator=stage.stream("order", number)).to(device)

    def step(n: int) -> Terms:
        epoch = n // config.steps_per_epoch
        chosen = order_of(n // per_pass)[(n % per_pass) * batch :][:batch]
        x, own = images[chosen], labels[chosen]
        if config.crop_scale is not None:
            x = random_resized_crop_flip(x, stage.stream("crop", n, device), config.crop_scale)
        if filter_batch is not None:
            x = filter_batch(x)
        y: Labels = own
        if mix is not None:
            x, y = mix(n, x, own)
        terms = loss(x.contiguous(memory_format=torch.channels_last), y)
        sgd.step(terms, epoch)
        return terms

    def after_epoch(n: int) -> dict[str, Any] | None:
        if evaluate is None or (n + 1) % config.steps_per_epoch:
            return None
        return {"epoch": (n + 1) // config.steps_per_epoch, **evaluate(student)}

    history = run_steps(
        stage,
        config.epochs * config.steps_per_epoch,
        step,
        State(dict(student.named_parameters()), {"sgd": sgd.optimizer}),
        advice=ADVICE,
        after=after_epoch,
    )
    sgd.end()
    return Tuned([row for row in history if "epoch" not in row], [row for row in history if "epoch" in row])
