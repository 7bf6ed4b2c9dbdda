"""The methods by name. A method is one file with ``config(preset, profile)`` and ``run(job, config)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zsq_ext.methods import controls, hast, synq
from zsq_ext.methods.job import Images, Job, Outcome
from zsq_ext.methods.qat import QatConfig, synthesise

PRESETS = ("smoke", "cifar", "imagenet")


@dataclass(frozen=True)
class Method:
    """A method as the front door sees it.

    ``run`` does all of it, ``synthesise`` makes the images alone. ``profiles`` are the variants where sources differ,
    the default first; ``placement`` and ``edge_bits`` are where and how finely it quantizes unless told otherwise.
    """

    summary: str
    config: Callable[[str, str], QatConfig]
    run: Callable[[Job, QatConfig], Outcome]
    synthesise: Callable[[Job, QatConfig], Images] = synthesise
    profiles: tuple[str, ...] = ("repo",)
    placement: str = "after_relu"
    edge_bits: int | None = None


METHODS = {
    "synq": Method("SynQ, ICLR 2025", synq.config, synq.run, profiles=("repo", "paper")),
    "hast": Method("HAST, CVPR 2023: SynQ's pipeline without its three ideas", hast.config, hast.run),
    "minmax": Method("control: ranges from synthetic images, nothing tuned", controls.minmax, synq.run),
    "noise": Method("control: tuned on Gaussian noise", controls.noise, synq.run),
}


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
