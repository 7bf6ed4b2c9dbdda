"""The methods by name, and the tunings that can take the place of their second half.

A method is one file with ``config(preset, profile)``, which gives its ``Recipe``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from zsq_ext.methods import agm, controls, dfq, dgh, gdfq, hast, synq
from zsq_ext.methods.alternating import Alternating
from zsq_ext.methods.ptq import reconstruction
from zsq_ext.methods.qat import Qat
from zsq_ext.methods.recipe import Recipe, Tuning

PRESETS = ("smoke", "cifar", "imagenet")


@dataclass(frozen=True)
class Method:
    """A method as the front door sees it.

    ``profiles`` are the variants where sources differ, the default first; ``placement`` and ``edge_bits`` are where and
    how finely it quantizes unless told otherwise. ``makes_images`` unless it does without.
    """

    summary: str
    config: Callable[[str, str], Recipe]
    profiles: tuple[str, ...] = ("repo",)
    placement: str = "after_relu"
    edge_bits: int | None = None
    makes_images: bool = True


METHODS = {
    "synq": Method("SynQ, ICLR 2025", synq.config, profiles=("repo", "paper")),
    "hast": Method("HAST, CVPR 2023: SynQ's pipeline without its three ideas", hast.config),
    "dgh": Method("DGH, WACV 2025", dgh.config, profiles=dgh.PROFILES, placement="all_layers"),
    "agm": Method("AGM, TCSVT 2024, derived from its abstract, on KMDFQ", agm.config, profiles=agm.PROFILES),
    "gdfq": Method("GDFQ, ECCV 2020: a generator trained in turns with the student", gdfq.recipe(gdfq.gdfq)),
    "kmdfq": Method("KMDFQ: GDFQ with squared errors of the logits", gdfq.recipe(gdfq.kmdfq)),
    "adadfq": Method("AdaDFQ, CVPR 2023: GDFQ with a band of disagreement", gdfq.recipe(gdfq.adadfq)),
    "dfq": Method("DFQ, ICCV 2019: weights rewritten, no images", dfq.config, makes_images=False),
    "minmax": Method("control: ranges from synthetic images, nothing tuned", controls.minmax),
    "noise": Method("control: tuned on Gaussian noise", controls.noise),
}

RECONSTRUCTIONS = ("brecq", "genie_m", "adaround")
TUNINGS = ("qat", *RECONSTRUCTIONS, "dfq", "none")


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def tuning(name: str, preset: str, own: Tuning) -> Tuning:
    """The tuning of that name, for a method whose own is another.

    Args:
        name: ``"qat"``: the method's own fine-tuning, or SynQ's without its three ideas on a fixed set; ``"brecq"``,
            ``"genie_m"`` or ``"adaround"``: reconstruction; ``"dfq"``: equalisation and bias correction; ``"none"``:
            ranges alone.
        preset: size of the run.
        own: what the method does.

    Raises:
        ValueError: there is no such tuning, or the method is one that tunes nothing.
    """
    if name not in TUNINGS:
        raise ValueError(f"quantize: tune must be one of {', '.join(TUNINGS)}, got {name!r}")
    if name in RECONSTRUCTIONS:
        return reconstruction(name, preset)
    if name == "dfq":
        return dfq.Dfq(ranges="images")
    if name == "none":
        if isinstance(own, Qat):
            return replace(own, finetune=replace(own.finetune, epochs=0))
        return controls.ranges_alone(preset)
    if isinstance(own, Alternating):
        return own
    if not isinstance(own, Qat):
        return synq.plain_tuning(preset)
    if own.finetune.epochs == 0:
        raise ValueError("quantize: tune must be left out or 'none' where the method tunes nothing, got 'qat'")
    return own
