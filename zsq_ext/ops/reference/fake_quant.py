"""fake_quant, its gradients, and its two halves.

Shapes: x is any shape; scale and zero_point are [1], or [C] with C = x.shape[axis], or [C, G] with C = x.shape[0] and
groups of equal size, counted in the order of x's shape. A zero_point is int32, or has scale's dtype and is rounded half
to even before anything else.
"""

import torch
from torch import Tensor

from zsq_ext.ops.layout import code_dtype


def _grid(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """x in the type that computes (float32, or float64 for float64), and the grid shaped to broadcast over it.

    With groups x is seen as [C, G, elements of a group].
    """
    x = _grouped(x, scale)
    shape = [*scale.shape, 1] if scale.dim() == 2 else [1] * x.dim()
    if scale.dim() == 1 and axis is not None:
        shape[axis] = scale.numel()
    return x.to(scale.dtype), scale.reshape(shape), zero_point.to(scale.dtype).round().reshape(shape)


def _grouped(t: Tensor, scale: Tensor) -> Tensor:
    return t.reshape(*scale.shape, t.numel() // max(scale.numel(), 1)) if scale.dim() == 2 else t


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    v, s, z = _grid(x, scale, zero_point, axis)
    code = (torch.round(v / s) + z).clamp(qmin, qmax)
    return ((code - z) * s).to(x.dtype).reshape(x.shape)


def fake_quant_out(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None, out: Tensor
) -> None:
    out.copy_(fake_quant(x, scale, zero_point, qmin, qmax, axis))


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    v, s, z = _grid(x, scale, zero_point, axis)
    code = v / s + z  # not rounded: the edges of the range are the edges of the gradient
    return torch.where((code >= qmin) & (code <= qmax), _grouped(grad, scale), 0).reshape(x.shape)


def fake_quant_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dzero_point). NaN in x is not inside: its dx is 0, and its channel's two sums are NaN."""
    v, s, z = _grid(x, scale, zero_point, axis)
    grad = _grouped(grad, scale)
    ratio, g = v / s, grad.to(scale.dtype)
    inside = (ratio + z >= qmin) & (ratio + z <= qmax)
    code = (torch.round(ratio) + z).clamp(qmin, qmax)
    dstep = g * (code - z - torch.where(inside, ratio, 0))
    dclip = torch.where(inside, 0, torch.where(code.isnan(), code, -g))  # clipped, x_hat is (qmin - zero_point) * scale
    others = [dim for dim in range(v.dim()) if s.dim() == 0 or s.size(dim) == 1]
    step, clip = (t.double().sum(others) if others else t.double() for t in (dstep, dclip))
    return (
        torch.where(inside, grad, 0).reshape(x.shape),
        step.reshape(scale.shape).to(scale.dtype),
        (scale.double() * clip.reshape(scale.shape)).to(scale.dtype),
    )


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    """The codes of fake_quant; NaN has that of 0."""
    v, s, z = _grid(x, scale, zero_point, axis)
    code = (torch.round(v / s) + z).clamp(qmin, qmax)
    return torch.where(code.isnan(), z.clamp(qmin, qmax), code).to(code_dtype(qmin, qmax)).reshape(x.shape)


def dequantize(code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    v, s, z = _grid(code, scale, zero_point, axis)
    return ((v - z) * s).to(dtype).reshape(code.shape)
