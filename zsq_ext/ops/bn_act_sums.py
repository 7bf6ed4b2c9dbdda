"""The statistics of what enters a batch norm: sums over each channel, shifted by the stored mean."""

import math
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import backend
from zsq_ext.ops import check as checks
from zsq_ext.ops.layout import COMPUTE, channels_last, empty_arranged
from zsq_ext.ops.once import differentiable_once

STATS = ("batch", "sample")
# What a batch norm in eval mode has stored: no gradient is computed of it, and none must be missed.
_STORED = ("mean", "var")


def fake_sums(u: Tensor, mean: Tensor, stats: str | None) -> tuple[Tensor, Tensor]:
    shape = {"batch": u.shape[1:2], "sample": u.shape[:2], None: (0,)}[stats]
    return mean.new_empty(shape), mean.new_empty(shape)


_op = backend.define("channel_sums(Tensor u, Tensor mean, str stats) -> (Tensor, Tensor)", fake_sums)
_op_backward = backend.define(
    "channel_sums_backward(Tensor u, Tensor mean, Tensor grad_s1, Tensor grad_s2) -> Tensor",
    lambda u, mean, grad_s1, grad_s2: empty_arranged(u, channels_last(u)),
)


def wants_undefined(ctx: Any) -> None:
    # A gradient that nobody sent then arrives as None, and its term is skipped; a compiler's graph has no such
    # thing as an absent gradient, and sends zeros.
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


def pair(grad_s1: Tensor | None, grad_s2: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both or neither, contiguous."""
    if grad_s1 is None and grad_s2 is None:
        return None, None
    grad_s1 = torch.zeros_like(grad_s2) if grad_s1 is None else grad_s1  # type: ignore[arg-type]
    grad_s2 = torch.zeros_like(grad_s1) if grad_s2 is None else grad_s2
    return grad_s1.contiguous(), grad_s2.contiguous()


class _ChannelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
        wants_undefined(ctx)
        ctx.save_for_backward(u, mean)
        return _op(u, mean, stats)

    @staticmethod
    @differentiable_once("channel_sums")
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_s1: Tensor | None, grad_s2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        u, mean = saved
        grad_s1, grad_s2 = pair(grad_s1, grad_s2)
        if grad_s1 is None:
            return None, None, None
        return _op_backward(u, mean, grad_s1, grad_s2), None, None


def check_input(op: str, u: Tensor) -> None:
    checks.compute_dtype(op, "u", u)
    if u.dim() < 2:
        raise ValueError(f"{op}: u must have shape (N, C, ...), got {tuple(u.shape)}")


def check_channels(op: str, u: Tensor, **parameters: Tensor | None) -> Any:
    """The parameters, contiguous; None where one is."""
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
        if name in _STORED and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} must be a constant, got one that requires a gradient")
    return [None if t is None else t.contiguous() for t in parameters.values()]


def check_eps(op: str, eps: Any) -> None:
    checks.number(op, "eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be >= 0 and finite, got {eps}")


def _check_sums(op: str, s1: Any, s2: Any, count: Any, **parameters: Any) -> None:
    """The sums over `count` values of each channel, (C,) or (N, C), and parameters (C,) of their dtype.

    gamma and beta may be None. A tensor of counts is one for each channel, and its values are not looked at.
    """
    checks.compute_dtype(op, "s1", s1)
    if s1.dim() not in (1, 2):
        raise ValueError(f"{op}: s1 must have shape (C,) or (N, C), got {tuple(s1.shape)}")
    checks.beside(op, "s2", s2, s1.dtype, s1.shape, s1.device, of=" as s1 is", called="s1's shape")
    for name, t in parameters.items():
        if t is not None or name not in ("gamma", "beta"):
            checks.beside(op, name, t, s1.dtype, s1.shape[-1:], s1.device, of=" as s1 is")
    if isinstance(count, Tensor):
        if count.dim() > 1 or count.numel() not in (1, s1.size(-1)):
            raise ValueError(f"{op}: count must have shape () or ({s1.size(-1)},), got {tuple(count.shape)}")
        return
    checks.integer(op, "count", count, rule="an integer or a tensor")
    if not count > 0:
        raise ValueError(f"{op}: count must be > 0, got {count}")


def channel_sums(u: Tensor, mean: Tensor, stats: str = "batch") -> tuple[Tensor, Tensor]:
    """The sums of `bn_act` alone: reads u once, writes nothing of its size.

        S1 = sum(u - mean),     S2 = sum((u - mean)^2)

    Args:
        u, mean: as for `bn_act`.
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
    check_input("channel_sums", u)
    checks.one_of("channel_sums", "stats", stats, STATS)
    if mean is None:
        raise TypeError("channel_sums: mean must be a tensor, got NoneType")
    (mean,) = check_channels("channel_sums", u, mean=mean)
    if u.requires_grad and torch.is_grad_enabled():
        return _ChannelSums.apply(u, mean, stats)
    return _op(u, mean, stats)


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
        TypeError: a type or dtype is not as above.
        ValueError: a shape or device is not as above, or count is not positive.

    Example:
        >>> mean = torch.tensor([1.0, 3.0])
        >>> statistics_of(*channel_sums(torch.tensor([[1.0, -1.0], [3.0, 5.0]]), mean), 2, mean)
        (tensor([2., 2.]), tensor([1., 9.]))
    """
    _check_sums("statistics_of", s1, s2, count, mean=mean)
    shift = s1 / count
    return mean + shift, (s2 / count - shift.square()).clamp_min(0)


def channel_energy(
    s1: Tensor, s2: Tensor, count: int | Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """The mean square of what a batch norm yields, from the sums over what enters it: no second read.

        a = gamma / sqrt(var + eps),     energy = a^2 (S2 / count - (S1 / count)^2) + (a S1 / count + beta)^2

    Args:
        s1, s2: sums of `bn_act` or `channel_sums`, shifted by the batch norm's own mean; (C,), or (N, C) per sample.
        count: how many values of a channel were added up, as for `statistics_of`.
        var, gamma, beta, eps: as for `bn_act`.

    Returns:
        The energies, shaped like the sums; differentiable in the sums, gamma and beta.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device or number is not as above.

    Example:
        >>> u, mean, var = torch.tensor([[1.0, -1.0], [3.0, 5.0]]), torch.tensor([1.0, 3.0]), torch.tensor([4.0, 1.0])
        >>> channel_energy(*channel_sums(u, mean), 2, var, None, None, 0.0)
        tensor([ 0.5000, 10.0000])
    """
    _check_sums("channel_energy", s1, s2, count, var=var, gamma=gamma, beta=beta)
    check_eps("channel_energy", eps)
    slope = (var + eps).rsqrt() if gamma is None else gamma * (var + eps).rsqrt()
    shift = s1 / count
    level = slope * shift if beta is None else slope * shift + beta
    return slope.square() * (s2 / count - shift.square()).clamp_min(0) + level.square()
