"""fake_quant of many tensors in one call: all weights of a network, each on a grid of its own, its steps learned."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq_ext.ops import backend, reference
from zsq_ext.ops import check as checks
from zsq_ext.ops.fake_quant_many_spec import GRIDS, Grids, Needs
from zsq_ext.ops.layout import empty_for
from zsq_ext.ops.once import differentiable_once

_ARGS = f"Tensor[] tensors, {GRIDS}"


def _gathered(tensors: list[Tensor], *grids: Any) -> tuple[Any, ...]:
    return tensors, Grids(*grids)


def _gathered_out(tensors: list[Tensor], *rest: Any) -> tuple[Any, ...]:
    return tensors, Grids(*rest[:5]), rest[5]


def _gathered_backward(grads: list[Tensor], tensors: list[Tensor], *rest: Any) -> tuple[Any, ...]:
    return grads, tensors, Grids(*rest[:5]), Needs(*rest[5:])


def _fake(tensors: list[Tensor], scales: list[Tensor], *grids: Any) -> list[Tensor]:
    return [empty_for(x, s) for x, s in zip(tensors, scales, strict=True)]


def _fake_backward(grads: list[Tensor], tensors: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    _, _, (scales, *_), needs = _gathered_backward(grads, tensors, *rest)
    length = sum(s.numel() for s, need in zip(scales, needs.sums, strict=True) if need)
    dx = [empty_for(x, s) for x, s, need in zip(tensors, scales, needs.dx, strict=True) if need]
    return dx, scales[0].new_empty(length), scales[0].new_empty(length)


_op = backend.define(f"fake_quant_many({_ARGS}) -> Tensor[]", _fake, gathered=_gathered)
_op_out = backend.define(
    f"fake_quant_many_out({_ARGS}, Tensor(a!)[] out) -> ()", lambda *args: None, gathered=_gathered_out
)
_op_backward = backend.define(
    f"fake_quant_many_backward(Tensor[] grads, {_ARGS}, bool[] need_dx, bool[] need_sums)"
    " -> (Tensor[], Tensor, Tensor)",
    _fake_backward,
    gathered=_gathered_backward,
)


class _How(NamedTuple):
    """What of the grids is no tensor: one of each per tensor, an axis of -1 for none."""

    qmin: list[int]
    qmax: list[int]
    axes: list[int]


def _forward(tensors: Sequence[Tensor], how: _How) -> list[Tensor]:
    """`tensors` are all x, all scales and all zero-points."""
    x, scales, zero_points = _thirds(tensors)
    grids = Grids(scales, zero_points, *how)
    return reference.fake_quant_many(x, grids) if backend.decomposes() else _op(x, *grids)


def _backward(
    grads: list[Tensor], tensors: list[Tensor], grids: Grids, needs: Needs
) -> tuple[list[Tensor], Tensor, Tensor]:
    if backend.decomposes() and not any(needs.sums):  # sums stay an op under a compiler too
        return reference.fake_quant_many_backward(grads, tensors, grids, needs)
    return _op_backward(grads, tensors, *grids, *needs)


def _thirds(tensors: Sequence[Any]) -> list[list[Any]]:
    n = len(tensors) // 3
    return [list(tensors[k * n : (k + 1) * n]) for k in range(3)]


def _without_gradient(ctx: Any, outs: list[Tensor], wanted: list[list[bool]]) -> tuple[Tensor, ...]:
    """outs, those marked of which nothing wants a gradient."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*[out for out, *wants in zip(outs, *wanted, strict=True) if not any(wants)])
    return tuple(outs)


class _Ste(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: _How, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _without_gradient(ctx, _forward(tensors, how), _thirds(ctx.needs_input_grad[1:])[:1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads, *[None] * (2 * len(grads))


class _Lsq(torch.autograd.Function):
    """Gradients for whatever wants one: where no scale and zero-point does, this is ste_clip."""

    @staticmethod
    def forward(ctx: Any, how: _How, grad_scale: list[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.how, ctx.grad_scale = how, grad_scale
        return _without_gradient(ctx, _forward(tensors, how), _thirds(ctx.needs_input_grad[2:]))

    @staticmethod
    @differentiable_once("fake_quant_many")
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[list[Tensor | None]] = [[None] * len(grads) for _ in range(3)]
        wanted, tensors = _thirds(ctx.needs_input_grad[2:]), _thirds(saved)
        live = [k for k, grad in enumerate(grads) if grad is not None]
        moved = [k for k in live if wanted[0][k]]
        learned = [k for k in live if wanted[1][k] or wanted[2][k]]
        if live:
            upstream, x, *lists = (_of(each, live) for each in (grads, *tensors, *ctx.how))
            needs = Needs([k in moved for k in live], [k in learned for k in live])
            dx, *sums = _backward(upstream, x, Grids(*lists), needs)
            for k, t in zip(moved, dx, strict=True):
                found[0][k] = t
            for place, wants, flat in zip(found[1:], wanted[1:], sums, strict=True):
                if any(_of(wants, learned)):
                    parts = _parts(flat, _of(tensors[1], learned), _of(ctx.grad_scale, learned))
                    for k, t in zip(learned, parts, strict=True):
                        place[k] = t
        return None, None, *found[0], *found[1], *found[2]


def _of(values: Sequence[Any], chosen: list[int]) -> list[Any]:
    return [values[k] for k in chosen]


def _parts(flat: Tensor, scales: list[Tensor], factors: list[float]) -> list[Tensor]:
    """The gradients of scales that stand one after another in flat, each times its factor."""
    parts = [t.view_as(s) for t, s in zip(flat.split([s.numel() for s in scales]), scales, strict=True)]
    return parts if all(factor == 1 for factor in factors) else list(torch._foreach_mul(parts, factors))


_GRADS = ("lsq", "lsq_plus", "ste_clip", "ste")


def fake_quant_many(
    tensors: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    qmin: int | Sequence[int],
    qmax: int | Sequence[int],
    axis: int | Sequence[int | None] | None = 0,
    *,
    grad: str = "lsq",
    grad_scale: float | Sequence[float] = 1.0,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`fake_quant` of many tensors in one call: weights are small, and a launch costs more than the work.

        x_hat[k] = fake_quant(tensors[k], scales[k], zero_points[k], qmin[k], qmax[k], axis[k])

    The same bits as one call for each, sums over channels included; the backward is one call too, for those tensors
    that gradients come to and in which something wants one. There is no second derivative.

    Args:
        tensors: of any shapes and strides, of one device and one dtype: float32, float16, bfloat16, or float64 (on the
            reference and cpu backends).
        scales, zero_points: one for each, as for `fake_quant`: per tensor, channel or group.
        qmin, qmax: the codes' range, one for all or one for each.
        axis: the channels' dimension or None, one for all or one for each.
        grad: as for `fake_quant`. Under "lsq" a scale that wants no gradient costs nothing: then it is "ste_clip".
        grad_scale: under "lsq" and "lsq_plus", a factor on the gradients of scale and zero-point, one for all or one
            for each; finite.
        out: where to write, one for each, the tensor itself or memory apart from all; shapes and dtype of the tensors.
            Only where no gradient is taken.

    Returns:
        out as a list, or a list of tensors as `fake_quant` returns them.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, range, axis, number or name is not as above; a place in its list in brackets.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> weights = [torch.tensor([[-3.0, 0.26], [0.5, 9.0]]), torch.tensor([0.3, 2.0])]
        >>> steps = [torch.tensor([0.5, 1.0]).requires_grad_(), torch.tensor([0.5]).requires_grad_()]
        >>> zero = [torch.zeros(1, dtype=torch.int32)] * 2
        >>> found = fake_quant_many(weights, steps, zero, [-8, -2], [7, 1], [0, None])
        >>> [t.tolist() for t in found]
        [[[-3.0, 0.5], [0.0, 7.0]], [0.5, 0.5]]
        >>> sum(t.sum() for t in found).backward()
        >>> steps[1].grad  # 1 - 0.6 inside, and the last code beyond
        tensor([1.4000])

    Source: S. Esser et al., Learned Step Size Quantization (arXiv 1902.08153), whose grad_scale is 1 / sqrt(N * qmax)
    for N elements per step; lsq_plus is Y. Bhalgat et al. (arXiv 2004.09576).
    """
    checks.one_of("fake_quant_many", "grad", grad, _GRADS)
    checks.tensors("fake_quant_many", "tensors", tensors)
    n = len(tensors)
    factors = _factors(grad_scale, n)
    scales, zero_points, how = _checked(tensors, scales, zero_points, (qmin, qmax, axis), learned=grad == "lsq_plus")
    if out is not None:
        checks.tensors("fake_quant_many", "out", out, tensors)
        checks.apart("fake_quant_many", out, tensors)
    if n == 0:
        return []

    if grad in ("ste", "ste_clip") or not torch.is_grad_enabled():
        # The op itself knows no gradient of them, and would say so by a warning.
        scales, zero_points = [t.detach() for t in scales], [t.detach() for t in zero_points]
    lists = *tensors, *scales, *zero_points
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*lists, *(out or ())))
    if out is not None:
        if with_grad:
            raise ValueError("fake_quant_many: out must be None where a gradient is taken, got tensors")
        if backend.decomposes():
            reference.fake_quant_many_out(list(tensors), Grids(scales, zero_points, *how), list(out))
        else:
            _op_out(tensors, scales, zero_points, *how, out)
        return list(out)
    if not with_grad:
        return _forward(lists, how)
    return list(_Ste.apply(how, *lists) if grad == "ste" else _Lsq.apply(how, factors, *lists))


def _factors(grad_scale: Any, n: int) -> list[float]:
    factors = checks.one_each("fake_quant_many", "grad_scale", grad_scale, n)
    for k, factor in enumerate(factors):
        at = checks.place(grad_scale, k)
        checks.number("fake_quant_many", "grad_scale", factor, at)
        if not -math.inf < factor < math.inf:
            raise ValueError(f"fake_quant_many: grad_scale{at} must be finite, got {factor}")
    return [float(factor) for factor in factors]


def _checked(
    tensors: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    numbers: tuple[Any, Any, Any],
    learned: bool,
) -> tuple[list[Tensor], list[Tensor], _How]:
    op, n = "fake_quant_many", len(tensors)
    checks.several(op, "scales", scales, n)
    checks.several(op, "zero_points", zero_points, n)
    low, high, axis = numbers
    qmin, qmax = checks.code_ranges(op, low, high, n)
    axes = checks.axes(op, tensors, axis, optional=True)
    called = "tensors", "scales", "zero_points"
    grids = []
    for k, (x, scale, zero_point) in enumerate(zip(tensors, scales, zero_points, strict=True)):
        dim = None if axes[k] == -1 else axes[k]
        grids.append(checks.grid(op, x, scale, zero_point, dim, x.dtype, f"[{k}]", called=called, learned=learned))
    return [grid[0] for grid in grids], [grid[1] for grid in grids], _How(qmin, qmax, axes)
