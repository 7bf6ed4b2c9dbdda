"""What a method has to beat: ranges without tuning, and tuning on Gaussian noise."""

from __future__ import annotations

from dataclasses import replace

from zsq_ext.methods import synq
from zsq_ext.methods.qat import QatConfig


def minmax(preset: str, profile: str) -> QatConfig:
    """Min-max ranges from noise-optimised images (SynQ's), nothing tuned."""
    base = synq.config(preset, "repo")
    return replace(base, distill=replace(base.distill, ideas=()), ranges="images", tune=replace(base.tune, epochs=0))


def noise(preset: str, profile: str) -> QatConfig:
    """SynQ's tuning without its three ideas, on Gaussian noise with random labels: is the data of any use?"""
    base = synq.config(preset, "repo")
    ideas = tuple(idea for idea in base.distill.ideas if not isinstance(idea, synq.IDEAS))
    return replace(base, source="noise", distill=replace(base.distill, ideas=ideas), ranges="images")
