"""fake_quant on the grid between a channel's own extremes, for many tensors at once."""

import torch
from torch import Tensor

from zsq_ext.ops.reference.channel_range import channel_range
from zsq_ext.ops.reference.fake_quant import fake_quant

# A narrower range counts as this wide.
SMALLEST_RANGE = 1e-8
# The smallest scale relative to the largest bound, below which a zero-point would no longer be exact in float32.
FINEST_SCALE = 2.0**-23


def minmax_grid(lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) of the signed grid of 2^bits codes from lo to hi, or, symmetric, around 0. [C] each."""
    bound = torch.maximum(lo.abs(), hi.abs())
    lo, hi = (-bound, bound) if symmetric else (lo, hi)
    width = (hi - lo).clamp_min(SMALLEST_RANGE)
    # a tensor divisor, because CUDA turns division by a Python number into a multiplication by its inverse
    scale = torch.maximum(width / torch.full_like(width, 2**bits - 1), bound * FINEST_SCALE)
    zero_point = -(2 ** (bits - 1)) - torch.round(lo / scale)
    return scale, (torch.zeros_like(scale) if symmetric else zero_point.nan_to_num(0)).to(torch.int32)


def fake_quant_minmax(
    tensors: list[Tensor], bits: list[int], axes: list[int], symmetric: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(outs, scale, zero_point), the last two of all channels of all tensors, one after the other."""
    outs, scales, zero_points = [], [], []
    for t, b, axis in zip(tensors, bits, axes, strict=True):
        scale, zero_point = minmax_grid(*channel_range(t, axis), b, symmetric)
        outs.append(fake_quant(t, scale, zero_point, -(2 ** (b - 1)), 2 ** (b - 1) - 1, axis))
        scales.append(scale)
        zero_points.append(zero_point)
    return outs, torch.cat(scales), torch.cat(zero_points)


def fake_quant_minmax_out(
    tensors: list[Tensor], bits: list[int], axes: list[int], symmetric: bool, outs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    found, scale, zero_point = fake_quant_minmax(tensors, bits, axes, symmetric)
    for out, t in zip(outs, found, strict=True):
        out.copy_(t)
    return scale, zero_point
