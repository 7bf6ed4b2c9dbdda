"""Paired comparisons with few seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# two-sided 95 % quantiles of Student's t by degrees of freedom
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences and its 95 % t-interval; ``resolved`` if zero lies outside."""

    mean: float
    half_width: float
    pairs: int

    @property
    def resolved(self) -> bool:
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        text = f"{self.mean:+.2f} ± {self.half_width:.2f}"
        return text if self.resolved else f"{text} (not resolved)"


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The 95 % t-interval of ``first - second``, paired by position.

    Raises:
        ValueError: the lengths differ, or there are fewer than 2 or more than 11 pairs.
    """
    if len(first) != len(second) or not 2 <= len(first) <= len(_T95) + 1:
        raise ValueError(f"paired_interval: needs 2 to {len(_T95) + 1} pairs, got {len(first)} and {len(second)}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    deviation = statistics.stdev(differences)
    half = _T95[len(differences) - 2] * deviation / math.sqrt(len(differences))
    return Interval(statistics.fmean(differences), half, len(differences))
