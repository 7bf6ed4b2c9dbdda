"""Min-max fake-quantization of many tensors in one call: what quantization-aware training does to all weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq_ext.ops import backend
from zsq_ext.ops import check as checks
from zsq_ext.ops.layout import COMPUTE, empty_sliced
from zsq_ext.ops.once import differentiable_once

_ARGS = "Tensor[] tensors, int[] bits, int[] axes, bool symmetric"


def _fake_grid(tensors: list[Tensor], axes: list[int]) -> tuple[Tensor, Tensor]:
    channels = sum(t.size(axis) for t, axis in zip(tensors, axes, strict=True))
    scale = tensors[0].new_empty(channels, dtype=COMPUTE[tensors[0].dtype])
    return scale, torch.empty_like(scale, dtype=torch.int32)


def _fake(
    tensors: list[Tensor], bits: list[int], axes: list[int], symmetric: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    return [empty_sliced(t, axis) for t, axis in zip(tensors, axes, strict=True)], *_fake_grid(tensors, axes)


_op = backend.define(f"fake_quant_minmax({_ARGS}) -> (Tensor[], Tensor, Tensor)", _fake)
_op_out = backend.define(
    f"fake_quant_minmax_out({_ARGS}, Tensor(a!)[] out) -> (Tensor, Tensor)",
    lambda tensors, bits, axes, symmetric, out: _fake_grid(tensors, axes),
)


class _How(NamedTuple):
    bits: list[int]
    axes: list[int]
    symmetric: bool


class _Ste(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: _How, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outs, scale, zero_point = _op(list(tensors), *how)
        ctx.mark_non_differentiable(scale, zero_point)
        return *outs, scale, zero_point

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads[:-2]


class _SteClip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: _How, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outs, scale, zero_point = _op(list(tensors), *how)
        ctx.mark_non_differentiable(scale, zero_point)
        ctx.save_for_backward(scale, zero_point, *tensors)
        ctx.how = how
        return *outs, scale, zero_point

    @staticmethod
    @differentiable_once("fake_quant_minmax")
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, zero_point, *tensors = saved
        grids = zip(*_per_tensor(tensors, ctx.how.axes, scale, zero_point), strict=True)
        found: list[Tensor | None] = []
        for grad, t, (s, z), b, axis in zip(grads[:-2], tensors, grids, ctx.how.bits, ctx.how.axes, strict=True):
            range_ = -(2 ** (b - 1)), 2 ** (b - 1) - 1, axis
            found.append(None if grad is None else torch.ops.zsq.fake_quant_backward(grad, t, s, z, *range_))
        return None, *found


_GRADS = {"ste": _Ste, "ste_clip": _SteClip}


def _per_tensor(tensors: Sequence[Tensor], axes: list[int], *of_all: Tensor) -> list[tuple[Tensor, ...]]:
    channels = [t.size(axis) for t, axis in zip(tensors, axes, strict=True)]
    return [t.split(channels) for t in of_all]


def _check_filled(name: str, tensors: Sequence[Tensor]) -> None:
    for i, t in enumerate(tensors):
        if t.dim() == 0:
            raise ValueError(f"fake_quant_minmax: {name}[{i}] must have a dimension, got shape ()")
        if t.numel() == 0:
            raise ValueError(f"fake_quant_minmax: {name}[{i}] must not be empty, got shape {tuple(t.shape)}")


def _checked_bits(bits: Any, n: int) -> list[int]:
    each = checks.one_each("fake_quant_minmax", "bits", bits, n)
    for k, b in enumerate(each):
        at = checks.place(bits, k)
        if not isinstance(b, int) or isinstance(b, bool) or not 2 <= b <= 8:
            raise ValueError(f"fake_quant_minmax: bits{at} must be an integer from 2 to 8, got {checks.shown(b)}")
    return each


def fake_quant_minmax(
    tensors: Sequence[Tensor],
    bits: int | Sequence[int],
    axis: int | Sequence[int] = 0,
    *,
    symmetric: bool = False,
    grad: str = "ste",
    out: Sequence[Tensor] | None = None,
    return_grid: bool = False,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Rounds each channel of each tensor to the grid between its own extremes: one call for all.

        lo, hi     = extremes of the channel; symmetric: -m, m with m = max(|lo|, |hi|)
        scale      = max(max(hi - lo, 1e-8) / (2^bits - 1), 2^-23 max(|lo|, |hi|))
        zero_point = -2^(bits - 1) - round_half_even(lo / scale); symmetric: 0
        x_hat      = fake_quant(x, scale, zero_point, -2^(bits - 1), 2^(bits - 1) - 1)

    The range is the channel's own and need not hold 0, so a zero_point may lie outside the codes. A channel with a NaN
    or an infinity is NaN. Every backend gives the same bits. No second derivative under "ste_clip".

    Args:
        tensors: of any shapes and strides, not empty, of one device and one dtype: float32, float16, bfloat16, or
            float64 (on the reference and cpu backends).
        bits: 2 to 8, one for all or one per tensor.
        axis: the channels' dimension, one for all or one per tensor.
        symmetric: the range is as wide on either side of 0.
        grad: "ste" passes the gradient everywhere and saves nothing, "ste_clip" where `fake_quant` does; none flows
            into the range.
        out: where to write, one per tensor, each the tensor itself or memory apart from all; shapes and dtype of the
            tensors. Only where no gradient is taken.
        return_grid: also return the grids.

    Returns:
        A list of tensors of the shapes and dtype of `tensors`, or out as a list. With return_grid (outs, scales,
        zero_points): lists with a (C,) per tensor, float32 (float64 for float64) and int32.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, number or name is not as above.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> weights = [torch.tensor([[-1.0, 0.1, 2.0], [0.0, 1.2, 3.0]]), torch.tensor([[1.0, 2.5]])]
        >>> fake_quant_minmax(weights, bits=2)
        [tensor([[-1.,  0.,  2.],
                [ 0.,  1.,  3.]]), tensor([[1.0000, 2.5000]])]

    Source: the min-max weight quantizer of ZeroQ, GDFQ, IntraQ, HAST and SynQ, with the scale written as a step.
    """
    checks.tensors("fake_quant_minmax", "tensors", tensors)
    _check_filled("tensors", tensors)
    checks.one_of("fake_quant_minmax", "grad", grad, tuple(_GRADS))
    checks.flag("fake_quant_minmax", "symmetric", symmetric)
    checks.flag("fake_quant_minmax", "return_grid", return_grid)
    how = _How(_checked_bits(bits, len(tensors)), checks.axes("fake_quant_minmax", tensors, axis), symmetric)

    if out is not None:
        checks.tensors("fake_quant_minmax", "out", out, tensors)
        checks.apart("fake_quant_minmax", out, tensors)
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *(out or ())))
    if out is not None and with_grad:
        raise ValueError("fake_quant_minmax: out must be None where a gradient is taken, got tensors")
    if not tensors:
        return ([], [], []) if return_grid else []
    if out is not None:
        outs, grid = list(out), _op_out(tensors, *how, out)
    elif with_grad:
        *outs, scale, zero_point = _GRADS[grad].apply(how, *tensors)
        grid = scale, zero_point
    else:
        outs, *grid = _op(tensors, *how)
    if not return_grid:
        return outs
    scales, zero_points = _per_tensor(tensors, how.axes, *grid)
    return outs, list(scales), list(zero_points)
