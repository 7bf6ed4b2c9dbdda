"""fake_quant and its gradients for many tensors: one after the other.

Everything comes in lists of one entry per tensor; an axis of -1 is none.
"""

import torch
from torch import Tensor

from zsq_ext.ops.reference.fake_quant import fake_quant, fake_quant_lsq_backward


def fake_quant_many(
    tensors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    qmin: list[int],
    qmax: list[int],
    axes: list[int],
) -> list[Tensor]:
    each = zip(tensors, scales, zero_points, qmin, qmax, axes, strict=True)
    return [fake_quant(x, s, z, low, high, None if axis < 0 else axis) for x, s, z, low, high, axis in each]


def fake_quant_many_out(
    tensors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    qmin: list[int],
    qmax: list[int],
    axes: list[int],
    outs: list[Tensor],
) -> None:
    for out, found in zip(outs, fake_quant_many(tensors, scales, zero_points, qmin, qmax, axes), strict=True):
        out.copy_(found)


def fake_quant_many_backward(
    grads: list[Tensor],
    tensors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    qmin: list[int],
    qmax: list[int],
    axes: list[int],
    need_dx: list[bool],
    need_sums: list[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(dx, dscale, dzero_point): dx of the tensors that need it, and of those that need them all sums in a row."""
    each = zip(grads, tensors, scales, zero_points, qmin, qmax, axes, strict=True)
    found = [
        fake_quant_lsq_backward(g, x, s, z, low, high, None if axis < 0 else axis)
        for g, x, s, z, low, high, axis in each
    ]
    dx = [one[0] for one, need in zip(found, need_dx, strict=True) if need]
    sums = [one[1:] for one, need in zip(found, need_sums, strict=True) if need]
    none = scales[0].new_empty(0)
    dscale, dzero_point = (torch.cat([none, *(one[k].flatten() for one in sums)]) for k in (0, 1))
    return dx, dscale, dzero_point
