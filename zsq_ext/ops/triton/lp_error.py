"""lp_error on Triton."""

import torch
from torch import Tensor

from zsq_ext.ops.layout import rows_along
from zsq_ext.ops.triton.launch import kernels, on_device_of


def lp_error(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, p: float, axis: int | None = None
) -> Tensor:
    x = rows_along(x, axis)
    length = x.numel() // max(scale.size(0), 1)
    _, chunks = kernels("lp_error").cut_of(length)
    sums = torch.empty(scale.size(0), chunks, scale.size(1), dtype=torch.float64, device=x.device)
    with on_device_of(x):
        kernels("lp_error").lp_error(x, scale, zero_point, sums, length, qmin, qmax, p)
        return sums.sum(1)
