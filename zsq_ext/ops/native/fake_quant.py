"""How `cpu` and `cuda` call the native module's fake_quant and its gradients."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.layout import DTYPE_CODE, channels_of, in_layout_of
from zsq_ext.ops.native.call import Call, address


def _fields(grad: Tensor | None, x: Tensor, out: Tensor, grid: tuple[Any, ...]) -> tuple[Any, ...]:
    """The struct of the family. x, grad and out lie in memory alike."""
    scale, zero_point, qmin, qmax, axis = grid
    learned = zero_point.dtype != torch.int32
    return (
        *(address(grad), x.data_ptr(), out.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), learned),
        *(x.numel(), *channels_of(out, scale, axis), qmin, qmax, DTYPE_CODE[x.dtype]),
    )


def fake_quant(
    call: Call, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    out = torch.empty_like(x)
    x = in_layout_of(out, x)  # by this name: a copy must live until the call is over
    call("fake_quant", *_fields(None, x, out, (scale, zero_point, qmin, qmax, axis)))
    return out


def fake_quant_backward(
    call: Call,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> Tensor:
    out = torch.empty_like(x)
    x, grad = in_layout_of(out, x), in_layout_of(out, grad)
    call("fake_quant", *_fields(grad, x, out, (scale, zero_point, qmin, qmax, axis)))
    return out


def fake_quant_lsq_backward(
    call: Call,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    if x.numel() == 0:  # nothing runs
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    dscale, dzero_point = torch.empty_like(scale), torch.empty_like(scale)
    x, grad = in_layout_of(dx, x), in_layout_of(dx, grad)
    fields = _fields(grad, x, dx, (scale, zero_point, qmin, qmax, axis))
    call.with_workspace("fake_quant_lsq_backward", fields, dscale.data_ptr(), dzero_point.data_ptr())
    return dx, dscale, dzero_point
