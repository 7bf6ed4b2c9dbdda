"""Batch norm in eval mode with residual, activation and the statistics of its input, in one pass each way."""

import math
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import backend, reference
from zsq_ext.ops.layout import COMPUTE, channels_last, empty_arranged, rows_of

ACTS = ("none", "relu", "relu6", "silu", "hardswish")
STATS = ("batch", "sample")

# Their slope is 0 or 1: one bit says all that the backward needs.
_CLIPS = ("relu", "relu6")

_NORM = "Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps"


def _fake_sums(u: Tensor, mean: Tensor, stats: str | None) -> tuple[Tensor, Tensor]:
    shape = {"batch": u.shape[1:2], "sample": u.shape[:2], None: (0,)}[stats]
    return mean.new_empty(shape), mean.new_empty(shape)


def _fake(
    u: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: str,
    stats: str | None,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, length = rows_of(u)
    mask = u.new_empty((rows, (length + 7) // 8) if save_mask else 0, dtype=torch.uint8)
    return empty_arranged(u, channels_last(u)), *_fake_sums(u, mean, stats), mask


def _fake_backward(
    u: Tensor,
    grad_y: Tensor | None,
    grad_s1: Tensor | None,
    grad_s2: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None,
    mask: Tensor | None,
    act: str,
    need_u: bool,
    need_residual: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last, has_y = channels_last(u), grad_y is not None
    du = empty_arranged(u, last) if need_u else u.new_empty(0)
    dr = empty_arranged(u, last) if need_residual and has_y else u.new_empty(0)
    affine = mean.shape if need_affine and has_y else (0,)
    return du, dr, mean.new_empty(affine), mean.new_empty(affine)


_op = backend.define(
    f"bn_act(Tensor u, {_NORM}, Tensor? residual, str act, str? stats, bool save_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
_op_backward = backend.define(
    f"bn_act_backward(Tensor u, Tensor? grad_y, Tensor? grad_s1, Tensor? grad_s2, {_NORM}, Tensor? residual, "
    "Tensor? mask, str act, bool need_u, bool need_residual, bool need_affine) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
_op_sums = backend.define("channel_sums(Tensor u, Tensor mean, str stats) -> (Tensor, Tensor)", _fake_sums)
_op_sums_backward = backend.define(
    "channel_sums_backward(Tensor u, Tensor mean, Tensor grad_s1, Tensor grad_s2) -> Tensor",
    lambda u, mean, grad_s1, grad_s2: empty_arranged(u, channels_last(u)),
)


def _forward(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = rest[-2]
    return reference.bn_act(u, *rest) if stats is None and backend.decomposes() else _op(u, *rest)


def _backward(
    u: Tensor, grad_y: Tensor | None, grad_s1: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pointwise = grad_s1 is None and not rest[-1]  # no sums, neither of u nor of the gradient
    return (reference.bn_act_backward if pointwise and backend.decomposes() else _op_backward)(
        u, grad_y, grad_s1, *rest
    )


def _wants_undefined(ctx: Any) -> None:
    # A gradient that nobody sent then arrives as None, and its term is skipped; a compiler's graph has no such
    # thing as an absent gradient, and sends zeros.
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


def _pair(grad_s1: Tensor | None, grad_s2: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both or neither, contiguous."""
    if grad_s1 is None and grad_s2 is None:
        return None, None
    grad_s1 = torch.zeros_like(grad_s2) if grad_s1 is None else grad_s1  # type: ignore[arg-type]
    grad_s2 = torch.zeros_like(grad_s1) if grad_s2 is None else grad_s2
    return grad_s1.contiguous(), grad_s2.contiguous()


class _BnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        mean: Tensor,
        var: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        residual: Tensor | None,
        act: str,
        stats: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _wants_undefined(ctx)
        # Without a residual everything is recomputed from u. With one, a clip leaves a bit per element behind; a smooth
        # activation needs u and the residual again, and keeping the residual costs nothing where it is alive anyway,
        # as the input of the convolutions beside the shortcut is, while what enters the activation never is.
        save_mask = residual is not None and act in _CLIPS
        y, s1, s2, mask = _forward(u, mean, var, gamma, beta, eps, residual, act, stats, save_mask)
        kept = residual if act not in (*_CLIPS, "none") else None
        ctx.save_for_backward(u, mean, var, gamma, beta, kept, mask if save_mask else None)
        ctx.rest = eps, act, stats
        return y, s1, s2

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_s1: Tensor | None, grad_s2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        u, mean, var, gamma, beta, residual, mask = ctx.saved_tensors
        eps, act, stats = ctx.rest
        need_u, _, _, need_gamma, need_beta, _, need_residual, *_ = ctx.needs_input_grad
        grad_s1, grad_s2 = (None, None) if stats is None else _pair(grad_s1, grad_s2)
        if grad_y is None and grad_s1 is None:
            return (None,) * 9
        dr = None
        if need_residual and act == "none":
            dr, need_residual = grad_y, False
        du, other, dgamma, dbeta = _Backward.apply(
            *(u, grad_y, grad_s1, grad_s2, mean, var, gamma, beta, eps, residual, mask, act),
            *(need_u, need_residual, need_gamma or need_beta),
        )
        if grad_y is None:
            return (du if need_u else None, *(None,) * 8)
        dr = other if need_residual else dr
        affine = dgamma if need_gamma else None, dbeta if need_beta else None
        return (du if need_u else None, None, None, *affine, None, dr, None, None)


class _Backward(torch.autograd.Function):
    """The backward as a function of its own, which says what it is that it cannot do."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _backward(u, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("bn_act: a gradient must be taken once, got a gradient of the gradient")


class _ChannelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
        _wants_undefined(ctx)
        ctx.save_for_backward(u, mean)
        return _op_sums(u, mean, stats)

    @staticmethod
    def backward(ctx: Any, grad_s1: Tensor | None, grad_s2: Tensor | None) -> tuple[Tensor | None, ...]:
        u, mean = ctx.saved_tensors
        grad_s1, grad_s2 = _pair(grad_s1, grad_s2)
        if grad_s1 is None:
            return None, None, None
        return _SumsBackward.apply(u, mean, grad_s1, grad_s2), None, None


class _SumsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
        return _op_sums_backward(u, mean, grad_s1, grad_s2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("channel_sums: a gradient must be taken once, got a gradient of the gradient")


def _check_input(op: str, u: Tensor) -> None:
    if not isinstance(u, Tensor) or u.dtype not in COMPUTE:
        got = u.dtype if isinstance(u, Tensor) else type(u).__name__
        raise TypeError(f"{op}: u must be a float32, float16, bfloat16 or float64 tensor, got {got}")
    if u.dim() < 2:
        raise ValueError(f"{op}: u must have shape (N, C, ...), got {tuple(u.shape)}")


def _check_channels(op: str, u: Tensor, **parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters, contiguous."""
    for name, t in parameters.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype is not COMPUTE[u.dtype]:
            raise TypeError(f"{op}: {name} must be {COMPUTE[u.dtype]} for {u.dtype} u, got {t.dtype}")
        if t.shape != u.shape[1:2]:
            raise ValueError(f"{op}: {name} must have shape ({u.size(1)},), got {tuple(t.shape)}")
        if t.device != u.device:
            raise ValueError(f"{op}: {name} must be on {u.device}, got {t.device}")
    return [None if t is None else t.contiguous() for t in parameters.values()]


def bn_act(
    u: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    act: str = "none",
    stats: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Batch norm in eval mode, a shortcut and an activation; on request also the statistics of what entered.

        inv = 1 / sqrt(var + eps),     a = gamma * inv,     b = beta - mean * a
        y = act(a * u + b + residual)
        S1 = sum(u - mean),     S2 = sum((u - mean)^2)

    Computed in float32 (float64 for float64 u), each operation rounded once and in the order written, the result
    rounded once to u's dtype. NaN stays NaN. Every backend gives the same bits of y, but for the exponential of silu,
    which may differ by a few units in the last place; sums are taken in fixed chunks, so a backend repeats its own
    bits, on any number of threads. Sums shifted by the stored mean keep the variance's digits, and add across
    batches: `statistics_of` reads mean and variance off them.

    The gradient, in one pass for any loss on y, S1 and S2, with g the gradient before the activation:

        du = a * g + 2 gS2 (u - mean) + gS1,     dresidual = g,     dbeta = sum g,     dgamma = sum g (u - mean) * inv

    relu and relu6 pass it strictly inside their range. mean and var get none, and there is no second derivative.

    Args:
        u: (N, C, ...), any strides; float32, float16, bfloat16, or float64 (on the reference and cpu backends).
        mean, var: the stored statistics, (C,); float32, or float64 where u is.
        gamma, beta: the affine part, (C,), as mean; None for 1 and for 0.
        eps: added to var, >= 0.
        residual: added before the activation; shape, dtype and device of u.
        act: "none", "relu", "relu6", "silu": v / (1 + exp(-v)), or "hardswish": v * clamp(v + 3, 0, 6) * (1 / 6).
        stats: "batch" also returns the sums over each channel, (C,); "sample" over each channel of each sample, (N, C).

    Returns:
        y, with u's shape, dtype and memory format: channels last where u's channels vary fastest, else contiguous. With
        stats, (y, S1, S2); the sums in the dtype of mean.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, name or number is not as above.
        NotImplementedError: the forced backend cannot run it; or a second derivative is asked for.

    Example:
        >>> u = torch.tensor([[1.0, -1.0], [3.0, 5.0]])
        >>> mean, var = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 1.0])
        >>> bn_act(u, mean, var, None, None, 0.0, act="relu", stats="batch")
        (tensor([[0., 0.],
                [1., 2.]]), tensor([ 2., -2.]), tensor([ 4., 20.]))
    """
    _check_input("bn_act", u)
    if act not in ACTS:
        raise ValueError(f"bn_act: act must be one of {', '.join(ACTS)}, got {act!r}")
    if stats is not None and stats not in STATS:
        raise ValueError(f"bn_act: stats must be None or one of {', '.join(STATS)}, got {stats!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"bn_act: eps must be >= 0 and finite, got {eps}")
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"bn_act: residual must be a tensor, got {type(residual).__name__}")
        if residual.dtype is not u.dtype:
            raise TypeError(f"bn_act: residual must be {u.dtype} as u is, got {residual.dtype}")
        if residual.shape != u.shape:
            raise ValueError(f"bn_act: residual must have u's shape {tuple(u.shape)}, got {tuple(residual.shape)}")
        if residual.device != u.device:
            raise ValueError(f"bn_act: residual must be on {u.device}, got {residual.device}")
    if mean is None or var is None:
        raise TypeError(f"bn_act: {'mean' if mean is None else 'var'} must be a tensor, got NoneType")
    mean, var, gamma, beta = _check_channels("bn_act", u, mean=mean, var=var, gamma=gamma, beta=beta)  # type: ignore
    args = u, mean, var, gamma, beta, float(eps), residual, act, stats
    trained = (t for t in (u, gamma, beta, residual) if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in trained):
        y, s1, s2 = _BnAct.apply(*args)
    else:
        y, s1, s2, _ = _forward(*args, False)
    return y if stats is None else (y, s1, s2)


def channel_sums(u: Tensor, mean: Tensor, stats: str = "batch") -> tuple[Tensor, Tensor]:
    """The sums of `bn_act` alone: reads u once, writes nothing of its size.

        S1 = sum(u - mean),     S2 = sum((u - mean)^2)

    Args:
        u, mean: as for `bn_act`. mean gets no gradient.
        stats: "batch" for sums over each channel, (C,); "sample" for each channel of each sample, (N, C).

    Returns:
        (S1, S2), in the dtype of mean.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device or name is not as above.
        NotImplementedError: the forced backend cannot run it; or a second derivative is asked for.

    Example:
        >>> channel_sums(torch.tensor([[1.0, -1.0], [3.0, 5.0]]), torch.tensor([1.0, 3.0]))
        (tensor([ 2., -2.]), tensor([ 4., 20.]))
    """
    _check_input("channel_sums", u)
    if stats not in STATS:
        raise ValueError(f"channel_sums: stats must be one of {', '.join(STATS)}, got {stats!r}")
    if mean is None:
        raise TypeError("channel_sums: mean must be a tensor, got NoneType")
    (mean,) = _check_channels("channel_sums", u, mean=mean)  # type: ignore[assignment]
    if u.requires_grad and torch.is_grad_enabled():
        return _ChannelSums.apply(u, mean, stats)
    return _op_sums(u, mean, stats)


def statistics_of(s1: Tensor, s2: Tensor, count: int | Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The data's mean and biased variance from the sums of `bn_act` or `channel_sums`.

        data_mean = mean + S1 / count,     data_var = S2 / count - (S1 / count)^2, never below zero

    The sums add: those of several batches are those of all their data, if the counts are added too.

    Args:
        s1, s2: sums, (C,) or (N, C).
        count: how many values of a channel were added up, > 0; a tensor, one per channel, is not checked.
        mean: what they were shifted by, (C,).

    Returns:
        (data_mean, data_var), shaped like the sums, differentiable.

    Raises:
        ValueError: count is not positive.

    Example:
        >>> mean = torch.tensor([1.0, 3.0])
        >>> statistics_of(*channel_sums(torch.tensor([[1.0, -1.0], [3.0, 5.0]]), mean), 2, mean)
        (tensor([2., 2.]), tensor([1., 9.]))
    """
    if not isinstance(count, Tensor) and not count > 0:
        raise ValueError(f"statistics_of: count must be > 0, got {count}")
    shift = s1 / count
    return mean + shift, (s2 / count - shift.square()).clamp_min(0)
