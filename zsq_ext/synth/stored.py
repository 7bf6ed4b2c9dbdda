"""The stored-image engine: images larger than the network's input, of which every step sees a view of one batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zsq_ext.core.check import require
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import Stage, State, Terms, end_stage, run_steps
from zsq_ext.ops import view_images
from zsq_ext.synth.objectives import Statistics
from zsq_ext.synth.pixels import Plateau
from zsq_ext.synth.whole_set import RunningTotals, Seen, SetTeacher

Objective = Callable[[Statistics, Seen], Terms]
"""From the statistics that are to be matched and one forward to weighted loss terms; their sum is descended."""

GRANULARITIES = ("set", "batch", "image")
"""Whose statistics are to be the stored ones: those of all images together, of a batch, or of every single image."""

ADVICE = "Try a lower learning rate of the images (stored.lr), or check the teacher's batch-norm statistics."


@dataclass(frozen=True)
class StoredConfig:
    """How stored images are optimised. Defaults: DGH's command line (spec: section 3.1).

    A learning rate of 16 belongs to RAdam as torch has it, to a loss divided by layers, channels and the whole set, and
    to unscaled gradients, which eps = 1e-8 then damps. A gradient is inversely proportional to the number of images and
    of an image's pixels, so with few of either eps damps nothing: on 64 images of 32 pixels 1e-8 and 1e-8 * 1024 / 64
    left sets whose distances differ by less than 1 %. So eps stays as it is unless ``eps_images`` is given.
    """

    batch: int = 128
    iterations: int = 1000  # each visits every batch once
    border: int = 32  # by how much stored images are wider and higher than the network's input, of 224 pixels
    sigma: float | None = 1.25  # of the 3 x 3 smoothing; None: none
    flip: float = 0.5
    one_view: bool = False  # released: one flip and one offset for all of a batch; ours: for each image
    clip: bool = True  # to valid pixels, where the network sees them; the stored ones go where they like
    clip_start: bool = True
    lr: float = 16.0
    eps: float = 1e-8
    eps_images: int | None = None  # makes eps that of a set of so many images: eps * eps_images / N
    factor: float = 0.5
    patience: int = 20  # iterations / 50
    reset: bool = True  # forget the best loss at every cut
    min_lr: float = 1e-4
    granularity: str = "set"
    equal_batches: bool = False  # released: a short last batch counts as much as a full one; ours: every image
    refresh: bool = False  # ours: another forward after every step, so that no stored statistics are an iteration old

    def __post_init__(self) -> None:
        for name in ("batch", "iterations"):
            require("StoredConfig", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        for name in ("border", "patience", "min_lr", "eps"):
            require("StoredConfig", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")
        for name in ("lr", "factor"):
            require("StoredConfig", name, getattr(self, name), getattr(self, name) > 0, "be positive")
        require("StoredConfig", "sigma", self.sigma, self.sigma is None or self.sigma > 0, "be None or positive")
        require("StoredConfig", "flip", self.flip, 0 <= self.flip <= 1, "be in [0, 1]")
        images = self.eps_images
        require("StoredConfig", "eps_images", images, images is None or images >= 1, "be None or at least 1")
        known = self.granularity in GRANULARITIES
        require("StoredConfig", "granularity", self.granularity, known, f"be one of {', '.join(GRANULARITIES)}")


def make_set(
    stage: Stage, teacher: SetTeacher, count: int, spec: InputSpec, objective: Objective, config: StoredConfig
) -> tuple[Tensor, list[dict]]:
    """Optimises a set of images jointly, a batch at a time, each visited once in every iteration.

    A step sees a view of one batch, forms the statistics of the whole set with this batch's as they are now and the
    others' as they were last seen, and moves the batch's stored pixels (RAdam). What is remembered of a batch are the
    statistics of the forward that its gradient came from, so a step is one forward and one backward; those of the
    images themselves, which cost no forward, are taken anew. With one batch nothing is remembered, and all is exact.

    Args:
        stage: keeps the finished set, and a checkpoint on the way.
        teacher: showing each image's sums if the granularity is "image".
        count: N, at least 1; the last batch is as large as what is left.
        spec: the images' shape and range of pixels, without which nothing is clipped.
        objective: from (statistics, what the forward showed) to weighted loss terms.
        config: batch size, iterations, pipeline, learning rate.

    Returns:
        Images (N, C, H, W) float32 in normalised space, smoothed, cropped at the centre and clipped; the loss history.

    Raises:
        ValueError: there is no image to make, or the teacher shows other sums than the granularity asks for.
        Diverged: a loss term was not finite.

    Source: DGH (arXiv 2410.22110), released code.
    """
    require("make_set", "count", count, count >= 1, "be at least 1")
    per_image = config.granularity == "image"
    rule = f"be {per_image} with granularity '{config.granularity}'"
    require("make_set", "teacher.per_image", teacher.per_image, teacher.per_image == per_image, rule)
    part = stage.part(0, 1)
    held = stage.run.load(part.name)
    if held is not None:
        return held[0]["images"].to(teacher.target.mean.device), held[1]["history"]
    images = ImageSet(teacher, count, spec, objective, config, part.stream("init"))
    batches = len(images.batches)

    @functools.lru_cache(maxsize=1)
    def order_of(iteration: int) -> list[int]:
        return torch.randperm(batches, generator=part.stream("order", iteration)).tolist()

    def step(n: int) -> Terms:
        return images.step(order_of(n // batches)[n % batches], part.stream("view", n, images.device))

    history = run_steps(part, config.iterations * batches, step, images.state(), advice=ADVICE)
    found = images.final()
    stage.run.save(part.name, {"images": found}, {"history": history})
    end_stage(part)
    return found, history


class ImageSet:
    """Stored images in batches, each with an optimizer and a schedule of its own, and the statistics of them all.

    Args:
        teacher, count, spec, objective, config: as for ``make_set``.
        generator: of the Gaussian start.
    """

    def __init__(
        self,
        teacher: SetTeacher,
        count: int,
        spec: InputSpec,
        objective: Objective,
        config: StoredConfig,
        generator: torch.Generator,
    ) -> None:
        self.device = device = teacher.target.mean.device
        self._teacher, self._objective, self._config = teacher, objective, config
        self._view = View(spec, config, device)
        self._stored = self._view.start(count, generator)
        chunks = self._stored.split(config.batch)
        self.batches = [chunk.detach().requires_grad_(True) for chunk in chunks]  # leaves in the same memory
        plan = config.lr, config.factor, config.patience, config.min_lr, device
        self._schedules = [Plateau(*plan, reset=config.reset) for _ in chunks]
        eps = config.eps * (config.eps_images or count) / count
        # one tensor each, so nothing to gain by foreach
        self._optimizers = [
            torch.optim.RAdam([batch], lr=schedule.lr, eps=eps, foreach=False, capturable=device.type == "cuda")
            for batch, schedule in zip(self.batches, self._schedules, strict=True)
        ]
        sizes = [len(chunk) for chunk in chunks]
        self._totals = RunningTotals(sizes, len(teacher.places), device, equal=config.equal_batches)
        self._remembers = config.granularity == "set" and len(chunks) > 1
        if self._remembers:
            for index in range(len(chunks)):
                self._totals.replace(index, self._fresh_sums(index))

    def step(self, index: int, generator: torch.Generator) -> Terms:
        """Shows the network a random view of one batch and moves its pixels; one forward and one backward."""
        batch = self.batches[index]
        seen = self._teacher.observe(self._view.random(batch, generator))
        terms = self._objective(self._statistics(index, seen.sums), seen)
        loss = torch.stack([term.double() for term in terms.values()]).sum()
        (batch.grad,) = torch.autograd.grad(loss, [batch])
        self._optimizers[index].step()
        batch.grad = None  # or as many gradients as pixels would be kept
        self._schedules[index].step(loss.detach().float())
        if self._remembers:
            self._totals.replace(index, self._remembered(index, seen.sums))
        return terms

    def state(self) -> State:
        """What a checkpoint holds."""
        plans = {
            f"{name}-{i}": value for i, plan in enumerate(self._schedules) for name, value in plan.tensors().items()
        }
        tensors = {"stored": self._stored, **self._totals.tensors(), **plans}
        return State(tensors, {f"radam-{i}": optimizer for i, optimizer in enumerate(self._optimizers)})

    def final(self) -> Tensor:
        """The images as they are handed out, (N, C, H, W)."""
        return self._view.final(self._stored).contiguous()

    def _statistics(self, index: int, sums: Tensor) -> Statistics:
        """Those that are to be matched: of the set with this batch as it is now, of the batch, or of each image."""
        if self._config.granularity == "set":
            return self._teacher.statistics(self._totals.with_batch(index, sums))
        share = len(self.batches[index]) if self._config.granularity == "batch" else 1
        return self._teacher.statistics(sums.double() / share)

    @torch.no_grad()
    def _remembered(self, index: int, sums: Tensor) -> Tensor:
        """What other batches' steps will know of this one: the forward's sums, but the images as they are now."""
        if self._config.refresh:
            return self._fresh_sums(index)
        image = torch.stack(self._teacher.image_sums(self._view.final(self.batches[index])))
        return torch.cat([image, sums[:, image.shape[1] :]], 1)

    @torch.no_grad()
    def _fresh_sums(self, index: int) -> Tensor:
        return self._teacher.observe(self._view.final(self.batches[index])).sums


class View:
    """The network's view of stored images: flipped, smoothed, cropped, clipped (``ops.view_images``).

    Args:
        spec: the size of the view, and the range of pixels.
        config: border, sigma, flip, one_view, clip.
        device: of the images.
    """

    def __init__(self, spec: InputSpec, config: StoredConfig, device: torch.device) -> None:
        self._config, self._shape, self._device = config, spec.shape, device
        self.low = self.high = None
        if spec.valid_range is not None:
            ends = torch.tensor(spec.valid_range).view(2, 1, 1, 1).expand(2, spec.shape[0], 1, 1)
            self.low, self.high = spec.normalise(ends)[:, :, 0, 0].to(device)

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Gaussian images at the stored size, in channels-last memory, clipped if that is asked for."""
        channels, height, width = self._shape
        border = self._config.border
        noise = torch.randn(count, channels, height + border, width + border, generator=generator).to(self._device)
        if self._config.clip_start and self.low is not None and self.high is not None:
            noise = noise.clamp(self.low.view(-1, 1, 1), self.high.view(-1, 1, 1))
        return noise.contiguous(memory_format=torch.channels_last)

    def random(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        """A random view of every image; the clip passes the gradient straight through."""
        draws = torch.rand((1 if self._config.one_view else len(stored), 3), generator=generator, device=self._device)
        draws = draws.expand(len(stored), 3)
        border = self._config.border
        # the product may round up to border + 1
        top, left = ((draws[:, axis] * (border + 1)).long().clamp_max(border) for axis in (0, 1))
        return self._view(stored, top, left, draws[:, 2] < self._config.flip)

    @torch.no_grad()
    def final(self, stored: Tensor) -> Tensor:
        """The images that are handed out: smoothed, cropped at the centre, clipped."""
        middle = torch.full((len(stored),), self._config.border // 2, device=self._device)
        return self._view(stored, middle, middle, torch.zeros_like(middle, dtype=torch.bool))

    def _view(self, stored: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        ends = {"low": self.low, "high": self.high} if self._config.clip else {}
        return view_images(stored, top, left, flip, self._shape[1:], sigma=self._config.sigma, **ends)
