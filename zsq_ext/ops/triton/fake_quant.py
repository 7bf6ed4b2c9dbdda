"""fake_quant and its gradients on Triton."""

import torch
from torch import Tensor

from zsq_ext.ops.layout import channels_of, in_layout_of
from zsq_ext.ops.triton.launch import kernels, on_device_of


def _fake_quant(
    grad: Tensor | None, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    out = torch.empty_like(x)
    x = in_layout_of(out, x)
    if grad is not None:
        grad = in_layout_of(out, grad)
    learned = zero_point.dtype != torch.int32
    channels, inner = channels_of(out, scale, axis)
    with on_device_of(x):
        kernels("fake_quant").fake_quant(
            grad, x, out, scale, zero_point, learned, x.numel(), channels, inner, qmin, qmax
        )
    return out


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    return _fake_quant(None, x, scale, zero_point, qmin, qmax, axis)


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    return _fake_quant(grad, x, scale, zero_point, qmin, qmax, axis)


def fake_quant_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    n = x.numel()
    if n == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    x, grad = in_layout_of(dx, x), in_layout_of(dx, grad)
    dscale, dzero_point = torch.empty_like(scale), torch.empty_like(scale)
    channels, inner = channels_of(dx, scale, axis)
    cut = kernels("fake_quant").lsq_cut(n, channels, inner)
    partial = torch.empty(2, channels, cut.parts, dtype=torch.float64, device=x.device)
    sums = dscale, dzero_point, partial[0], partial[1]
    learned = zero_point.dtype != torch.int32
    with on_device_of(x):
        kernels("fake_quant").fake_quant_lsq_backward(
            grad, x, dx, *sums, scale, zero_point, learned, n, channels, inner, qmin, qmax, cut
        )
    return dx, dscale, dzero_point
