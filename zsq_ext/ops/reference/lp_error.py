"""How far a quantizer is from a tensor, for many grids at once."""

import torch
from torch import Tensor

from zsq_ext.ops.reference.fake_quant import fake_quant


def lp_error(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, p: float, axis: int | None = None
) -> Tensor:
    """[C, K] float64, the sum of |x - x_hat|^p over a channel, for scale and zero_point [C, K]: K grids of each."""
    rows = (x[None] if axis is None else x.movedim(axis, 0)).to(scale.dtype)
    others = tuple(range(1, rows.dim()))
    error = torch.empty_like(scale, dtype=torch.float64)
    for k in range(scale.size(1)):
        d = (rows - fake_quant(rows, scale[:, k], zero_point[:, k], qmin, qmax, 0)).abs().double().pow(p)
        error[:, k] = d.sum(others) if others else d
    return error
