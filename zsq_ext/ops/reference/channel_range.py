"""The extremes of a tensor or of its channels."""

import torch
from torch import Tensor

from zsq_ext.ops.layout import COMPUTE


def channel_range(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """(lo, hi), each [1] or [C], in the type that computes. x is not empty. NaN makes its channel's ends NaN."""
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.size(axis), -1)
    lo, hi = torch.aminmax(rows, dim=1)
    # a zero is reported as +0, whichever was met first
    return lo.to(COMPUTE[x.dtype]) + 0.0, hi.to(COMPUTE[x.dtype]) + 0.0
