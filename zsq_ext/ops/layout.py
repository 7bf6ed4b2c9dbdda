"""How a tensor is handed to code that knows only pointers: dense memory, seen as [outer, channels, inner]."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# kernels/dtype.h holds the same codes.
DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

# a tensor's dtype -> the one that computes, which its parameters have too
COMPUTE = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}

# kernels/dtype.h holds the same codes.
CODE_TYPE = {torch.int8: 0, torch.uint8: 1, torch.int32: 2}


def code_dtype(qmin: int, qmax: int) -> torch.dtype:
    """The smallest type that holds the codes qmin to qmax, of those that codes are stored as."""
    for dtype in (torch.int8, torch.uint8):
        info = torch.iinfo(dtype)
        if info.min <= qmin and qmax <= info.max:
            return dtype
    return torch.int32


def is_dense(t: Tensor) -> bool:
    """Whether t's elements fill a stretch of memory, in whichever order, each at a place of its own."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def is_apart(t: Tensor) -> bool:
    """Whether each of t's elements has a place of its own, seen from its strides: they nest, as those of views do."""
    if is_dense(t):
        return True
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def empty_for(x: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result of x's shape: ordered as x is, but contiguous where scale has groups (C, G)."""
    if scale.dim() != 2:
        return torch.empty_like(x, dtype=dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def dense_for(t: Tensor, scale: Tensor) -> bool:
    """Whether t's memory is as a kernel wants it under scale: dense, and contiguous where scale has groups."""
    return t.is_contiguous() if scale.dim() == 2 else is_dense(t)


def head(first: Tensor | Sequence[Tensor]) -> Tensor:
    """The tensor whose device and dtype decide for an op: its first argument, or the first of that list."""
    return first if isinstance(first, Tensor) else first[0]


def in_layout_of(out: Tensor, t: Tensor) -> Tensor:
    """t itself where its elements lie in memory as out's do, else a copy that does. out is dense."""
    return t if t.stride() == out.stride() else torch.empty_like(out, dtype=t.dtype).copy_(t)


def channels_of(out: Tensor, scale: Tensor, axis: int | None) -> tuple[int, int]:
    """(channels, inner): element i in memory order belongs to channel (i // inner) % channels.

    out is dense. With groups it is contiguous, and what kernels call a channel is a group.
    """
    channels = scale.numel()
    if scale.dim() == 2:
        return channels, out.numel() // max(channels, 1)
    # In dense memory the stride of a dimension is the number of elements that vary faster.
    return (channels, out.stride(axis)) if channels > 1 and axis is not None else (1, out.numel())


def sliced(t: Tensor, axis: int) -> bool:
    """Whether t's slices along axis follow one another in memory, each dense."""
    if axis == 0 and t.is_contiguous():
        return True
    outermost = t.size(axis) <= 1 or t.stride(axis) * t.size(axis) == t.numel()
    return outermost and is_dense(t)


def empty_sliced(t: Tensor, axis: int) -> Tensor:
    """Memory for a tensor of t's shape that is `sliced`: in t's own order where that is."""
    return torch.empty_like(t) if sliced(t, axis) else t.new_empty(t.movedim(axis, 0).shape).movedim(0, axis)


def rows_along(x: Tensor, axis: int | None) -> Tensor:
    """x in memory that is `sliced` along axis, or dense for None."""
    if axis is None:
        return x if is_dense(x) else x.contiguous()
    return x if sliced(x, axis) else empty_sliced(x, axis).copy_(x)


# kernels/bn_act.h holds the same codes.
ACT_CODE = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}


def channels_last(u: Tensor) -> bool:
    """Whether u's channels, dimension 1, lie side by side in memory though they are not its last dimension."""
    return u.dim() > 2 and u.stride(1) == 1 and not u.is_contiguous()


def arranged(t: Tensor, last: bool) -> Tensor:
    """t (N, C, ...) in dense memory, channels varying fastest where `last`, in the order of its shape elsewhere."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def empty_arranged(u: Tensor, last: bool, size: Sequence[int] | None = None) -> Tensor:
    """Memory for a tensor of u's shape, or (N, C, *size), and of its dtype in the order of `arranged`."""
    order = (0, *range(2, u.dim()), 1) if last else tuple(range(u.dim()))
    shape = u.shape if size is None else (*u.shape[:2], *size)
    return torch.empty_permuted(shape, order, dtype=u.dtype, device=u.device)


def rows_of(u: Tensor) -> tuple[int, int]:
    """(rows, length) of u (N, C, ...) in its own memory format: a row is what varies fastest.

    All channels of one place where channels are last, or where there is only one place; one channel's places elsewhere.
    """
    n, c, places, last = places_of(u)
    return (n * places, c) if last else (n * c, places)


def places_of(u: Tensor) -> tuple[int, int, int, bool]:
    """(samples, channels, places, whether the channels vary fastest): how kernels see u (N, C, ...)."""
    n, c, *spatial = u.shape
    places = math.prod(spatial)
    return n, c, places, places == 1 or channels_last(u)


def empty_rows(v: Tensor, channels: int, axis: int | None) -> Tensor:
    """Dense memory of v's shape and dtype in which each of the channels along `axis` is one stretch.

    v's own order where it is like that, as a weight's is along its first dimension.
    """
    out = torch.empty_like(v)
    if axis is None or channels == 1 or out.stride(axis) * channels == out.numel():
        return out
    order = (axis % v.dim(), *(dim for dim in range(v.dim()) if dim != axis % v.dim()))
    return torch.empty_permuted(v.shape, order, dtype=v.dtype, device=v.device)
