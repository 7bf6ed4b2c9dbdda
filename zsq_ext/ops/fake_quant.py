"""Fake-quantization: round to a b-bit grid and come back, with a straight-through gradient."""

import math
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import backend, reference
from zsq_ext.ops import check as checks
from zsq_ext.ops.layout import empty_for
from zsq_ext.ops.once import differentiable_once

_GRID = "Tensor scale, Tensor zero_point, int qmin, int qmax"
_ARGS = f"Tensor x, {_GRID}, int? axis=None"


def _fake(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    return empty_for(x, scale)


def _fake_backward(grad: Tensor, x: Tensor, scale: Tensor, *grid: Any) -> Tensor:
    return empty_for(x, scale)


def _fake_lsq_backward(grad: Tensor, x: Tensor, scale: Tensor, *grid: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_for(x, scale), torch.empty_like(scale), torch.empty_like(scale)


_op = backend.define(f"fake_quant({_ARGS}) -> Tensor", _fake)
_op_out = backend.define(f"fake_quant_out(Tensor x, {_GRID}, int? axis, Tensor(a!) out) -> ()", lambda *args: None)
_op_backward = backend.define(f"fake_quant_backward(Tensor grad, {_ARGS}) -> Tensor", _fake_backward)
_op_lsq_backward = backend.define(
    f"fake_quant_lsq_backward(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor)", _fake_lsq_backward
)


def _forward(x: Tensor, *grid: Any) -> Tensor:
    return reference.fake_quant(x, *grid) if backend.decomposes() else _op(x, *grid)


def _backward(grad: Tensor, x: Tensor, *grid: Any) -> Tensor:
    return reference.fake_quant_backward(grad, x, *grid) if backend.decomposes() else _op_backward(grad, x, *grid)


class _Ste(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *grid: Any) -> Tensor:
        return _forward(x, *grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None, None


class _SteClip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.range = qmin, qmax, axis
        return _forward(x, scale, zero_point, qmin, qmax, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Clip.apply(grad, *ctx.saved_tensors, *ctx.range), None, None, None, None, None


class _Clip(torch.autograd.Function):
    """The backward as a function of its own: linear in grad, so its derivative is itself."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.range = qmin, qmax, axis
        return _backward(grad, x, scale, zero_point, qmin, qmax, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Clip.apply(grad, *ctx.saved_tensors, *ctx.range), None, None, None, None, None, None


class _Lsq(torch.autograd.Function):
    """Gradients for the step, and for the zero-point where it is a float. Sums stay an op under a compiler too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        axis: int | None,
        grad_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.range, ctx.grad_scale = (qmin, qmax, axis), grad_scale
        return _forward(x, scale, zero_point, qmin, qmax, axis)

    @staticmethod
    @differentiable_once("fake_quant")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dscale, dzero_point = _op_lsq_backward(grad, *saved, *ctx.range)
        if ctx.grad_scale != 1:
            dscale, dzero_point = dscale * ctx.grad_scale, dzero_point * ctx.grad_scale
        return dx, dscale, dzero_point if ctx.needs_input_grad[2] else None, None, None, None, None


_GRADS = ("ste_clip", "ste", "lsq", "lsq_plus")


def _check_out(out: Tensor, x: Tensor) -> None:
    checks.beside("fake_quant", "out", out, x.dtype, x.shape, x.device, of=" as x is", called="x's shape")
    checks.apart("fake_quant", [out], [x], many=False)


def fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    *,
    grad: str = "ste_clip",
    grad_scale: float = 1.0,
    out: Tensor | None = None,
    check: bool = False,
) -> Tensor:
    """Rounds x to a grid of steps and returns it in x's own units.

        code = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)
        x_hat = (code - zero_point) * scale

    Computed in float32 (float64 for float64 x), each operation rounded once, the result rounded once to x's
    dtype. NaN stays NaN; infinities clamp. Every backend gives the same bits.

    Args:
        x: any shape and strides; float32, float16, bfloat16, or float64 (on the reference and cpu backends).
        scale: the step, in units of x, > 0. Shape (1,), or (C,) with C = x.shape[axis], or, with axis 0, (C, G): the K
            elements of each x[c], in the order of its shape, are then G groups of K / G. float32, or float64 where x
            is. Gets a gradient under "lsq" and "lsq_plus" only.
        zero_point: the code of x = 0. Shape (1,) or as scale, int32; may lie outside [qmin, qmax]. Under "lsq_plus" of
            scale's dtype instead, rounded half to even, and it gets a gradient.
        qmin, qmax: the codes' range, inclusive: (-8, 7) is signed 4 bits.
        axis: the channels' dimension; None for one grid for the whole tensor.
        grad: "ste_clip" passes the gradient where qmin <= x / scale + zero_point <= qmax, edges included and
            before rounding; "ste" passes it everywhere and saves nothing. "lsq" passes it as ste_clip does, and gives
            scale the sum of grad * (code - zero_point - x / scale inside, code - zero_point outside). "lsq_plus" is
            lsq, and gives zero_point the sum of grad * (0 inside, -scale outside). Both sum in a fixed order, so
            every run gives the same bits. NaN in x makes its channel's sums NaN.
        grad_scale: under "lsq" and "lsq_plus", a factor on the gradients of scale and zero_point, finite.
        out: where to write, x itself or memory apart from it; shape, dtype and device of x, any strides that keep its
            elements apart. None for fresh memory, whose first touch costs a large tensor more than its arithmetic. Only
            where no gradient is taken.
        check: also verify that scale is positive and finite, which waits for the device.

    Returns:
        out, or a tensor of x's shape, dtype and memory format; with groups it is contiguous.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, range, axis or name is not as above, or out shares memory with x in part.
        NotImplementedError: the forced backend cannot run it; says why. Also a gradient of lsq's gradient.

    Example:
        >>> x = torch.tensor([[-3.0, 0.26], [0.5, 9.0]])
        >>> scale, zero_point = torch.tensor([0.5, 1.0]), torch.zeros(2, dtype=torch.int32)
        >>> fake_quant(x, scale, zero_point, -8, 7, axis=0)
        tensor([[-3.0000,  0.5000],
                [ 0.0000,  7.0000]])

    Source: B. Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, CVPR 2018; the straight-through gradient is Bengio et al., 2013; lsq is
    S. Esser et al., Learned Step Size Quantization (arXiv 1902.08153), where grad_scale is 1 / sqrt(N * qmax) for N
    elements per step; lsq_plus is Y. Bhalgat et al. (arXiv 2004.09576).
    """
    checks.compute_dtype("fake_quant", "x", x)
    checks.code_range("fake_quant", qmin, qmax)
    checks.one_of("fake_quant", "grad", grad, _GRADS)
    checks.number("fake_quant", "grad_scale", grad_scale)
    if not -math.inf < grad_scale < math.inf:
        raise ValueError(f"fake_quant: grad_scale must be finite, got {grad_scale}")
    axis = checks.dimension("fake_quant", "x", x, axis)
    scale, zero_point = checks.grid("fake_quant", x, scale, zero_point, axis, x.dtype, learned=grad == "lsq_plus")
    checks.flag("fake_quant", "check", check)
    if check:
        checks.positive("fake_quant", scale)

    learned = grad in ("lsq", "lsq_plus") and (scale.requires_grad or zero_point.requires_grad)
    if out is not None:
        _check_out(out, x)
        if torch.is_grad_enabled() and (x.requires_grad or learned or out.requires_grad):
            raise ValueError("fake_quant: out must be None where a gradient is taken, got a tensor")
        if backend.decomposes():
            reference.fake_quant_out(x, scale, zero_point, qmin, qmax, axis, out)
        else:
            _op_out(x, scale.detach(), zero_point, qmin, qmax, axis, out)
        return out
    if torch.is_grad_enabled():
        if grad in ("lsq", "lsq_plus") and (x.requires_grad or learned):
            return _Lsq.apply(x, scale, zero_point, qmin, qmax, axis, float(grad_scale))
        if scale.requires_grad:  # the op itself knows no gradient of it, and would say so by a warning
            scale = scale.detach()
        if x.requires_grad:
            function = _Ste if grad == "ste" else _SteClip
            return function.apply(x, scale, zero_point, qmin, qmax, axis)
    return _forward(x, scale, zero_point, qmin, qmax, axis)
