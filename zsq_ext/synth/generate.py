"""The generator engine: a network learns to draw images that the teacher takes for its own data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zsq_ext.core.check import require
from zsq_ext.core.steps import Stage, State, Terms, run_steps, sum_terms
from zsq_ext.quant.graph import is_classifier, outputs
from zsq_ext.synth.generator import KINDS, Generator
from zsq_ext.synth.objectives import Statistics, bn_statistics_loss, cross_entropy
from zsq_ext.synth.teacher import Context, Teacher

ADVICE = "Try a lower learning rate of the generator (generator.lr), or a larger batch (generator.batch)."


@dataclass(frozen=True)
class GeneratorConfig:
    """How a generator is trained. Defaults: GDFQ's released ones for ImageNet, which its descendants share."""

    kind: str | None = None  # "embedding" or "conditional"; None: by the images' size, as published for 32 and 224
    latent: int = 100
    batch: int = 16  # ImageNet, and AdaDFQ everywhere; 200 on CIFAR in GDFQ and KMDFQ
    lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    steps_per_epoch: int = 200  # an epoch is this long
    lr_epochs: tuple[int, ...] = (100, 200, 300)  # the rate falls once so many epochs are done; () keeps it
    lr_factor: float = 0.1
    ce: float = 1.0  # weight of the cross-entropy with the labels
    bns: float = 0.1  # of the BN statistics: GDFQ's; KMDFQ and AdaDFQ have 1

    def __post_init__(self) -> None:
        known = self.kind is None or self.kind in KINDS
        require("GeneratorConfig", "kind", self.kind, known, f"be None or one of {', '.join(KINDS)}")
        for name in ("latent", "batch", "steps_per_epoch"):
            require("GeneratorConfig", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        require("GeneratorConfig", "lr", self.lr, self.lr > 0, "be positive")
        betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require("GeneratorConfig", "betas", self.betas, betas, "be two numbers in [0, 1)")
        rising = list(self.lr_epochs) == sorted(set(self.lr_epochs)) and min(self.lr_epochs, default=1) >= 1
        require("GeneratorConfig", "lr_epochs", self.lr_epochs, rising, "rise from at least 1")
        require("GeneratorConfig", "lr_factor", self.lr_factor, 0 < self.lr_factor <= 1, "be in (0, 1]")
        for name in ("ce", "bns"):
            require("GeneratorConfig", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        epoch = step // self.steps_per_epoch
        return self.lr * self.lr_factor ** sum(epoch >= e for e in self.lr_epochs)

    def check(self, shape: tuple[int, int, int], otherwise: str = "") -> None:
        """Refuses images that this generator cannot make or cannot learn to make.

        Args:
            shape: (C, H, W).
            otherwise: what the message advises.

        Raises:
            ValueError: height or width is no multiple of 4, or a batch gives a norm a single value per channel.
        """
        Generator.check(shape, otherwise)
        values = self.batch * (shape[1] // 4) * (shape[2] // 4)
        require("GeneratorConfig", "batch", self.batch, values >= 2, "be at least 2 where images are 4 x 4")


@dataclass(frozen=True)
class EntropyBand:
    """What AdaSG's and AdaDFQ's generators learn in the cross-entropy's place: to disagree with the student, in bounds.

    Defaults are AdaDFQ's on CIFAR and ResNet-18.
    """

    low: float = 0.1  # l_low; 0.3 in AdaSG
    high: float = 0.8  # l_up
    weight: float = 1.0
    disagreement: float = 0.2  # of CE(f - q, y); 0.1 in AdaSG
    agreement: float = 0.1  # of CE(f + q, y)

    def __post_init__(self) -> None:
        bounds = 0 <= self.low < self.high <= 1
        require("EntropyBand", "low", self.low, bounds, f"be at least 0 and below high = {self.high}, at most 1")
        for name in ("weight", "disagreement", "agreement"):
            require("EntropyBand", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")


class GeneratorTrainer:
    """A generator with its optimizer and its random draws, one step at a time, for whoever has its loss.

    Args:
        stage: whose random streams the start, the noise and the labels come from; torch's own are left alone.
        num_classes: K, labels.
        shape: (C, H, W) of the images.
        config: network, batch size, learning rate.
        device: where it works.

    Attributes:
        parameters: what ``step`` wants gradients for, in this order.

    Raises:
        ValueError: the generator cannot make such images, see ``GeneratorConfig.check``.

    Example:
        >>> from zsq_ext.core.progress import QUIET
        >>> from zsq_ext.core.run import Run
        >>> trainer = GeneratorTrainer(Stage(Run(None, {}), "g", 0, QUIET), 10, (3, 8, 8), GeneratorConfig(), "cpu")
        >>> images = trainer.images(*trainer.draw(0))
        >>> trainer.step(torch.autograd.grad(images.square().sum(), trainer.parameters), 0)
    """

    def __init__(
        self,
        stage: Stage,
        num_classes: int,
        shape: tuple[int, int, int],
        config: GeneratorConfig,
        device: torch.device | str,
    ) -> None:
        config.check(shape)
        self.stage, self.num_classes, self.shape, self.config = stage, num_classes, shape, config
        self.device = torch.device(device)
        # torch initialises layers from its global stream only, so that one is borrowed: the host's alone, no device's
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(stage.stream("generator").initial_seed())
            self.generator = Generator(num_classes, shape, config.latent, config.kind).to(self.device)
        self.parameters = list(self.generator.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, betas=config.betas)

    def draw(self, n: int, name: str = "latent") -> tuple[Tensor, Tensor]:
        """The n-th batch of noise (batch, latent) and labels (batch,) int64 of the stream of that name."""
        config, stream = self.config, self.stage.stream(name, n, self.device)
        z = torch.randn(config.batch, config.latent, generator=stream, device=self.device)
        return z, torch.randint(self.num_classes, (config.batch,), generator=stream, device=self.device)

    def images(self, z: Tensor, labels: Tensor) -> Tensor:
        """The images (N, C, H, W) for noise (N, latent) and labels (N,), differentiable in the parameters."""
        return self.generator(z, labels)

    def step(self, gradients: Sequence[Tensor], n: int) -> None:
        """Moves the parameters by their gradients, at the learning rate of step ``n``."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(n)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sample(self, count: int, name: str = "sample") -> tuple[Tensor, Tensor]:
        """Images (count, C, H, W) float32 and their labels (count,), as the generator stands.

        They are made in whole batches, by whose statistics the norms go as they do in training, so the first of many
        are the same as few.
        """
        images = torch.empty(count, *self.shape, device=self.device)
        labels = torch.empty(count, dtype=torch.int64, device=self.device)
        for n, begin in enumerate(range(0, count, self.config.batch)):
            z, drawn = self.draw(n, name)
            kept = min(len(z), count - begin)
            images[begin : begin + kept] = self.images(z, drawn)[:kept]
            labels[begin : begin + kept] = drawn[:kept]
        return images, labels

    def state(self) -> tuple[dict[str, Tensor], dict[str, torch.optim.Optimizer]]:
        """Tensors and optimizers by name, for a ``core.steps.State``."""
        tensors = self.generator.state_dict(prefix="generator.", keep_vars=True)
        return tensors, {"generator": self.optimizer}


def generator_terms(seen: Context, target: Statistics, config: GeneratorConfig) -> Terms:
    """What a generator learns from the teacher alone, each term times its weight; a weight of 0 leaves a term out.

        ce CE(teacher(x), y) + bns BNS(x)

    Source: GDFQ (arXiv 2003.03603), equations 5-8.
    """
    terms = {}
    if config.ce > 0:
        terms["ce"] = config.ce * cross_entropy(seen.logits, seen.labels)
    if config.bns > 0:
        terms["bns"] = config.bns * bn_statistics_loss(seen.statistics, target)
    return terms


def train_generator(
    trainer: GeneratorTrainer,
    teacher: Teacher,
    steps: int,
    *,
    on_images: Callable[[Tensor], None] | None = None,
    extra_state: Mapping[str, Tensor] | None = None,
) -> list[dict]:
    """Trains a generator on the teacher alone, by ``generator_terms``; it goes on where the trainer's stage stands.

    Args:
        trainer: the generator; its stage keeps the checkpoints.
        teacher: the frozen network.
        steps: how many.
        on_images: called with each detached batch (N, C, H, W), from before the generator's step, to calibrate ranges
            for instance.
        extra_state: tensors that ``on_images`` changes, so that checkpoints hold them too.

    Returns:
        The loss history.

    Raises:
        ValueError: the generator has other classes than the teacher, or nothing to learn.
        Diverged: a loss term was not finite.

    Source: GDFQ; the released code of SynQ, HAST and IntraQ for the use as calibration.
    """
    check_classes(trainer, teacher)
    config = trainer.config
    require("train_generator", "bns", config.bns, config.ce + config.bns > 0, "be positive where ce is 0")

    def step(n: int) -> Terms:
        z, labels = trainer.draw(n)
        images = trainer.images(z, labels)
        terms = generator_terms(teacher.observe(images, labels), teacher.target, config)
        loss = sum_terms(terms)
        trainer.step(torch.autograd.grad(loss, trainer.parameters), n)
        if on_images is not None:
            on_images(images.detach())
        return terms

    tensors, optimizers = trainer.state()
    state = State({**tensors, **(extra_state or {})}, optimizers)
    return run_steps(trainer.stage, steps, step, state, advice=ADVICE)


def check_classes(trainer: GeneratorTrainer, teacher: Teacher) -> None:
    """Raises ValueError unless the generator's labels are the teacher's classes."""
    require("GeneratorTrainer", "teacher", type(teacher).__name__, is_classifier(teacher.module), "be a classifier's")
    classes = int(outputs(teacher.module)[""].meta["val"].shape[1])
    rule = f"be the teacher's {classes} outputs"
    require("GeneratorTrainer", "num_classes", trainer.num_classes, trainer.num_classes == classes, rule)
