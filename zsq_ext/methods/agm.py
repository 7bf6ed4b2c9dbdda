"""AGM: Learning to Generate Diverse Data From a Temporal Perspective for Data-Free Quantization. Luo et al., IEEE TCSVT
2024, 10.1109/TCSVT.2024.3399311.

The paper's text was not available to us, only its abstract: a generator's images grow alike late in a run; a loss that
pushes it the harder the less the networks disagree keeps it moving, and linear interpolation does the rest. The
framework is its authors' earlier one (``methods.gdfq``); the formula of the loss, its margin, its weight, its schedule
and the way of interpolating are derived from what the abstract asks for. So no number of the paper is quoted anywhere
here, and none of ours stands for it.
"""

from __future__ import annotations

from dataclasses import replace

from zsq_ext.methods import gdfq
from zsq_ext.methods.recipe import Recipe
from zsq_ext.tune.ideas import Agm, Mix

PROFILES = ("kmdfq", "gdfq", "adadfq")
"""What it is added to: the base whose authors are the paper's comes first."""

_BASES = {"kmdfq": gdfq.kmdfq, "gdfq": gdfq.gdfq, "adadfq": gdfq.adadfq}


def config(preset: str, profile: str) -> Recipe:
    """The base's recipe with both ideas: the loss in the generator's step, mixed images in the student's."""
    images, tune = _BASES[profile](preset)
    return Recipe(images, replace(tune, distill=replace(tune.distill, ideas=(Agm(), Mix()))))
