"""What the backends `cpu` and `cuda` share: the native module, and how its functions are called with tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.layout import DTYPE_CODE, channels_of, in_layout_of

problem: str | None = None
try:
    from zsq_ext import _C as module
except ImportError as error:  # a source tree that was never built: the reference still works
    module, problem = None, f"the native module does not load ({error})"


def _arguments(grad: Tensor | None, x: Tensor, out: Tensor, grid: tuple[Any, ...]) -> tuple[Any, ...]:
    """What every call of the family begins with. x, grad and out lie in memory alike."""
    scale, zero_point, qmin, qmax, axis = grid
    return (
        0 if grad is None else grad.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        zero_point.dtype != torch.int32,
        DTYPE_CODE[x.dtype],
        x.numel(),
        *channels_of(out, scale, axis),
        qmin,
        qmax,
    )


def fake_quant(call: Callable[..., Any], last: int, grad: Tensor | None, x: Tensor, *grid: Any) -> tuple[Tensor, Any]:
    """The forward where grad is None. `last` is the argument only one backend has: threads, or the stream."""
    out = torch.empty_like(x)
    x = in_layout_of(out, x)
    if grad is not None:
        grad = in_layout_of(out, grad)
    return out, call(*_arguments(grad, x, out, grid), last)


def fake_quant_lsq_backward(
    call: Callable[..., Any], workspace: Callable[..., int] | None, last: int, grad: Tensor, x: Tensor, *grid: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
    """`workspace` gives the bytes the call wants on the device for (dtype, n, channels, inner), or is None."""
    dx = torch.empty_like(x)
    x, grad = in_layout_of(dx, x), in_layout_of(dx, grad)
    dscale, dzero_point = torch.empty_like(grid[0]), torch.empty_like(grid[0])
    if x.numel() == 0:  # nothing runs
        dscale.zero_()
        dzero_point.zero_()
    arguments = _arguments(grad, x, dx, grid)
    extra: list[int] = []
    if workspace is not None:
        memory = torch.empty(workspace(*arguments[6:10]), dtype=torch.uint8, device=x.device)
        extra.append(memory.data_ptr())
    return (dx, dscale, dzero_point), call(*arguments, last, dscale.data_ptr(), dzero_point.data_ptr(), *extra)
