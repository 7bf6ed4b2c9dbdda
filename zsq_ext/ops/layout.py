"""How a tensor is handed to code that knows only pointers: dense memory, seen as [outer, channels, inner]."""

import torch
from torch import Tensor

# kernels/dtype.h holds the same codes.
DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def in_layout_of(out: Tensor, t: Tensor) -> Tensor:
    """t itself where its elements lie in memory as out's do, else a copy that does. out is dense."""
    return t if t.stride() == out.stride() else torch.empty_like(out).copy_(t)


def channels_of(out: Tensor, scale: Tensor, axis: int | None) -> tuple[int, int]:
    """(channels, inner): element i in memory order belongs to channel (i // inner) % channels. out is dense."""
    channels = scale.numel()
    # In dense memory the stride of a dimension is the number of elements that vary faster.
    return (channels, out.stride(axis)) if channels > 1 and axis is not None else (1, out.numel())
