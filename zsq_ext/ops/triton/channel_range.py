"""channel_range on Triton."""

import torch
from torch import Tensor

from zsq_ext.ops.layout import channels_of, is_dense
from zsq_ext.ops.triton.launch import kernels, on_device_of


def channel_range(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    x = x if is_dense(x) else torch.empty_like(x).copy_(x)
    channels = 1 if axis is None else x.size(axis)
    n, shape = x.numel(), torch.empty(channels, device="meta")
    _, inner = channels_of(x, shape, axis)
    cut = kernels("channel_range").cut_of(n, channels, inner)
    lo, hi = (torch.empty(channels, cut.parts, device=x.device) for _ in range(2))
    with on_device_of(x):
        kernels("channel_range").channel_range(x, lo, hi, n, channels, inner, cut)
        return lo.amin(1) + 0.0, hi.amax(1) + 0.0
