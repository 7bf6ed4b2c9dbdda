"""What the ops ask of their arguments, before anything runs: `<op>: <argument> must <rule>, got <value>`.

Where an op takes lists, `at` is an item's place in them, as "[3]".
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from zsq_ext.ops.layout import COMPUTE, is_apart, is_dense

# Codes are computed in float32, which holds every integer up to here.
_CODE_LIMIT = 2**24

_DENSE = torch.strided

# What a size or a number may also be while a graph is traced.
_INTEGERS = int, torch.SymInt
_NUMBERS = *_INTEGERS, float, torch.SymFloat

_V = TypeVar("_V")


# numbers and names


def shown(value: Any) -> str:
    """What an error says it got: a short value itself, of others the type."""
    if isinstance(value, (list, tuple)) and len(value) <= 4 and all(isinstance(v, _NUMBERS) for v in value):
        return repr(value)
    short = value is None or isinstance(value, (str, bool, complex, torch.dtype, np.generic, *_NUMBERS))
    return repr(value) if short else type(value).__name__


def integer(op: str, name: str, value: Any, at: str = "", *, rule: str = "an integer") -> None:
    # True is 1 to Python, and a mistake as a code or a dimension.
    if not isinstance(value, _INTEGERS) or isinstance(value, bool):
        raise TypeError(f"{op}: {name}{at} must be {rule}, got {shown(value)}")
    _fits(op, name, value, at)


def number(op: str, name: str, value: Any, at: str = "", *, rule: str = "a number") -> None:
    """An int or a float: no tensor, which would have to be waited for. `rule` says it where others are taken too."""
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{op}: {name}{at} must be {rule}, got {shown(value)}")
    _fits(op, name, value, at)


def _fits(op: str, name: str, value: Any, at: str) -> None:
    # Of a size that is traced nothing is known.
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {name}{at} must fit into 64 bits, got an integer of {value.bit_length()}")


def flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {shown(value)}")


def one_of(op: str, name: str, value: Any, names: Sequence[str], *, rule: str = "one of") -> None:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{op}: {name} must be {rule} {', '.join(names)}, got {shown(value)}")


def code_range(
    op: str,
    qmin: Any,
    qmax: Any,
    at: tuple[str, str] = ("", ""),
    names: tuple[str, str] = ("qmin", "qmax"),
    limit: int = _CODE_LIMIT,
) -> None:
    """`at` is the place of either."""
    if _is_code_range(qmin, qmax, limit):
        return
    for name, value, where in zip(names, (qmin, qmax), at, strict=True):
        integer(op, name, value, where)
    if not -limit <= qmin <= qmax <= limit:
        low, high = (f"{name}{where}" for name, where in zip(names, at, strict=True))
        within = "2**24" if limit == _CODE_LIMIT else limit
        raise ValueError(f"{op}: {low} must be <= {high}, both within {within} of 0, got {qmin} and {qmax}")


def code_ranges(op: str, qmin: Any, qmax: Any, n: int, limit: int = _CODE_LIMIT) -> tuple[list[int], list[int]]:
    """(qmin, qmax) of each of n tensors, from one for all or one for each."""
    lows, highs = one_each(op, "qmin", qmin, n), one_each(op, "qmax", qmax, n)
    for k, ends in enumerate(zip(lows, highs, strict=True)):
        if not _is_code_range(*ends, limit):
            code_range(op, *ends, (place(qmin, k), place(qmax, k)), limit=limit)
    return lows, highs


def _is_code_range(qmin: Any, qmax: Any, limit: int) -> bool:
    return type(qmin) is int and type(qmax) is int and -limit <= qmin <= qmax <= limit


def dimension(op: str, name: str, x: Tensor, axis: Any, at: str = "", x_at: str = "") -> int | None:
    """axis counted from the front, or None.

    Args:
        name: what the caller calls x.
        at, x_at: the places of axis and of x.
    """
    dims = x.dim()
    if type(axis) is int and -dims <= axis < dims:  # as it almost always is
        return axis % dims
    if axis is None:
        return None
    integer(op, "axis", axis, at)
    if not -dims <= axis < dims:
        rule = f"in [{-dims}, {dims - 1}]" if dims else f"None for 0-d {name}{x_at}"
        of = f" for {name}{x_at}" if dims and x_at and not at else ""
        raise ValueError(f"{op}: axis{at} must be {rule}{of}, got {axis}")
    return axis % dims


def size(op: str, name: str, value: Any) -> tuple[int, int]:
    """Two integers."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"{op}: {name} must be two integers, got {shown(value)}")
    for i, extent in enumerate(value):
        integer(op, name, extent, f"[{i}]")
    return value[0], value[1]


# lists


def one_each(op: str, name: str, values: _V | Sequence[_V], n: int) -> list[_V]:
    """A list of n: the values, or n times the one."""
    if not _is_list(values):
        return [values] * n  # type: ignore[list-item]
    if len(values) != n:  # type: ignore[arg-type]
        raise ValueError(f"{op}: {name} must be one or one per tensor, got {len(values)} for {n} tensors")  # type: ignore[arg-type]
    return list(values)  # type: ignore[arg-type]


def axes(op: str, tensors: Sequence[Tensor], axis: Any, *, optional: bool = False) -> list[int]:
    """`dimension` of each tensor, from one for all or one for each; -1 for None, where it is optional."""
    found = []
    for k, (x, each) in enumerate(zip(tensors, one_each(op, "axis", axis, len(tensors)), strict=True)):
        if each is None and not optional:
            integer(op, "axis", each, place(axis, k))
        counted = dimension(op, "tensors", x, each, place(axis, k), f"[{k}]")
        found.append(-1 if counted is None else counted)
    return found


def place(values: Any, k: int) -> str:
    """The place of the k-th that `one_each` gave; none where it is the one for all."""
    return f"[{k}]" if _is_list(values) else ""


def _is_list(values: Any) -> bool:
    return isinstance(values, (list, tuple))


# tensors


def tensor(op: str, name: str, t: Any, at: str = "") -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}{at} must be a tensor, got {type(t).__name__}")
    if t.layout is not _DENSE:
        raise TypeError(f"{op}: {name}{at} must be dense, got {t.layout}")


def compute_dtype(op: str, name: str, x: Any, at: str = "") -> torch.dtype:
    """The dtype that computes for x."""
    compute = COMPUTE.get(x.dtype) if isinstance(x, Tensor) else None
    if compute is None:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name}{at} must be a float32, float16, bfloat16 or float64 tensor, got {got}")
    if x.layout is not _DENSE or x.is_nested:
        raise TypeError(f"{op}: {name}{at} must be dense, got {'a nested tensor' if x.is_nested else x.layout}")
    return compute


def beside(
    op: str,
    name: str,
    t: Any,
    dtype: torch.dtype,
    shape: Sequence[int],
    device: torch.device,
    at: str = "",
    *,
    of: str = "",
    called: str = "shape",
) -> None:
    """A tensor of just this dtype, shape and device: one that goes with another.

    Args:
        of: what the dtype follows from, as " for torch.float32 x".
        called: "shape", or whose it is, as "x's shape".
    """
    tensor(op, name, t, at)
    if t.dtype is not dtype:
        raise TypeError(f"{op}: {name}{at} must be {dtype}{of}, got {t.dtype}")
    if t.shape != shape:
        raise ValueError(f"{op}: {name}{at} must have {called} {tuple(shape)}, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{op}: {name}{at} must be on {device}, got {t.device}")


def several(op: str, name: str, tensors: Any, n: int | None = None) -> None:
    """A list or tuple, of n."""
    if not _is_list(tensors):
        raise TypeError(f"{op}: {name} must be a list or tuple of tensors, got {type(tensors).__name__}")
    if n is not None and len(tensors) != n:
        raise ValueError(f"{op}: {name} must have {n} tensors, got {len(tensors)}")


def tensors(op: str, name: str, tensors: Any, like: Sequence[Tensor] | None = None) -> None:
    """Several tensors of one dtype and device, the first of `like`'s or their own, and of the shapes of `like`."""
    several(op, name, tensors, None if like is None else len(like))
    first = name if like is None else "tensors"
    like = tensors if like is None else like
    for i, (t, shaped) in enumerate(zip(tensors, like, strict=True)):
        at = f"[{i}]"
        compute_dtype(op, name, t, at)
        if t.dtype is not like[0].dtype:
            raise TypeError(f"{op}: {name}{at} must be {like[0].dtype} as {first}[0] is, got {t.dtype}")
        if t.device != like[0].device:
            raise ValueError(f"{op}: {name}{at} must be on {like[0].device}, got {t.device}")
        if t.shape != shaped.shape:
            raise ValueError(
                f"{op}: {name}{at} must have shape {tuple(shaped.shape)} as {first}{at} has, got {tuple(t.shape)}"
            )


def apart(op: str, outs: Sequence[Tensor], inputs: Sequence[Tensor], many: bool = True) -> None:
    """What is written to is no memory that another element, result or input lies in; a result may be its own input."""
    if torch.compiler.is_compiling():  # which has no addresses
        return
    for i, out in enumerate(outs):
        if out.numel() and not is_apart(out):
            at = f"[{i}]" if many else ""
            raise ValueError(f"{op}: out{at} must have memory for each of its elements, got strides {out.stride()}")
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


# grids


def grid(
    op: str,
    x: Tensor,
    scale: Any,
    zero_point: Any,
    axis: int | None,
    of: torch.dtype,
    at: str = "",
    *,
    called: tuple[str, str, str] = ("x", "scale", "zero_point"),
    learned: bool = False,
    groups: bool = True,
) -> tuple[Tensor, Tensor]:
    """(scale, zero_point), contiguous and of one shape.

    Args:
        axis: as `dimension` gives it, or None.
        of: the dtype of the values.
        called: what the caller calls x, scale and zero_point.
        learned: zero_point has scale's dtype.
        groups: a channel of a first dimension may have several grids.
    """
    scale_type, zero_type = COMPUTE[of], COMPUTE[of] if learned else torch.int32
    if _is_one(scale, scale_type, x) and _is_one(zero_point, zero_type, x):  # as it often is, of small tensors too
        return scale, zero_point
    channels = 1 if axis is None else x.size(axis)
    groups = groups and axis == 0
    for name, t, dtype in ((called[1], scale, scale_type), (called[2], zero_point, zero_type)):
        tensor(op, name, t, at)
        if t.dtype is not dtype:
            under = " under lsq_plus" if learned and t is zero_point else ""
            raise TypeError(f"{op}: {name}{at} must be {dtype} for {of} {called[0]}{at}{under}, got {t.dtype}")
        if groups and t.dim() == 2 and t.size(0) == channels:
            _check_groups(op, f"{name}{at}", x, t)
        elif t.dim() != 1 or t.numel() not in (1, channels):
            shapes = "(1,)" if axis is None else f"(1,) or ({channels},)"
            shapes = f"(1,), ({channels},) or ({channels}, G)" if groups else shapes
            raise ValueError(f"{op}: {name}{at} must have shape {shapes}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name}{at} must be on {x.device}, got {t.device}")
    if scale.shape != zero_point.shape:
        scale, zero_point = _alike(op, f"{called[1]}{at}", f"{called[2]}{at}", scale, zero_point)
    return scale.contiguous(), zero_point.contiguous()


def _is_one(t: Any, dtype: torch.dtype, x: Tensor) -> bool:
    return type(t) is Tensor and t.dtype is dtype and t.layout is _DENSE and t.shape == (1,) and t.device == x.device


def _check_groups(op: str, name: str, x: Tensor, t: Tensor) -> None:
    groups, length = t.size(1), x.shape[1:].numel()
    if groups == 0 or length % groups:
        raise ValueError(f"{op}: {name} must have groups that divide the {length} elements of a channel, got {groups}")


def _alike(op: str, name: str, other: str, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    if scale.shape == (1,):
        return scale.expand_as(zero_point), zero_point
    if zero_point.shape == (1,):
        return scale, zero_point.expand_as(scale)
    raise ValueError(
        f"{op}: {other} must have shape (1,) or {name}'s shape {tuple(scale.shape)}, got {tuple(zero_point.shape)}"
    )


def positive(op: str, scale: Tensor) -> None:
    """A scale that is positive and finite: waits for the device."""
    for i, value in enumerate(scale.flatten().tolist()):
        if not 0 < value < math.inf:
            where = f"channel {i}" if scale.dim() == 1 else f"group {divmod(i, scale.size(1))}"
            raise ValueError(f"{op}: scale must be positive and finite, got {value} in {where}")
