"""fake_quant and its gradients.

Shapes: x is any shape; scale and zero_point are [1], or [C] with C = x.shape[axis]. A zero_point is int32, or has
scale's dtype and is rounded half to even before anything else.
"""

import torch
from torch import Tensor


def _grid(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """x in the type that computes (float32, or float64 for float64), and the grid shaped to broadcast over it."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = scale.numel()
    return x.to(scale.dtype), scale.reshape(shape), zero_point.to(scale.dtype).round().reshape(shape)


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    v, s, z = _grid(x, scale, zero_point, axis)
    code = (torch.round(v / s) + z).clamp(qmin, qmax)
    return ((code - z) * s).to(x.dtype)


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    v, s, z = _grid(x, scale, zero_point, axis)
    code = v / s + z  # not rounded: the edges of the range are the edges of the gradient
    return torch.where((code >= qmin) & (code <= qmax), grad, 0)


def fake_quant_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dzero_point). NaN in x is not inside: its dx is 0, and its channel's two sums are NaN."""
    v, s, z = _grid(x, scale, zero_point, axis)
    ratio, g = v / s, grad.to(scale.dtype)
    inside = (ratio + z >= qmin) & (ratio + z <= qmax)
    code = (torch.round(ratio) + z).clamp(qmin, qmax)
    dstep = g * (code - z - torch.where(inside, ratio, 0))
    dclip = torch.where(inside, 0, torch.where(code.isnan(), code, -g))  # clipped, x_hat is (qmin - zero_point) * scale
    others = [dim for dim in range(x.dim()) if scale.numel() == 1 or dim != axis]
    step, clip = (t.double().sum(others) if others else t.double() for t in (dstep, dclip))
    return (
        torch.where(inside, grad, 0),
        step.reshape(scale.shape).to(scale.dtype),
        (scale.double() * clip.reshape(scale.shape)).to(scale.dtype),
    )
