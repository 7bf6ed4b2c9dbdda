"""HAST: Hard Sample Matters a Lot in Zero-Shot Quantization. Li et al., CVPR 2023, arXiv 2303.13826.

Only the released code was available to us. It is SynQ's pipeline without SynQ's three ideas: hard samples are made by
the focal weight, made harder by a perturbation, and matched by feature alignment; the cross-entropy is not used.
"""

from __future__ import annotations

from dataclasses import replace

from zsq_ext.methods import synq
from zsq_ext.methods.qat import QatConfig
from zsq_ext.tune.ideas import FeatureAlign, Perturb

run = synq.run  # without ideas it is HAST's pipeline


def config(preset: str, profile: str) -> QatConfig:
    """HAST's hyperparameters; only those that differ from SynQ's released generation and loop are written out."""
    base = synq.config(preset, "repo")
    ideas = (
        FeatureAlign(weight=1000),  # hard-coded; the configurations' 1000, 2000 and 4000 are ignored
        Perturb(weight=1, eps=0.01, feature_alignment=True),
    )
    tune = base.tune
    if preset != "smoke":
        tune = replace(tune, epochs=147, lr=1e-5 if preset == "cifar" else 1e-6)  # 151 less 4 of warm-up
    return replace(base, distill=replace(base.distill, ce=0.0, ideas=ideas), tune=tune)
