"""adaround and its gradient.

Everything comes in lists of equal length, one entry per weight. Shapes, of an entry: v and base are any shape; scale
and zero_point are [1], or [C] with C = v.shape[axis]. beta, grad_reg and the regulariser are 0-d.
"""

import torch
from torch import Tensor

from zsq_ext.ops.adaround_spec import Rounding
from zsq_ext.ops.layout import empty_rows, in_layout_of


def _grid(v: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """v in the type that computes (float32, or float64 for float64), and the grid shaped to broadcast over it."""
    shape = [1] * v.dim()
    if axis is not None:
        shape[axis] = scale.numel()
    return v.to(scale.dtype), scale.reshape(shape), zero_point.to(scale.dtype).reshape(shape)


def _rows(t: Tensor, v: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return in_layout_of(empty_rows(v, scale.numel(), axis), t.to(v.dtype))


def _stretched(v: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid, and what it is stretched to: (zeta - gamma) * sigmoid + gamma with zeta = 1.1 and gamma = -0.1."""
    s = torch.sigmoid(v)
    return s, s * 1.2 - 0.1


def adaround(v: list[Tensor], rounding: Rounding, beta: Tensor | None, hard: bool) -> tuple[list[Tensor], Tensor]:
    axis, first = rounding.axis, rounding.scale[0]
    found, reg = [], torch.zeros((), dtype=torch.float64, device=v[0].device)
    for v_, (base, scale, zero_point, low, high) in zip(v, rounding.each(), strict=True):
        x, s, z = _grid(v_, scale, zero_point, axis)
        h = torch.where(x >= 0, 1, torch.where(x < 0, 0, x)) if hard else _stretched(x)[1].clamp(0, 1)
        code = (base.to(x.dtype) + h).clamp(low, high)
        found.append(_rows((code - z) * s, v_, scale, axis))
        if beta is not None:
            u = (2 * h - 1).abs()
            reg = reg + (1 - u.pow(beta - 1) * u).sum(dtype=torch.float64)
    return found, first.new_empty(0) if beta is None else reg.to(first.dtype)


def adaround_backward(
    grad: list[Tensor],
    v: list[Tensor],
    rounding: Rounding,
    beta: Tensor | None,
    grad_reg: Tensor | None,
    need_scale: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """(dv, dscale), dscale empty where it is not needed. NaN in v gives 0 in dv, and NaN to its channel's dscale."""
    axis = rounding.axis
    dv, dscale = [], []
    for grad_, v_, (base, scale, zero_point, low, high) in zip(grad, v, rounding.each(), strict=True):
        x, s, z = _grid(v_, scale, zero_point, axis)
        g = grad_.to(x.dtype)
        sigmoid, stretched = _stretched(x)
        h = stretched.clamp(0, 1)
        code = base.to(x.dtype) + h
        dh = torch.where((code >= low) & (code <= high), g * s, 0)
        if beta is not None and grad_reg is not None:
            u = 2 * h - 1
            dh = dh - (grad_reg * (2 * beta)) * (u.abs().pow(beta - 1) * u.sign())
        slope = 1.2 * (sigmoid * (1 - sigmoid))
        moves = (stretched >= 0) & (stretched <= 1)
        dv.append(_rows(torch.where(moves, dh * slope, 0), v_, scale, axis))
        if need_scale:
            kept = None if axis is None or scale.numel() == 1 else axis % x.dim()
            others = [dim for dim in range(x.dim()) if dim != kept]
            term = (g * (code.clamp(low, high) - z)).double()
            dscale.append((term.sum(others) if others else term).reshape(scale.shape).to(scale.dtype))
    return dv, dscale
