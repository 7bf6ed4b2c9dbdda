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
from zsq_ext.tune.distill import sum_terms
from zsq_ext.tune.mix import Labels

Loss = Callable[[Tensor, Any], Terms]
"""From a batch (images, labels) to weighted loss terms; the labels are `Labels` where batches are mixed."""

ADVICE = "Try a lower learning rate (tune.lr), more bits, or longer range calibration."


@dataclass(frozen=True)
class TuneConfig:
    """The fine-tuning loop. Defaults: the lineage's optimiser, SynQ's augmentation."""

    epochs: int = 97
    steps_per_epoch: int = 200  # an epoch is this long whatever the set's size
    batch: int = 256
    lr: float = 1e-5
    lr_epochs: tuple[int, ...] = (20, 40, 60)  # x 0.1 after each
    momentum: float = 0.9
    nesterov: bool = True  # released; the paper does not say
    weight_decay: float = 1e-4
    clip: float | None = None  # gradient norm; ours, not published: lets a short run take large steps at 3 bits
    crop_scale: tuple[float, float] | None = (0.5, 1.0)  # None: no augmentation

    def __post_init__(self) -> None:
        require("TuneConfig", "epochs", self.epochs, self.epochs >= 0, "be at least 0")
        for name in ("steps_per_epoch", "batch"):
            require("TuneConfig", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        for name in ("lr", "momentum", "weight_decay"):
            require("TuneConfig", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")
        require("TuneConfig", "nesterov", self.nesterov, not self.nesterov or self.momentum > 0, "have a momentum")
        require("TuneConfig", "clip", self.clip, self.clip is None or self.clip > 0, "be None or positive")


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
        evaluate: called after every epoch, gives a record with at least {"top1": percent}; it decides nothing.

    Returns:
        The loss history and the evaluations [{"step": n, "epoch": n, "top1": percent, ...}].

    Raises:
        Diverged: a loss term was not finite.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    # a tensor rate would also do, but SGD reads a float without leaving the host
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    batch = min(config.batch, len(images))
    per_pass = len(images) // batch
    device = images.device

    @functools.lru_cache(maxsize=1)
    def order_of(number: int) -> Tensor:
        return torch.randperm(len(images), generator=stage.stream("order", number)).to(device)

    def step(n: int) -> Terms:
        epoch = n // config.steps_per_epoch
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.1 ** sum(epoch >= e for e in config.lr_epochs)
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
        gradients = torch.autograd.grad(sum_terms(terms), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        return terms

    def after_epoch(n: int) -> dict[str, Any] | None:
        if evaluate is None or (n + 1) % config.steps_per_epoch:
            return None
        return {"epoch": (n + 1) // config.steps_per_epoch, **evaluate(student)}

    history = run_steps(
        stage,
        config.epochs * config.steps_per_epoch,
        step,
        State(dict(student.named_parameters()), {"sgd": optimizer}),
        advice=ADVICE,
        after=after_epoch,
    )
    optimizer.zero_grad(set_to_none=True)  # the student leaves with weights, not with the last step's gradients
    return Tuned([row for row in history if "top1" not in row], [row for row in history if "top1" in row])
