"""How `cpu` and `cuda` call the native module's lp_error."""

import torch
from torch import Tensor

from zsq_ext.ops.layout import DTYPE_CODE, rows_along
from zsq_ext.ops.native.call import Call


def lp_error(
    call: Call, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, p: float, axis: int | None = None
) -> Tensor:
    x = rows_along(x, axis)
    channels, candidates = scale.shape
    error = torch.empty(scale.shape, dtype=torch.float64, device=x.device)
    fields = x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), error.data_ptr(), channels
    call.with_workspace(
        "lp_error", *fields, x.numel() // max(channels, 1), candidates, qmin, qmax, p, DTYPE_CODE[x.dtype]
    )
    return error
