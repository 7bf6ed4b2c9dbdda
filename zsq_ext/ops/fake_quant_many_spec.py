"""What a backend of fake_quant_many is told. An op registered with torch takes flat arguments."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

# The grids in the schema of an op.
GRIDS = "Tensor[] scales, Tensor[] zero_points, int[] qmin, int[] qmax, int[] axes"


class Grids(NamedTuple):
    """One grid for each tensor, as `fake_quant` takes it; an axis of -1 is none."""

    scales: list[Tensor]
    zero_points: list[Tensor]
    qmin: list[int]
    qmax: list[int]
    axes: list[int]

    def each(self) -> Iterator[tuple[Tensor, Tensor, int, int, int | None]]:
        """(scale, zero_point, qmin, qmax, axis) of each tensor."""
        for *grid, axis in zip(*self, strict=True):
            yield *grid, None if axis < 0 else axis  # type: ignore[misc]


class Needs(NamedTuple):
    """Which gradients a backward is to give: of each tensor, and the sums of its scale and zero-point."""

    dx: list[bool]
    sums: list[bool]
