"""GDFQ: Generative Low-bitwidth Data Free Quantization. Xu et al., ECCV 2020, arXiv 2003.03603; and its descendants.

KMDFQ and AdaDFQ are other losses and weights of the same algorithm; all three read off their released code (spec:
sections 2.7 and 3). How large the divergence is differs most between them: see ``ops.distill_head``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from zsq_ext.methods.alternating import Alternating
from zsq_ext.methods.generated import GeneratedImages
from zsq_ext.methods.recipe import Recipe
from zsq_ext.synth.drift import DriftConfig
from zsq_ext.synth.generate import EntropyBand, GeneratorConfig
from zsq_ext.tune.alternate import AlternateConfig
from zsq_ext.tune.distill import DistillConfig

Halves = tuple[GeneratedImages, Alternating]


def gdfq(preset: str) -> Halves:
    """Algorithm 1: the generator descends CE + 0.1 BNS, the student CE + T^2 KL."""
    distill = DistillConfig(kd="kl_mean", alpha=1.0, temperature=20.0, ce=1.0)
    return IMAGES[preset], Alternating(distill, TRAIN[preset], DRIFT[preset])


def kmdfq(preset: str) -> Halves:
    """KMDFQ: squared errors of the logits in the divergence's place, ten times the weight of the BN statistics."""
    images, train = IMAGES[preset], TRAIN[preset]
    if preset == "cifar":
        train = replace(train, warmup_epochs=20)  # README
    distill = DistillConfig(kd="mse", alpha=1.0, ce=1.0)
    generator = replace(images.generator, bns=1.0)  # README; the command line's default is 0.1
    return replace(images, generator=generator), Alternating(distill, train, DRIFT[preset])


def adadfq(preset: str) -> Halves:
    """AdaDFQ, CVPR 2023: the generator keeps the networks' disagreement in a band, and the student closes it.

    No cross-entropy on either side: labels enter by the generator's terms on f - q and f + q.
    """
    images, train, temperature = IMAGES[preset], TRAIN[preset], 20.0
    generator = replace(images.generator, ce=0.0, bns=1.0)
    if preset == "cifar":
        generator = replace(generator, batch=16)
    if preset == "imagenet":  # ResNet-18's
        generator, train = replace(generator, lr_epochs=(350, 400)), replace(train, lr=1e-5, lr_epochs=(350, 400))
        temperature = 5.0
    distill = DistillConfig(kd="entropy", alpha=1.0, temperature=temperature, ce=0.0)
    return replace(images, generator=generator, band=EntropyBand()), Alternating(distill, train, DRIFT[preset])


def recipe(halves: Callable[[str], Halves]) -> Callable[[str, str], Recipe]:
    """A method's ``config``: none of the three has profiles."""
    return lambda preset, profile: Recipe(*halves(preset))


IMAGES = {
    "imagenet": GeneratedImages(),
    "cifar": GeneratedImages(generator=GeneratorConfig(batch=200)),
    # ours: minutes on two cores. Not chosen by any measurement yet: on the embedded task 400 steps at these rates leave
    # the generator's cross-entropy at chance
    "smoke": GeneratedImages(
        images=256,
        held_out=64,
        generator=GeneratorConfig(batch=32, steps_per_epoch=40, lr_epochs=(5, 8)),
        steps=400,
    ),
}

TRAIN = {
    "imagenet": AlternateConfig(warmup_epochs=50, lr=1e-6),
    "cifar": AlternateConfig(),
    # ours, as for the images
    "smoke": AlternateConfig(
        epochs=10,
        steps_per_epoch=40,
        range_epochs=2,
        warmup_epochs=2,
        lr=1e-4,
        lr_epochs=(5, 8),
        clip=100.0,
    ),
}

DRIFT = {"imagenet": DriftConfig(), "cifar": DriftConfig(), "smoke": DriftConfig(latents=128, every_epochs=1)}
