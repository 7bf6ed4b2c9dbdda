"""How `cpu` and `cuda` call the native module's channel_range."""

import torch
from torch import Tensor

from zsq_ext.ops.layout import COMPUTE, DTYPE_CODE, channels_of, is_dense
from zsq_ext.ops.native.call import Call


def channel_range(call: Call, x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    x = x if is_dense(x) else torch.empty_like(x).copy_(x)
    lo = torch.empty(1 if axis is None else x.size(axis), dtype=COMPUTE[x.dtype], device=x.device)
    hi = torch.empty_like(lo)
    fields = x.data_ptr(), lo.data_ptr(), hi.data_ptr(), x.numel(), *channels_of(x, lo, axis), DTYPE_CODE[x.dtype]
    call.with_workspace("channel_range", *fields)
    return lo, hi
