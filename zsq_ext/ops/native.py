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


def fake_quant(
    call: Callable[..., Any],
    last: int,
    grad: Tensor | None,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
) -> tuple[Tensor, Any]:
    """The forward where grad is None. `last` is the argument only one backend has: threads, or the stream."""
    out = torch.empty_like(x)
    x = in_layout_of(out, x)
    if grad is not None:
        grad = in_layout_of(out, grad)
    channels, inner = channels_of(out, scale, axis)
    answer = call(
        0 if grad is None else grad.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        DTYPE_CODE[x.dtype],
        x.numel(),
        channels,
        inner,
        qmin,
        qmax,
        last,
    )
    return out, answer
