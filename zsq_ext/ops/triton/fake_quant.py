"""fake_quant, its gradients and its two halves on Triton."""

import torch
from torch import Tensor

from zsq_ext.ops.layout import channels_of, code_dtype, dense_for, empty_for, in_layout_of
from zsq_ext.ops.triton.launch import kernels, on_device_of


def _into(
    out: Tensor,
    grad: Tensor | None,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
) -> Tensor:
    """out, which is dense, filled with the forward, or with the gradient where grad is given."""
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
    return _into(empty_for(x, scale), None, x, scale, zero_point, qmin, qmax, axis)


def fake_quant_out(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None, out: Tensor
) -> None:
    if dense_for(out, scale):
        _into(out, None, x, scale, zero_point, qmin, qmax, axis)
    else:
        out.copy_(fake_quant(x, scale, zero_point, qmin, qmax, axis))


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    return _into(empty_for(x, scale), grad, x, scale, zero_point, qmin, qmax, axis)


def fake_quant_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty_for(x, scale)
    n = x.numel()
    if n == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    x, grad = in_layout_of(dx, x), in_layout_of(dx, grad)
    dscale, dzero_point = torch.empty_like(scale), torch.empty_like(scale)
    channels, inner = channels_of(dx, scale, axis)
    cut = kernels("fake_quant").cut_of(n, channels, inner)
    partial = torch.empty(2, channels, cut.parts, dtype=torch.float64, device=x.device)
    sums = dscale, dzero_point, partial[0], partial[1]
    learned = zero_point.dtype != torch.int32
    with on_device_of(x):
        kernels("fake_quant").fake_quant_lsq_backward(
            grad, x, dx, *sums, scale, zero_point, learned, n, channels, inner, qmin, qmax, cut
        )
    return dx, dscale, dzero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    code = empty_for(x, scale, code_dtype(qmin, qmax))
    return _codes(x, code, scale, zero_point, qmin, qmax, axis, back=False)


def dequantize(code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    return _codes(code, empty_for(code, scale, dtype), scale, zero_point, 0, 0, axis, back=True)


def _codes(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    back: bool,
) -> Tensor:
    x = in_layout_of(out, x)
    channels, inner = channels_of(out, scale, axis)
    with on_device_of(x):
        kernels("fake_quant_codes").fake_quant_codes(
            x, out, scale, zero_point, x.numel(), channels, inner, qmin, qmax, back
        )
    return out
