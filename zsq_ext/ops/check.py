"""What the ops of the fake_quant family ask of their arguments."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from zsq_ext.ops.layout import COMPUTE, is_dense

# Codes are computed in float32, which holds every integer up to here.
_CODE_LIMIT = 2**24

_V = TypeVar("_V")


def compute_dtype(op: str, name: str, x: Any) -> torch.dtype:
    """The dtype that computes for x."""
    compute = COMPUTE.get(x.dtype) if isinstance(x, Tensor) else None
    if compute is None:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} must be a float32, float16, bfloat16 or float64 tensor, got {got}")
    return compute


def one_each(op: str, name: str, values: _V | Sequence[_V], n: int) -> list[_V]:
    """A list of n: the values, or n times the one."""
    if not isinstance(values, Sequence):
        return [values] * n
    if len(values) != n:
        raise ValueError(f"{op}: {name} must be one or one per tensor, got {len(values)} for {n} tensors")
    return list(values)


def several(op: str, name: str, tensors: Any, n: int | None = None) -> None:
    """A list or tuple, of n."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a list or tuple of tensors, got {type(tensors).__name__}")
    if n is not None and len(tensors) != n:
        raise ValueError(f"{op}: {name} must have {n} tensors, got {len(tensors)}")


def tensors(op: str, name: str, tensors: Any, like: Sequence[Tensor] | None = None) -> None:
    """Several tensors of one dtype and device, the first of `like`'s or their own, and of the shapes of `like`."""
    several(op, name, tensors, None if like is None else len(like))
    like = tensors if like is None else like
    for i, (t, shaped) in enumerate(zip(tensors, like, strict=True)):
        compute_dtype(op, f"{name}[{i}]", t)
        if t.dtype is not like[0].dtype:
            raise TypeError(f"{op}: {name}[{i}] must be {like[0].dtype} as tensors[0] is, got {t.dtype}")
        if t.device != like[0].device:
            raise ValueError(f"{op}: {name}[{i}] must be on {like[0].device}, got {t.device}")
        if t.shape != shaped.shape:
            raise ValueError(
                f"{op}: {name}[{i}] must have shape {tuple(shaped.shape)} as tensors[{i}] has, got {tuple(t.shape)}"
            )


def apart(op: str, outs: Sequence[Tensor], inputs: Sequence[Tensor], many: bool = True) -> None:
    """What is written to is no memory that another result or input lies in; a result may be its own input."""
    if torch.compiler.is_compiling():  # which has no addresses
        return
    tensors = (*outs, *(t for t, out in zip(inputs, outs, strict=True) if t is not out))
    if len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors):  # as it almost always is
        return
    # What is not dense is written by a copy, and what is laid out otherwise is read by one: neither meets the other.
    written = [(*_span(t), i, True) for i, t in enumerate(outs) if t.numel() and is_dense(t)]
    read = [(*_span(t), i, False) for i, t in enumerate(inputs) if t.numel() and is_dense(t)]
    open_: list[tuple[int, int, int, bool]] = []
    for span in sorted(written + read):
        open_ = [other for other in open_ if other[1] > span[0]]
        for other in open_:
            one, two = (span, other) if span[3] else (other, span)
            itself = one[2:] != two[2:] and one[:3] == two[:3] and outs[one[2]].stride() == inputs[two[2]].stride()
            if one[3] and not itself:
                of = "x" if not many else f"tensors[{one[2]}]"
                name = "out" if not many else f"out[{one[2]}]"
                raise ValueError(
                    f"{op}: {name} must be {of} itself or memory apart from all others, got memory shared in part"
                )
        open_.append(span)


def _span(t: Tensor) -> tuple[int, int]:
    begin = t.data_ptr()
    return begin, begin + t.numel() * t.element_size()


def code_range(op: str, qmin: int, qmax: int) -> None:
    for name, value in (("qmin", qmin), ("qmax", qmax)):
        if not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if not -_CODE_LIMIT <= qmin <= qmax <= _CODE_LIMIT:
        raise ValueError(f"{op}: qmin must be <= qmax, both within 2**24 of 0, got {qmin} and {qmax}")


def dimension(op: str, name: str, x: Tensor, axis: int) -> int:
    """axis counted from the front."""
    if not isinstance(axis, int):
        raise TypeError(f"{op}: axis must be an integer, got {axis!r}")
    dims = x.dim()
    if not -dims <= axis < dims:
        rule = f"in [{-dims}, {dims - 1}]" if dims else f"None for 0-d {name}"
        raise ValueError(f"{op}: axis must be {rule}, got {axis}")
    return axis % dims


def grid(
    op: str,
    name: str,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    of: torch.dtype,
    learned: bool,
    labels: tuple[str, str] = ("scale", "zero_point"),
) -> tuple[Tensor, Tensor, int | None]:
    """(scale, zero_point, axis): contiguous, of one shape, and counted from the front.

    Args:
        name: what the caller calls x.
        of: the dtype of the values.
        learned: zero_point has scale's dtype.
        labels: what the caller calls scale and zero_point.
    """
    if axis is not None:
        axis = dimension(op, name, x, axis)
    channels = 1 if axis is None else x.size(axis)
    for label, t in zip(labels, (scale, zero_point), strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {label} must be a tensor, got {type(t).__name__}")
        dtype = COMPUTE[of] if t is scale or learned else torch.int32
        if t.dtype is not dtype:
            under = " under lsq_plus" if learned and t is zero_point else ""
            raise TypeError(f"{op}: {label} must be {dtype} for {of} {name}{under}, got {t.dtype}")
        if t.dim() == 2 and axis == 0 and t.size(0) == channels:
            _check_groups(op, label, x, t)
        elif t.dim() != 1 or t.numel() not in (1, channels):
            shapes = "(1,)" if axis is None else f"(1,) or ({channels},)"
            shapes = f"(1,), ({channels},) or ({channels}, G)" if axis == 0 else shapes
            raise ValueError(f"{op}: {label} must have shape {shapes}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{op}: {label} must be on {x.device}, got {t.device}")
    if scale.shape != zero_point.shape:
        scale, zero_point = _alike(op, labels, scale, zero_point)
    return scale.contiguous(), zero_point.contiguous(), axis


def _check_groups(op: str, label: str, x: Tensor, t: Tensor) -> None:
    groups, length = t.size(1), x.shape[1:].numel()
    if groups == 0 or length % groups:
        raise ValueError(f"{op}: {label} must have groups that divide the {length} elements of a channel, got {groups}")


def _alike(op: str, labels: tuple[str, str], scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    if scale.shape == (1,):
        return scale.expand_as(zero_point), zero_point
    if zero_point.shape == (1,):
        return scale, zero_point.expand_as(scale)
    raise ValueError(
        f"{op}: {labels[1]} must have shape (1,) or {labels[0]}'s shape {tuple(scale.shape)}, "
        f"got {tuple(zero_point.shape)}"
    )
