"""Adaptive rounding: weights between two neighbours of a grid, and which one is learned."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import backend, reference
from zsq_ext.ops import check as checks
from zsq_ext.ops.adaround_spec import ROUNDING, Rounding
from zsq_ext.ops.layout import COMPUTE, empty_rows
from zsq_ext.ops.once import differentiable_once

_ARGS = f"Tensor[] v, {ROUNDING}, Tensor? beta"

# base is an int16, and lies up to two codes below the range and one above it.
_CODE_LIMIT = 2**15 - 2


def _gathered(v: list[Tensor], *rest: Any) -> tuple[Any, ...]:
    return v, Rounding(*rest[:6]), *rest[6:]


def _gathered_backward(grad: list[Tensor], *rest: Any) -> tuple[Any, ...]:
    return grad, *_gathered(*rest)


def _fake(v: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor]:
    _, rounding, beta, _ = _gathered(v, *rest)
    return _empty(v, rounding), rounding.scale[0].new_empty(0 if beta is None else ())


def _fake_backward(grad: list[Tensor], *rest: Any) -> tuple[list[Tensor], list[Tensor]]:
    _, v, rounding, _, _, need_scale = _gathered_backward(grad, *rest)
    return _empty(v, rounding), [torch.empty_like(scale) for scale in rounding.scale] if need_scale else []


def _empty(v: list[Tensor], rounding: Rounding) -> list[Tensor]:
    return [empty_rows(t, scale.numel(), rounding.axis) for t, scale in zip(v, rounding.scale, strict=True)]


_op = backend.define(f"adaround({_ARGS}, bool hard) -> (Tensor[], Tensor)", _fake, gathered=_gathered)
_op_backward = backend.define(
    f"adaround_backward(Tensor[] grad, {_ARGS}, Tensor? grad_reg, bool need_scale) -> (Tensor[], Tensor[])",
    _fake_backward,
    gathered=_gathered_backward,
)


def _forward(v: list[Tensor], rounding: Rounding, beta: Tensor | None, hard: bool) -> tuple[list[Tensor], Tensor]:
    if beta is None and backend.decomposes():
        return reference.adaround(v, rounding, beta, hard)
    return _op(v, *rounding, beta, hard)


def _backward(
    grad: list[Tensor],
    v: list[Tensor],
    rounding: Rounding,
    beta: Tensor | None,
    grad_reg: Tensor | None,
    need_scale: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    if backend.decomposes() and not need_scale:
        return reference.adaround_backward(grad, v, rounding, beta, grad_reg, need_scale)
    return _op_backward(grad, v, *rounding, beta, grad_reg, need_scale)


class _AdaRound(torch.autograd.Function):
    """Gradients for v and scale. `tensors` are all v, all base, all scale and all zero_point."""

    @staticmethod
    def forward(
        ctx: Any, op: str, qmin: list[int], qmax: list[int], axis: int | None, beta: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.op = op
        ctx.save_for_backward(beta, *tensors)
        ctx.range = qmin, qmax, axis
        v, base, scale, zero_point = _quarters(tensors)
        found, reg = _forward(v, Rounding(base, scale, zero_point, qmin, qmax, axis), beta, False)
        return (*found, reg) if beta is not None else tuple(found)

    @staticmethod
    @differentiable_once()
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor | None, ...]:
        beta, *tensors = saved
        n = len(tensors) // 4
        need_scale = any(ctx.needs_input_grad[5 + 2 * n : 5 + 3 * n])
        grad_reg = None if beta is None else grads[n]
        v, base, scale, zero_point = _quarters(tensors)
        rounding = Rounding(base, scale, zero_point, *ctx.range)
        dv, dscale = _backward(list(grads[:n]), v, rounding, beta, grad_reg, need_scale)
        none = [None] * n
        return None, None, None, None, None, *dv, *none, *(dscale if need_scale else none), *none


def _quarters(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    n = len(tensors) // 4
    return [list(tensors[k * n : (k + 1) * n]) for k in range(4)]


def _check_grid(
    op: str, name: str, v: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, at: str = ""
) -> tuple[Tensor, Tensor]:
    """scale and zero_point, contiguous and of one length. `name` is what v is called."""
    dim = checks.dimension(op, name, v, axis, x_at=at)
    called = name, "scale", "zero_point"
    return checks.grid(op, v, scale, zero_point, dim, v.dtype, at, called=called, groups=False)


def _check_beta(op: str, beta: float | Tensor | None, v: Tensor, hard: bool) -> Tensor | None:
    """beta as a 0-d tensor."""
    checks.flag(op, "hard", hard)
    if beta is None:
        return None
    if hard:
        raise ValueError(f"{op}: beta must be None for hard rounding, got {checks.shown(beta)}")
    dtype = COMPUTE[v.dtype]
    if isinstance(beta, Tensor):
        checks.beside(op, "beta", beta, dtype, (), v.device, of=f" for {v.dtype} v")
        return beta.detach()
    checks.number(op, "beta", beta, rule="None, a number or a tensor")
    if not 1 <= beta < math.inf:
        raise ValueError(f"{op}: beta must be >= 1 and finite, got {beta}")
    return torch.full((), beta, dtype=dtype, device=v.device)


def adaround_start(
    w: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = 0
) -> tuple[Tensor, Tensor]:
    """Where `adaround` begins: the codes below w, and the v at which it gives w back.

        base = clamp(floor(w / scale) + zero_point, qmin - 2, qmax + 1)
        v = -log(1.2 / (w / scale - floor(w / scale) + 0.1) - 1)

    Beyond qmin - 2 and qmax + 1 no v would make a difference. Not an op of its own: it runs once per weight, and waits
    for the device.

    Args:
        w: the weight, any shape and strides; float32, float16, bfloat16 or float64.
        scale, zero_point, qmin, qmax, axis: as for `adaround`; scale is checked to be positive and finite.

    Returns:
        (base, v): int16, and w's dtype; both of w's shape.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, range, axis or scale is not as above.

    Example:
        >>> w, scale, zero_point = torch.tensor([[0.30, -0.40]]), torch.tensor([0.25]), torch.tensor([8]).int()
        >>> base, v = adaround_start(w, scale, zero_point, 0, 15)
        >>> base, adaround(v, base, scale, zero_point, 0, 15)
        (tensor([[9, 6]], dtype=torch.int16), tensor([[ 0.3000, -0.4000]]))
    """
    checks.compute_dtype("adaround_start", "w", w)
    checks.code_range("adaround_start", qmin, qmax, limit=_CODE_LIMIT)
    scale, zero_point = _check_grid("adaround_start", "w", w, scale, zero_point, axis)
    checks.positive("adaround_start", scale)
    shape = [1] * w.dim()
    if axis is not None:
        shape[axis] = scale.numel()
    with torch.no_grad():
        ratio = w.to(scale.dtype) / scale.view(shape)
        floor = ratio.floor()
        base = (floor + zero_point.view(shape)).clamp(qmin - 2, qmax + 1).to(torch.int16)
        return base, (-torch.log(1.2 / (ratio - floor + 0.1) - 1)).to(w.dtype)


def adaround(
    v: Tensor,
    base: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = 0,
    *,
    beta: float | Tensor | None = None,
    hard: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A weight between two codes of its grid, at a place that is learned; and how far from decided it is.

        h = clamp(1.2 * sigmoid(v) - 0.1, 0, 1)
        code = clamp(base + h, qmin, qmax),     w_hat = (code - zero_point) * scale
        regulariser = sum(1 - |2 h - 1|^beta)

    v gets the gradient through h, 0 where h is clamped and where base + h is outside [qmin, qmax], edges inside; that
    of the regulariser comes in the same pass. scale gets the sum of grad * (code - zero_point): base stays what it was,
    so that step and rounding can be learned together. There is no second derivative. `adaround_many` takes all weights
    of a block in one call.

    Computed in float32 (float64 for float64 v), each operation rounded once and in the order written, the result
    rounded once to v's dtype. NaN stays NaN. The exponential is within 2 units in the last place, so h may be off by
    4 * 2^-24; given h, w_hat is exact. The backends cpu, cuda and triton agree on every bit of w_hat and of v's
    gradient; sums are taken in a fixed order, so each of them repeats its own bits, on any number of threads.

    Args:
        v: the rounding variable, the weight's shape, any strides; float32, float16, bfloat16, or float64 (on the
            reference and cpu backends). v >= 0 rounds up in the end.
        base: the code below the weight, zero_point included, as `adaround_start` gives it; int16, v's shape.
        scale: the step, in units of the weight, > 0. Shape (1,), or (C,) with C = v.shape[axis]; float32, or float64
            where v is.
        zero_point: the code of 0. Shape (1,) or (C,), int32; may lie outside [qmin, qmax]. Gets no gradient.
        qmin, qmax: the codes' range, inclusive, within 32766 of 0.
        axis: the channels' dimension; None for one grid for the whole weight.
        beta: the regulariser's exponent, >= 1: a number, or a 0-d tensor of scale's dtype, so that a schedule can live
            on the device. None for no regulariser.
        hard: h = 1 where v >= 0, else 0: what is learned in the end. Gets no gradient.

    Returns:
        w_hat, in v's shape and dtype, or (w_hat, regulariser) with beta, the latter 0-d in scale's dtype. In memory
        each channel is one stretch, as it is in v along a first dimension.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, range or axis is not as above; or beta is given for hard rounding.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> v, base = torch.tensor([[0.0, -3.0, 3.0]]), torch.tensor([[2, 2, 7]], dtype=torch.int16)
        >>> scale, zero_point = torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32)
        >>> adaround(v, base, scale, zero_point, -8, 7, beta=2.0)
        (tensor([[1.2500, 1.0000, 3.5000]]), tensor(1.))
        >>> adaround(v, base, scale, zero_point, -8, 7, hard=True)
        tensor([[1.5000, 1.0000, 3.5000]])

    Source: M. Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv 2004.10568), with
    zeta = 1.1 and gamma = -0.1; learning the step beside it is Y. Jeon et al., Genie (arXiv 2212.04780).
    """
    checks.compute_dtype("adaround", "v", v)
    checks.code_range("adaround", qmin, qmax, limit=_CODE_LIMIT)
    found, reg = _adaround("adaround", [v], [base], [scale], [zero_point], [qmin], [qmax], axis, beta, hard)
    return found[0] if reg is None else (found[0], reg)


def adaround_many(
    v: Sequence[Tensor],
    base: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    qmin: int | Sequence[int],
    qmax: int | Sequence[int],
    axis: int | None = 0,
    *,
    beta: float | Tensor | None = None,
    hard: bool = False,
) -> list[Tensor] | tuple[list[Tensor], Tensor]:
    """`adaround` of several weights in one call: weights are small, and a launch costs more than the work.

    Args:
        v, base, scale, zero_point: one for each weight; every v of one dtype and device.
        qmin, qmax: one for all, or one for each.
        axis, beta, hard: for all.

    Returns:
        A list, the same bits as one call for each; with beta also the sum of all regularisers.

    Raises:
        As `adaround`, an argument's place in its list in brackets.

    Example:
        >>> v, base = [torch.zeros(1, 2), torch.ones(3)], [torch.ones(1, 2).short(), torch.ones(3).short()]
        >>> scale, zero_point = [torch.ones(1)] * 2, [torch.zeros(1, dtype=torch.int32)] * 2
        >>> adaround_many(v, base, scale, zero_point, -8, [7, 1])
        [tensor([[1.5000, 1.5000]]), tensor([1., 1., 1.])]
    """
    op = "adaround_many"
    checks.tensors(op, "v", v)
    n = len(v)
    if n == 0:
        raise ValueError(f"{op}: v must hold at least one tensor, got 0")
    for name, values in (("base", base), ("scale", scale), ("zero_point", zero_point)):
        checks.several(op, name, values, n)
    lows, highs = checks.code_ranges(op, qmin, qmax, n, _CODE_LIMIT)
    found, reg = _adaround(op, list(v), list(base), list(scale), list(zero_point), lows, highs, axis, beta, hard)
    return found if reg is None else (found, reg)


def _adaround(
    op: str,
    v: list[Tensor],
    base: list[Tensor],
    scale: list[Tensor],
    zero_point: list[Tensor],
    qmin: list[int],
    qmax: list[int],
    axis: int | None,
    beta: float | Tensor | None,
    hard: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """All of it, behind the two public forms, of which `op` is one."""
    for i, v_ in enumerate(v):
        at = "" if op == "adaround" else f"[{i}]"
        scale[i], zero_point[i] = _check_grid(op, "v", v_, scale[i], zero_point[i], axis, at)
        checks.beside(op, "base", base[i], torch.int16, v_.shape, v_.device, at, called="v's shape")
    beta = _check_beta(op, beta, v[0], hard)
    if torch.is_grad_enabled() and not hard and any(t.requires_grad for t in (*v, *scale)):
        out = _AdaRound.apply(op, qmin, qmax, axis, beta, *v, *base, *scale, *zero_point)
        return list(out[: len(v)]), None if beta is None else out[-1]
    backend.refuse_tangents(op, (v, scale))
    # The op itself knows no gradient, and would say so by a warning.
    v, scale = [t.detach() for t in v], [t.detach() for t in scale]
    found, reg = _forward(v, Rounding(base, scale, zero_point, qmin, qmax, axis), beta, hard)
    return found, None if beta is None else reg
