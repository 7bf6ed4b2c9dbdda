"""Which rows an accuracy table has: methods beside their controls, and a method without one of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from zsq_ext.methods import synq
from zsq_ext.methods.alternating import Distilling
from zsq_ext.methods.dgh import DghImages
from zsq_ext.methods.images import PixelImages
from zsq_ext.methods.recipe import Recipe
from zsq_ext.tune.ideas import CamAlign, FeatureAlign, Idea, LowPass, Perturb, SoftLabels


@dataclass(frozen=True)
class Variant:
    """One row of a table per seed: a method, where its images come from, and what is changed about its recipe."""

    name: str
    method: str
    images: str = "own"  # the method's, "noise" or "real"
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe


def with_ideas(change: Callable[[tuple[Idea, ...]], tuple[Idea, ...]]) -> Callable[[Recipe], Recipe]:
    """Changes the ideas of a fine-tuning."""

    def changed(recipe: Recipe) -> Recipe:
        tune = recipe.tune
        if not isinstance(tune, Distilling):
            raise TypeError(f"accuracy: ideas must belong to a fine-tuning, got {type(tune).__name__}")
        distill = replace(tune.distill, ideas=change(tune.distill.ideas))
        return replace(recipe, tune=replace(tune, distill=distill))

    return changed


def without(*kinds: type) -> Callable[[Recipe], Recipe]:
    """Switches ideas off."""
    return with_ideas(lambda ideas: tuple(idea for idea in ideas if not isinstance(idea, kinds)))


def with_cut(d0: float) -> Callable[[Recipe], Recipe]:
    """Moves the low-pass filter's cut."""
    return with_ideas(lambda ideas: tuple(replace(i, d0=d0) if isinstance(i, LowPass) else i for i in ideas))


# noise, no ideas and real share their tuning and differ in the images; SynQ and no ideas differ in the ideas
VARIANTS = (
    Variant("min-max", "minmax"),
    Variant("noise", "noise"),
    Variant("SynQ", "synq"),
    Variant("SynQ without its ideas", "synq", change=without(*synq.IDEAS)),
    Variant("real images", "synq", "real", without(*synq.IDEAS)),
)
ABLATIONS = (
    Variant("SynQ - low-pass", "synq", change=without(LowPass)),
    Variant("SynQ - CAM", "synq", change=without(CamAlign)),
    Variant("SynQ - soft labels", "synq", change=without(SoftLabels)),
    Variant("SynQ, low-pass at 80", "synq", change=with_cut(80)),  # as released
    Variant("SynQ - FA - perturbation", "synq", change=without(FeatureAlign, Perturb)),
)


# A depthwise network's statistics are harder to meet: after 50 steps its images' loss is three times the ResNet's.
# On the validation stream 150 steps bring the student as near to the teacher as real images do.
IMAGE_STEPS = {"mobilenet_small": 150}


def for_network(name: str, recipe: Recipe) -> Recipe:
    """A recipe with as many steps of image making as the network needs."""
    if not isinstance(recipe.images, PixelImages) or name not in IMAGE_STEPS:
        return recipe
    steps = IMAGE_STEPS[name]
    pixels = replace(recipe.images.pixels, iterations=steps, patience=max(20, steps // 4))
    return replace(recipe, images=replace(recipe.images, pixels=pixels))


def with_images(**values: Any) -> Callable[[Recipe], Recipe]:
    """Changes how DGH makes its images; a field of ``StoredConfig`` by its name."""

    def changed(recipe: Recipe) -> Recipe:
        images = recipe.images
        if not isinstance(images, DghImages):
            raise TypeError(f"accuracy: these images must be DGH's, got {type(images).__name__}")
        own = {name: values[name] for name in values.keys() & vars(images).keys()}
        stored = {name: value for name, value in values.items() if name not in own}
        return replace(recipe, images=replace(images, **own, stored=replace(images.stored, **stored)))

    return changed


# all rows share DGH's reconstruction and differ in the images alone
DGH_VARIANTS = (
    Variant("DGH", "dgh"),
    Variant("noise", "dgh", "noise"),
    Variant("real images", "dgh", "real"),
)
DGH_ABLATIONS = (
    Variant("DGH, statistics of each batch", "dgh", change=with_images(granularity="batch")),
    Variant("DGH, smoothed as at 224 px", "dgh", change=with_images(sigma=1.25)),
    Variant("DGH - stretching", "dgh", change=with_images(output=0.0)),
)


@dataclass(frozen=True)
class Plan:
    """Some rows of a table: every variant at all bits on one network, for so many seeds."""

    model: str
    variants: tuple[Variant, ...]
    bits: tuple[tuple[int, int | None], ...]
    seeds: int
    task: str = "textured_shapes"


W4A4, W3A3, W3, W8A8, W4A8 = (4, 4), (3, 3), (3, None), (8, 8), (4, 8)

TABLES = {
    "synq": (
        Plan("resnet20", VARIANTS, (W4A4, W3A3), 5),
        Plan("resnet20", ABLATIONS, (W3A3,), 5),
        Plan("mobilenet_small", VARIANTS, (W4A4, W3A3), 5),
    ),
    "dgh": (
        Plan("resnet20", DGH_VARIANTS, (W4A4, W3A3, W3), 5),
        Plan("resnet20", DGH_ABLATIONS, (W3A3,), 5),
        Plan("mobilenet_small", DGH_VARIANTS, (W4A4, W3A3), 3),
    ),
    "detection": (Plan("fpn_small", DGH_VARIANTS, (W8A8, W4A8), 3, "shape_scenes"),),
}
"""The plans of a table by what it is about; differences are taken to the first plan's first three variants."""
