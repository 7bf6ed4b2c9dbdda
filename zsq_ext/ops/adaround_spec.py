"""What a backend of adaround is told. An op registered with torch takes flat arguments."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

# A rounding in the schema of an op.
ROUNDING = "Tensor[] base, Tensor[] scale, Tensor[] zero_point, int[] qmin, int[] qmax, int? axis"


class Rounding(NamedTuple):
    """What each v, the variable, decides about: one entry for each weight, and the channels' axis of them all."""

    base: list[Tensor]
    scale: list[Tensor]
    zero_point: list[Tensor]
    qmin: list[int]
    qmax: list[int]
    axis: int | None

    def each(self) -> Iterator[tuple[Tensor, Tensor, Tensor, int, int]]:
        """(base, scale, zero_point, qmin, qmax) of each weight."""
        return zip(*self[:-1], strict=True)
