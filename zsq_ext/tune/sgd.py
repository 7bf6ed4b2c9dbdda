"""How a student descends: the lineage's SGD with its steps in the learning rate, for every engine that trains one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from zsq_ext.core.check import require
from zsq_ext.core.steps import Terms, sum_terms


@dataclass(frozen=True)
class SgdConfig:
    """Length and optimiser of a training. Defaults: what GDFQ, HAST and SynQ share."""

    epochs: int = 97
    steps_per_epoch: int = 200  # an epoch is this long whatever the set's size
    lr: float = 1e-5
    lr_epochs: tuple[int, ...] = (20, 40, 60)  # x 0.1 after each
    momentum: float = 0.9
    nesterov: bool = True  # released; SynQ's paper does not say
    weight_decay: float = 1e-4
    clip: float | None = None  # gradient norm; ours, not published: lets a short run take large steps at 3 bits

    def __post_init__(self) -> None:
        name = type(self).__name__
        require(name, "epochs", self.epochs, self.epochs >= 0, "be at least 0")
        require(name, "steps_per_epoch", self.steps_per_epoch, self.steps_per_epoch >= 1, "be at least 1")
        for field in ("lr", "momentum", "weight_decay"):
            require(name, field, getattr(self, field), getattr(self, field) >= 0, "be at least 0")
        require(name, "nesterov", self.nesterov, not self.nesterov or self.momentum > 0, "have a momentum")
        require(name, "clip", self.clip, self.clip is None or self.clip > 0, "be None or positive")

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0: a tenth after every epoch of the schedule."""
        return self.lr * 0.1 ** sum(epoch >= e for e in self.lr_epochs)


class Sgd:
    """SGD on all parameters of a student.

    Args:
        student: a prepared network.
        config: optimiser and schedule.
    """

    def __init__(self, student: fx.GraphModule, config: SgdConfig) -> None:
        self.config = config
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        # a tensor rate would also do, but SGD reads a float without leaving the host
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )

    def step(self, terms: Terms, epoch: int) -> None:
        """One step down the sum of the terms, at the rate of that epoch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(epoch)
        gradients = torch.autograd.grad(sum_terms(terms), self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()

    def end(self) -> None:
        """The student leaves with weights, not with the last step's gradients."""
        self.optimizer.zero_grad(set_to_none=True)
