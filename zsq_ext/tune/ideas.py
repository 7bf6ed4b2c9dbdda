"""Published ideas that any method can switch on, as values: what they are, not how a loop runs them.

``zsq.quantize(..., ideas=(LowPass(d0=8), CamAlign(50.0), SoftLabels(0.5)))`` adds them to whatever the method does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from zsq_ext.core.check import require


@dataclass(frozen=True)
class LowPass:
    """SynQ's first idea: a Gaussian low-pass filter on the images (arXiv 2603.18423, eq. 4).

    Args:
        d0: the cut in frequency bins, > 0. At 32 x 32 the published grid (20 to 100) hardly filters; 8 does.
        when: ``"once"``, before tuning (paper), or ``"step"``, after the augmentation of every batch (released code).
    """

    d0: float = 80.0
    when: Literal["once", "step"] = "step"

    def __post_init__(self) -> None:
        require("LowPass", "d0", self.d0, self.d0 > 0, "be positive")
        require("LowPass", "when", self.when, self.when in ("once", "step"), 'be "once" or "step"')


@dataclass(frozen=True)
class CamAlign:
    """SynQ's second idea: the student looks where the teacher looks (arXiv 2603.18423, eq. 5).

    Args:
        weight: lambda_CAM, >= 0.
        rule: the class that is mapped: ``"argmax"`` of each network (released) or the ``"label"`` (paper).
        clamp: drop negative channel weights (released); the paper keeps them.
        normalise: ``"minmax_upsampled"`` (released), ``"raw"`` (paper) or ``"minmax_native"``.
    """

    weight: float = 50.0
    rule: Literal["argmax", "label"] = "argmax"
    clamp: bool = True
    normalise: Literal["minmax_upsampled", "raw", "minmax_native"] = "minmax_upsampled"

    def __post_init__(self) -> None:
        require("CamAlign", "weight", self.weight, self.weight >= 0, "be at least 0")
        require("CamAlign", "rule", self.rule, self.rule in ("argmax", "label"), 'be "argmax" or "label"')
        forms = ("minmax_upsampled", "raw", "minmax_native")
        require("CamAlign", "normalise", self.normalise, self.normalise in forms, f"be one of {', '.join(forms)}")


@dataclass(frozen=True)
class SoftLabels:
    """SynQ's third idea: no hard label for images that the teacher itself finds difficult.

    Args:
        tau: the difficulty up to which the hard label counts, in [0, 1]; 1 trusts every label.
        strict: below ``tau`` (released) instead of up to it (paper).
    """

    tau: float = 0.5
    strict: bool = True

    def __post_init__(self) -> None:
        require("SoftLabels", "tau", self.tau, 0 <= self.tau <= 1, "be in [0, 1]")


@dataclass(frozen=True)
class FeatureAlign:
    """HAST's feature alignment: channel energies of every block's body agree.

    Args:
        weight: lam, >= 0. 1000 is what the released code runs with, whatever its configuration says.
    """

    weight: float = 1000.0

    def __post_init__(self) -> None:
        require("FeatureAlign", "weight", self.weight, self.weight >= 0, "be at least 0")


@dataclass(frozen=True)
class Perturb:
    """HAST's sample-difficulty promotion: the loss once more, on images moved against the student.

    Args:
        weight: lambda_pert, >= 0.
        eps: the step in normalised units, > 0.
        through_teacher: let the direction see the teacher's answer move too, as released.
        feature_alignment: repeat the feature alignment on the moved images (released: on ImageNet only).
    """

    weight: float = 1.0
    eps: float = 0.01
    through_teacher: bool = True
    feature_alignment: bool = False

    def __post_init__(self) -> None:
        require("Perturb", "weight", self.weight, self.weight >= 0, "be at least 0")
        require("Perturb", "eps", self.eps, self.eps > 0, "be positive")


Idea = LowPass | CamAlign | SoftLabels | FeatureAlign | Perturb
BY_NAME = {cls.__name__: cls for cls in (LowPass, CamAlign, SoftLabels, FeatureAlign, Perturb)}


def merge(ideas: tuple[Idea, ...], more: tuple[Idea, ...]) -> tuple[Idea, ...]:
    """The first ideas with the second ones added; of one kind the later replaces the earlier."""
    for idea in more:
        if type(idea) not in BY_NAME.values():
            raise TypeError(f"quantize: ideas must be instances of {', '.join(BY_NAME)}, got {idea!r}")
    kinds = {type(idea): idea for idea in (*ideas, *more)}
    return tuple(kinds.values())


def to_dict(idea: Idea) -> dict[str, Any]:
    """As JSON values, for a run's configuration."""
    return {"idea": type(idea).__name__, **{f.name: getattr(idea, f.name) for f in fields(idea)}}
