"""What a backend of bn_act is told, and what it gives back.

An op registered with torch takes flat arguments; a backend meets them as these values.
"""

from typing import Any, NamedTuple

from torch import Tensor

# A layer in the schema of an op.
LAYER = (
    "Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, str act, "
    "Tensor? scale, Tensor? zero_point, int qmin, int qmax, bool clip"
)


class Norm(NamedTuple):
    """A batch norm in eval mode: (C,) each, in the type that computes.

    gamma and beta are None for 1 and 0; var is None where only the sums of u - mean are taken.
    """

    mean: Tensor
    var: Tensor = None  # type: ignore[assignment]
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 0.0


class Quant(NamedTuple):
    """The quantizer behind the activation: the grid of `fake_quant`, scale and zero_point of shape (1,) or (C,)."""

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    clip: bool  # the gradient passes inside the range alone (ste_clip), else everywhere (ste)

    @property
    def grid(self) -> tuple[Tensor, Tensor, int, int, int | None]:
        """As `fake_quant` takes it for (N, C, ...)."""
        return *self[:4], None if self.scale.numel() == 1 else 1


class Layer(NamedTuple):
    """What stands in a row: a batch norm, the activation behind it, and the quantizer behind that."""

    norm: Norm
    act: str = "none"
    quant: Quant | None = None

    @property
    def flat(self) -> tuple[Any, ...]:
        """In the order of LAYER."""
        return *self.norm, self.act, *(self.quant or (None, None, 0, 0, False))

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, gamma: Any, beta: Any, eps: float, act: str, *quant: Any) -> "Layer":
        """From what `flat` gave."""
        return cls(Norm(mean, var, gamma, beta, eps), act, None if quant[0] is None else Quant(*quant))

    @property
    def clips(self) -> bool:
        """Whether a gradient passes here whole or not at all, so that a bit per element says all about it."""
        return self.act in ("relu", "relu6") or (self.act == "none" and self.quant is not None and self.quant.clip)


class Grads(NamedTuple):
    """What a loss sends to y, S1 and S2; None where nothing came. Both sums or neither."""

    y: Tensor | None = None
    s1: Tensor | None = None
    s2: Tensor | None = None


class Outputs(NamedTuple):
    """What a forward is to give beside y: the sums over the "batch" or each "sample", the bits that pass, the ends.

    Of the ends of what enters the quantizer the smallest come first: [2, C], in the type that computes.
    """

    stats: str | None = None
    mask: bool = False
    extremes: bool = False


# What a forward gives: y, S1, S2, the mask and the ends; empty what is not wanted.
Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Needs(NamedTuple):
    """Which gradients a backward is to give: of u, of the residual, and of gamma and beta."""

    u: bool = True
    residual: bool = False
    affine: bool = False
