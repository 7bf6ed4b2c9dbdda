"""What a backend of distill_head is told. An op registered with torch takes flat arguments."""

from typing import NamedTuple

from torch import Tensor

# The terms in the schema of an op.
TERMS = "str kd, float alpha, float temperature, float ce"


class Terms(NamedTuple):
    """The loss: which divergence at which weight and temperature, and the cross-entropy's weight."""

    kd: str
    alpha: float
    temperature: float
    ce: float


class Trust(NamedTuple):
    """Which labels count: those of samples that are known to be easy, or whose difficulty is below tau, or all."""

    labels: Tensor | None
    easy: Tensor | None
    tau: float | None
    strict: bool


class Kept(NamedTuple):
    """What a forward leaves to the backward: the labels, who was easy, and the `rows` of `reference/heads.py`."""

    labels: Tensor | None
    easy: Tensor
    rows: Tensor


class Grads(NamedTuple):
    """What a loss sends to the divergence and to the cross-entropy; None where nothing came."""

    kd: Tensor | None
    ce: Tensor | None


class Needs(NamedTuple):
    """Which gradients a backward is to give."""

    student: bool
    teacher: bool
