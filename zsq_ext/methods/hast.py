"""HAST: Hard Sample Matters a Lot in Zero-Shot Quantization. Li et al., CVPR 2023, arXiv 2303.13826.

Only the released code was available to us. It is SynQ's pipeline without SynQ's three ideas: hard samples are made by
the focal weight, made harder by a perturbation, and matched by feature alignment; the cross-entropy is not used.
"""

from __future__ import annotations

from dataclasses import replace

from zsq_ext.methods import synq
from zsq_ext.methods.recipe import Recipe
from zsq_ext.tune.ideas import FeatureAlign, Perturb


def config(preset: str, profile: str) -> Recipe:
    """HAST's hyperparameters; only those that differ from SynQ's released generation and loop are written out."""
    tune = synq.TUNING[preset]
    ideas = (
        FeatureAlign(weight=1000),  # hard-coded; the configurations' 1000, 2000 and 4000 are ignored
        Perturb(weight=1, eps=0.01, feature_alignment=True),
    )
    finetune = tune.finetune
    if preset != "smoke":
        # 151 epochs less 4 of warm-up
        finetune = replace(finetune, epochs=147, lr=1e-5 if preset == "cifar" else 1e-6)
    distill = replace(tune.distill, ce=0.0, ideas=ideas)
    return Recipe(synq.IMAGES[preset], replace(tune, distill=distill, finetune=finetune))
