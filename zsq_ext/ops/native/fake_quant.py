"""How `cpu` and `cuda` call the native module's fake_quant, its gradients and its two halves."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.layout import CODE_TYPE, DTYPE_CODE, channels_of, code_dtype, dense_for, empty_for, in_layout_of
from zsq_ext.ops.native.call import Call, address


def fields(
    grad: Tensor | None, x: Tensor, out: Tensor | None, grid: tuple[Any, ...], dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    """The family's struct. x, grad and out lie in memory alike; dtype is that of the values, x's if None."""
    scale, zero_point, qmin, qmax, axis = grid
    learned = zero_point.dtype != torch.int32
    return (
        *(address(grad), x.data_ptr(), address(out), scale.data_ptr(), zero_point.data_ptr(), learned),
        *(x.numel(), *channels_of(x, scale, axis), qmin, qmax, DTYPE_CODE[dtype or x.dtype]),
    )


def fake_quant(
    call: Call, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    out = empty_for(x, scale)
    x = in_layout_of(out, x)  # by this name: a copy must live until the call is over
    call("fake_quant", *fields(None, x, out, (scale, zero_point, qmin, qmax, axis)))
    return out


def fake_quant_out(
    call: Call, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None, out: Tensor
) -> None:
    if not dense_for(out, scale):
        out.copy_(fake_quant(call, x, scale, zero_point, qmin, qmax, axis))
        return
    x = in_layout_of(out, x)
    call("fake_quant", *fields(None, x, out, (scale, zero_point, qmin, qmax, axis)))


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
    out = empty_for(x, scale)
    x, grad = in_layout_of(out, x), in_layout_of(out, grad)
    call("fake_quant", *fields(grad, x, out, (scale, zero_point, qmin, qmax, axis)))
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
    dx = empty_for(x, scale)
    if x.numel() == 0:  # nothing runs
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    dscale, dzero_point = torch.empty_like(scale), torch.empty_like(scale)
    x, grad = in_layout_of(dx, x), in_layout_of(dx, grad)
    fq = fields(grad, x, dx, (scale, zero_point, qmin, qmax, axis))
    call.with_workspace("fake_quant_lsq_backward", fq, dscale.data_ptr(), dzero_point.data_ptr())
    return dx, dscale, dzero_point


def quantize(
    call: Call, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    code = empty_for(x, scale, code_dtype(qmin, qmax))
    x = in_layout_of(code, x)
    fq = fields(None, x, code, (scale, zero_point, qmin, qmax, axis))
    call("fake_quant_codes", fq, CODE_TYPE[code.dtype], False)
    return code


def dequantize(
    call: Call, code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype
) -> Tensor:
    out = empty_for(code, scale, dtype)
    code = in_layout_of(out, code)
    fq = fields(None, code, out, (scale, zero_point, 0, 0, axis), dtype)
    call("fake_quant_codes", fq, CODE_TYPE[code.dtype], True)
    return out
