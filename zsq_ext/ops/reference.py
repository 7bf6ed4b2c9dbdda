"""What every op means, in plain PyTorch. Where documentation and this file disagree, this file wins.

Runs on any device and allocates freely. The other backends hold the same functions, with the same names and
argument order, and give the same bits.

Shapes: x is any shape; scale and zero_point are [1], or [C] with C = x.shape[axis].
"""

import torch
from torch import Tensor


def missing() -> str | None:
    return None


def refuses(device: str, dtype: torch.dtype) -> str | None:
    return None


def _grid(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """x in the type that computes (float32, or float64 for float64), and the grid shaped to broadcast over it."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = scale.numel()
    return x.to(scale.dtype), scale.reshape(shape), zero_point.to(scale.dtype).reshape(shape)


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
