"""The pixel engine: images are the parameters, Adam moves them until the teacher recognises them as its own data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zsq_ext.core.check import require
from zsq_ext.core.steps import Stage, State, Terms, end_stage, run_steps, sum_terms
from zsq_ext.synth.augment import random_resized_crop_flip
from zsq_ext.synth.teacher import Context, Teacher

Objective = Callable[[Context], Terms]
"""Weighted loss terms by name; their sum is what the images descend."""

ADVICE = "Try a lower learning rate of the images (pixels.lr), or check the teacher's batch-norm statistics."


@dataclass(frozen=True)
class PixelConfig:
    """How images are optimised. Defaults: SynQ's released generation, after IntraQ and HAST.

    Images live in the network's normalised space and are never clamped to valid pixels.
    """

    batch: int = 256
    iterations: int = 1000
    lr: float = 0.5
    factor: float = 0.1  # ReduceLROnPlateau's default
    patience: int = 50
    min_lr: float = 1e-4
    crop_probability: float = 0.0  # of augmenting the whole batch in an iteration; 0.5 on ImageNet
    crop_scale: tuple[float, float] = (0.4, 1.0)

    def __post_init__(self) -> None:
        for name in ("batch", "iterations"):
            require("PixelConfig", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        for name in ("lr", "factor"):
            require("PixelConfig", name, getattr(self, name), getattr(self, name) > 0, "be positive")
        for name in ("patience", "min_lr"):
            require("PixelConfig", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")
        probability = self.crop_probability
        require("PixelConfig", "crop_probability", probability, 0 <= probability <= 1, "be in [0, 1]")


def make_images(
    stage: Stage,
    teacher: Teacher,
    labels: Tensor,
    shape: tuple[int, int, int],
    objective: Objective,
    config: PixelConfig,
) -> tuple[Tensor, list[dict]]:
    """Optimises one image per label, batch by batch.

    Args:
        stage: keeps every finished batch and a checkpoint of the one under way.
        teacher: whose statistics and logits the objective reads.
        labels: (N,) int64 on the teacher's device.
        shape: (C, H, W) of an image.
        objective: from one forward of the teacher to weighted loss terms.
        config: batch size, iterations and learning rate.

    Returns:
        Images (N, C, H, W) float32 in normalised space, and the loss history of all batches.

    Raises:
        Diverged: a loss term was not finite.
    """
    done, history = [], []
    chunks = labels.split(config.batch)
    for index, chunk in enumerate(chunks):
        part = stage.part(index, len(chunks))
        held = stage.run.load(part.name)
        if held is None:
            images, losses = _one_batch(part, teacher, chunk, shape, objective, config)
            stage.run.save(part.name, {"images": images}, {"history": losses})
            end_stage(part)
        else:
            images, losses = held[0]["images"].to(labels.device), held[1]["history"]
        done.append(images)
        history += [{"batch": index, **row} for row in losses]
    # one layout, whether a batch was made just now or read from its file: the layout decides which kernels run on it
    return torch.cat([images.contiguous() for images in done]), history


def _one_batch(
    stage: Stage,
    teacher: Teacher,
    labels: Tensor,
    shape: tuple[int, int, int],
    objective: Objective,
    config: PixelConfig,
) -> tuple[Tensor, list[dict]]:
    device = labels.device
    start = torch.randn(len(labels), *shape, generator=stage.stream("init"))
    images = start.to(device).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    schedule = Plateau(config.lr, config.factor, config.patience, config.min_lr, device)
    optimizer = torch.optim.Adam([images], lr=schedule.lr, capturable=device.type == "cuda")

    def step(n: int) -> Terms:
        seen: Tensor = images
        if config.crop_probability > 0:
            coin = stage.stream("crop?", n)  # on the host: no synchronisation to decide
            if torch.rand((), generator=coin) < config.crop_probability:
                seen = random_resized_crop_flip(seen, stage.stream("crop", n, device), config.crop_scale)
        terms = objective(teacher.observe(seen, labels))
        loss = sum_terms(terms)
        (images.grad,) = torch.autograd.grad(loss, [images])
        optimizer.step()
        schedule.step(loss.detach())
        return terms

    state = State({"images": images, **schedule.tensors()}, {"adam": optimizer})
    history = run_steps(stage, config.iterations, step, state, advice=ADVICE)
    return images.detach(), history


class Plateau:
    """ReduceLROnPlateau with its whole state on the device, so that no step waits for the host.

    Lowers ``lr`` by ``factor``, not below ``min_lr``, when the loss has not fallen by a relative 1e-4 for more than
    ``patience`` steps: torch's scheduler with its defaults. With ``reset`` the best loss is forgotten at every such
    cut, as in DGH's released code: what follows has to improve on itself, so cuts are at least patience + 2 steps
    apart.
    """

    THRESHOLD = 1e-4
    EPS = 1e-8  # a smaller reduction is not made
    NONE = torch.finfo(torch.float32).max  # "no best yet"; an infinity would look like a poisoned state

    def __init__(
        self, lr: float, factor: float, patience: int, min_lr: float, device: torch.device, *, reset: bool = False
    ) -> None:
        self.lr = torch.tensor(lr, device=device)
        self.best = torch.tensor(self.NONE, device=device)
        self.waited = torch.zeros((), device=device)
        self.factor, self.patience, self.min_lr, self.reset = factor, patience, min_lr, reset

    def step(self, loss: Tensor) -> None:
        """Sees one loss, 0-d on the device, and moves ``lr`` in place."""
        better = loss < self.best * (1 - self.THRESHOLD)
        self.best.copy_(torch.where(better, loss, self.best))
        self.waited.copy_(torch.where(better, 0.0, self.waited + 1))
        over = self.waited > self.patience
        lower = torch.clamp_min(self.lr * self.factor, self.min_lr)
        self.lr.copy_(torch.where(over & (self.lr - lower > self.EPS), lower, self.lr))
        self.waited.copy_(torch.where(over, 0.0, self.waited))
        if self.reset:
            self.best.copy_(torch.where(over, self.NONE, self.best))

    def tensors(self) -> dict[str, Tensor]:
        return {"lr": self.lr, "best": self.best, "waited": self.waited}
