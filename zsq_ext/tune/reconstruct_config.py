"""How reconstruction goes about it: the published algorithms as settings of one loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zsq_ext.core.check import require
from zsq_ext.tune.units import GRANULARITIES


@dataclass(frozen=True)
class ReconstructConfig:
    """The reconstruction loop. Defaults: Genie-M (arXiv 2212.04780, released code)."""

    granularity: str = "block"  # "layer" is AdaRound's
    joint: bool = True  # rounding and all steps together; False: rounding first, then the activations' steps (BRECQ)
    iterations: int = 20000  # per unit
    batch: int = 32
    lr_rounding: float = 1e-3  # Adam, constant
    lr_weight_step: float = 1e-4  # Adam, cosine to 0; 0: the steps of the weights stay where the search put them
    lr_activation_step: float = 4e-5  # Adam, cosine to 0; 0: so do those of the activations
    activation_iterations: int = 5000  # per unit, where not joint
    rounding: float = 1.0  # weight of the rounding regulariser
    warmup: float = 0.2  # this part of the iterations goes without it
    beta: tuple[float, float] = (20.0, 2.0)  # its exponent, linear from the end of the warm-up to the last iteration
    qdrop: float = 0.5  # at the units' inputs and inside the activations' quantizers
    range_images: int = 32  # the activations' ranges are searched on the first so many images
    first_layer: bool = True  # BRECQ's release leaves the first layer to the nearest codes; DGH and Genie tune it
    chunk: int = 64  # images per forward outside the loop; no published counterpart
    cache_bytes: int = 2**32  # activations of all images: beyond it, in mapped files

    def __post_init__(self) -> None:
        def rule(name: str, holds: bool, text: str) -> None:
            require("ReconstructConfig", name, getattr(self, name), holds, text)

        rule("granularity", self.granularity in GRANULARITIES, f"be one of {', '.join(GRANULARITIES)}")
        for name in ("iterations", "activation_iterations", "cache_bytes"):
            rule(name, getattr(self, name) >= 0, "be at least 0")
        for name in ("batch", "range_images", "chunk"):
            rule(name, getattr(self, name) >= 1, "be at least 1")
        for name in ("lr_rounding", "lr_weight_step", "lr_activation_step", "rounding"):
            rule(name, getattr(self, name) >= 0, "be at least 0")
        rule("lr_weight_step", self.joint or self.lr_weight_step == 0, "be 0 unless steps are learned jointly")
        rule("warmup", 0 <= self.warmup <= 1, "be in [0, 1]")
        rule("beta", len(self.beta) == 2 and min(self.beta) >= 1, "be two exponents of at least 1")
        rule("qdrop", 0 <= self.qdrop <= 1, "be in [0, 1]")


GENIE_M = ReconstructConfig()

# BRECQ (arXiv 2102.05426) as the DGH repository runs it: plain squared error instead of the Fisher-weighted one, no
# QDrop. There the activations' steps come in a second sweep over the network; here behind each unit's own weights, so
# that later units already see them.
BRECQ = replace(
    GENIE_M,
    joint=False,
    lr_weight_step=0.0,
    lr_activation_step=4e-4,
    rounding=0.01,  # 0.1 for MobileNetV2
    qdrop=0.0,
    range_images=512,
)

# AdaRound (arXiv 2004.10568) in the form that BRECQ's and DGH's code give it: the same, layer by layer
ADAROUND = replace(BRECQ, granularity="layer")

KINDS = {"brecq": BRECQ, "genie_m": GENIE_M, "adaround": ADAROUND}
SIZES = ("smoke", "cifar", "imagenet")


def reconstruct_config(kind: str, size: str) -> ReconstructConfig:
    """The hyperparameters of a published algorithm for a size of problem.

    Args:
        kind: ``"brecq"``, ``"genie_m"`` or ``"adaround"``.
        size: ``"imagenet"`` and ``"cifar"``: as published, the same for both; ``"smoke"``: ours, about a minute on one
            core for the embedded ResNet-20.

    Raises:
        ValueError: there is no such kind or size.
    """
    require("reconstruct_config", "kind", kind, kind in KINDS, f"be one of {', '.join(KINDS)}")
    require("reconstruct_config", "size", size, size in SIZES, f"be one of {', '.join(SIZES)}")
    return _smoke(KINDS[kind]) if size == "smoke" else KINDS[kind]


def _smoke(config: ReconstructConfig) -> ReconstructConfig:
    """A hundredth of the iterations, at rates that move a rounding variable as far as it has to go in them."""
    return replace(
        config,
        iterations=200,
        activation_iterations=100,
        lr_rounding=3e-2,  # a variable of 0 is decided beyond +-2.4, 80 steps away
        lr_weight_step=1e-3 if config.lr_weight_step > 0 else 0.0,
        lr_activation_step=1e-3,
        rounding=0.1,  # chosen with the rates, on the embedded task's validation stream
        range_images=32,
    )
