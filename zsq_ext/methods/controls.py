"""What a method has to beat: ranges without tuning, and tuning on Gaussian noise."""

from __future__ import annotations

from dataclasses import replace

from zsq_ext.methods import synq
from zsq_ext.methods.images import GaussianImages
from zsq_ext.methods.qat import Qat
from zsq_ext.methods.recipe import Recipe


def minmax(preset: str, profile: str) -> Recipe:
    """Min-max ranges from noise-optimised images (SynQ's), nothing tuned."""
    return Recipe(synq.IMAGES[preset], ranges_alone(preset))


def noise(preset: str, profile: str) -> Recipe:
    """SynQ's tuning without its three ideas, on Gaussian noise with random labels: is the data of any use?"""
    own = synq.IMAGES[preset]
    return Recipe(GaussianImages(own.images, own.held_out), synq.plain_tuning(preset))


def ranges_alone(preset: str) -> Qat:
    """Ranges from the images, nothing tuned."""
    tune = synq.plain_tuning(preset)
    distill, finetune = replace(tune.distill, ideas=()), replace(tune.finetune, epochs=0)
    return replace(tune, distill=distill, finetune=finetune)
