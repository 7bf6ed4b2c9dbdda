"""The generator engine, in the one form that range calibration needs: GDFQ's for 32 x 32 images (Xu et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zsq_ext.core.check import require
from zsq_ext.core.steps import Stage, State, Terms, run_steps
from zsq_ext.synth.objectives import bn_statistics_loss, cross_entropy
from zsq_ext.synth.teacher import Teacher

ADVICE = "Try a lower learning rate (generator.lr), or calibrate on the images themselves (ranges='images')."


@dataclass(frozen=True)
class GeneratorConfig:
    """Training the generator. Defaults: GDFQ's, with the batch size that IntraQ, HAST and SynQ use for calibration."""

    steps: int = 800  # 4 epochs of 200
    batch: int = 16
    latent: int = 100
    lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    bns: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "latent"):
            require("GeneratorConfig", name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        require("GeneratorConfig", "lr", self.lr, self.lr > 0, "be positive")
        require("GeneratorConfig", "bns", self.bns, self.bns >= 0, "be at least 0")


class Generator(nn.Module):
    """Class embedding times noise, then two rounds of upsampling and convolution; a last affine-free batch norm makes
    the images zero-mean and unit-variance, as normalised inputs are.

    Args:
        num_classes: labels.
        shape: (C, H, W) of the images, H and W multiples of 4.
        latent: size of the noise.

    Input z (N, latent) and labels (N,); output (N, C, H, W). It always normalises by batch statistics.
    """

    # the published code passes 0.8 where batch norm takes eps (it may have meant momentum); it defines the behaviour
    EPS = 0.8

    def __init__(self, num_classes: int, shape: tuple[int, int, int], latent: int = 100) -> None:
        super().__init__()
        self.check(shape)
        channels, height, width = shape
        self.small = (128, height // 4, width // 4)
        self.embedding = nn.Embedding(num_classes, latent)
        self.project = nn.Linear(latent, self.small[0] * self.small[1] * self.small[2])
        self.body = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128, eps=self.EPS),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, padding=1),
            nn.BatchNorm2d(64, eps=self.EPS),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    @staticmethod
    def check(shape: tuple[int, int, int]) -> None:
        """Refuses a shape that the generator cannot make."""
        if shape[1] % 4 or shape[2] % 4:
            raise ValueError(
                "Generator: input_shape must have height and width divisible by 4 where ranges come from a generator, "
                f"got {shape}; ranges='images' takes any"
            )

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        hidden = self.project(self.embedding(labels) * z)
        return self.body(hidden.view(-1, *self.small))


def train_generator(
    stage: Stage,
    teacher: Teacher,
    num_classes: int,
    shape: tuple[int, int, int],
    config: GeneratorConfig,
    *,
    on_images: Callable[[Tensor], None],
    extra_state: dict[str, Tensor],
) -> list[dict]:
    """Trains a GDFQ generator and hands every batch of images to ``on_images`` (to calibrate ranges, for instance).

        loss = CE(teacher(G(z, y)), y) + 0.1 BNS

    Args:
        stage: as for the other engines.
        teacher: the frozen network.
        num_classes, shape: what the generator makes.
        config: steps, batch and learning rate.
        on_images: called with each detached batch (N, C, H, W), from before the generator's step.
        extra_state: tensors that ``on_images`` changes, so that checkpoints hold them too.

    Returns:
        The loss history.

    Source: GDFQ (Xu et al. 2020), equations 5-8; released code of SynQ, HAST and IntraQ for the use as calibration.
    """
    device = teacher.target.mean.device
    # torch initialises layers from its global stream only, so that one is borrowed: the host's alone, no device's
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(stage.stream("generator").initial_seed())
        generator = Generator(num_classes, shape, config.latent).to(device).train()
    parameters = list(generator.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.lr, betas=config.betas)

    def step(n: int) -> Terms:
        draw = stage.stream("latent", n, device)
        z = torch.randn(config.batch, config.latent, generator=draw, device=device)
        labels = torch.randint(num_classes, (config.batch,), generator=draw, device=device)
        images = generator(z, labels)
        context = teacher.observe(images, labels)
        bns = bn_statistics_loss(context.statistics, teacher.target)
        terms = {"ce": cross_entropy(context.logits, labels), "bns": config.bns * bns}
        gradients = torch.autograd.grad(terms["ce"] + terms["bns"], parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        on_images(images.detach())
        return terms

    state = State({**generator.state_dict(keep_vars=True), **extra_state}, {"adam": optimizer})
    return run_steps(stage, config.steps, step, state, advice=ADVICE)
