"""Published ideas that any method can switch on, as values: what they are, not how a loop runs them.

``zsq.quantize(..., ideas=(LowPass(d0=8), CamAlign(50.0), SoftLabels(0.5)))`` adds them to whatever the method does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from zsq_ext.core.check import require
from zsq_ext.synth.adversarial import DISCREPANCIES, MARGIN_FORMS


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


@dataclass(frozen=True)
class Agm:
    """AGM's first idea: the generator is pushed to where the networks still agree (``synth.adversarial``).

    The paper's text was not available to us, only its abstract: the formula and every default here are ours, derived
    from what the abstract asks for.

    Args:
        weight: of the loss beside the generator's own, >= 0; 0 is the method without AGM, bit for bit.
        form: ``"smooth_hinge"``, a hinge at a Gaussian margin; ``"gauss"`` or ``"erfc"``.
        discrepancy: ``"normalized"`` by the size of the teacher's logits, or ``"mse"``: root mean square, as they are.
        margin, sigma: m, up to where the push lasts, and s, how softly it fades; > 0. None finds both in the first
            epoch of tuning, in which the loss is off; ``"gauss"`` and ``"erfc"`` have no m.
        margin_factor: what m found so is of the networks' mean discrepancy, > 0.
        sigma_factor: what s is of m where it is not given, > 0.
        limit_below: the teacher's accuracy on the generator's images below which the push may be no longer than the
            rest of their gradient, in [0, 1].
    """

    weight: float = 1.0
    form: Literal["smooth_hinge", "gauss", "erfc"] = "smooth_hinge"
    discrepancy: Literal["normalized", "mse"] = "normalized"
    margin: float | None = None
    sigma: float | None = None
    margin_factor: float = 1.0
    sigma_factor: float = 0.5
    limit_below: float = 0.5

    def __post_init__(self) -> None:
        require("Agm", "weight", self.weight, self.weight >= 0, "be at least 0")
        require("Agm", "form", self.form, self.form in MARGIN_FORMS, f"be one of {', '.join(MARGIN_FORMS)}")
        kinds = f"be one of {', '.join(DISCREPANCIES)}"
        require("Agm", "discrepancy", self.discrepancy, self.discrepancy in DISCREPANCIES, kinds)
        for name in ("margin", "sigma"):
            value = getattr(self, name)
            require("Agm", name, value, value is None or 0 < value < math.inf, "be None or positive and finite")
        for name in ("margin_factor", "sigma_factor"):
            value = getattr(self, name)
            require("Agm", name, value, 0 < value < math.inf, "be positive and finite")
        require("Agm", "limit_below", self.limit_below, 0 <= self.limit_below <= 1, "be in [0, 1]")


@dataclass(frozen=True)
class Mix:
    """AGM's second idea: the student learns on interpolated images, with both labels (``tune.mix``).

    Of the paper's own scheme nothing but the name was available to us; the defaults are those of mixup.

    Args:
        a: the share of the first image is drawn from Beta(a, a), > 0.
        probability: of mixing a batch at all, in [0, 1]; 0 is the method without mixing, bit for bit.
        per_sample: a share for every image instead of one for the batch.
        teacher: ask the teacher about the mixed images; False mixes its answers on the two, which costs no forward but
            is not what it would say, and goes with no idea that compares maps or moves images.
    """

    a: float = 1.0
    probability: float = 1.0
    per_sample: bool = False
    teacher: bool = True

    def __post_init__(self) -> None:
        require("Mix", "a", self.a, 0 < self.a < math.inf, "be positive and finite")
        require("Mix", "probability", self.probability, 0 <= self.probability <= 1, "be in [0, 1]")
        for name in ("per_sample", "teacher"):
            require("Mix", name, getattr(self, name), isinstance(getattr(self, name), bool), "be True or False")


Idea = LowPass | CamAlign | SoftLabels | FeatureAlign | Perturb | Agm | Mix
BY_NAME = {cls.__name__: cls for cls in (LowPass, CamAlign, SoftLabels, FeatureAlign, Perturb, Agm, Mix)}


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
