"""bn_act, channel_sums and their gradients.

Shapes: u, y, residual and their gradients are [N, C, ...]; mean, var, gamma and beta are [C]; sums are [C] under stats
"batch", [N, C] under "sample".
"""

import torch
from torch import Tensor

from zsq_ext.ops.layout import arranged, channels_last, rows_of


def _per_channel(t: Tensor, u: Tensor) -> Tensor:
    """[C] or [N, C], shaped to broadcast over u."""
    return t.reshape(*t.shape[:-1], u.size(1), *[1] * (u.dim() - 2))


def _normalised(
    u: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(v, a, inv): what enters the activation, and the channels' slopes. Every operation rounds once, in this order."""
    inv = (var + eps).sqrt().reciprocal()
    a = (torch.ones_like(var) if gamma is None else gamma) * inv
    b = (torch.zeros_like(var) if beta is None else beta) - mean * a
    v = _per_channel(a, u) * u.to(mean.dtype) + _per_channel(b, u)
    return v if residual is None else v + residual.to(mean.dtype), a, inv


def _activated(v: Tensor, act: str) -> Tensor:
    if act == "relu":
        return torch.where(v < 0, 0, v)
    if act == "relu6":
        return torch.where(v < 0, 0, torch.where(v > 6, 6, v))
    if act == "silu":
        return v / (1 + torch.exp(-v))
    if act == "hardswish":
        return v * (v + 3).clamp(0, 6) * (1 / 6)
    return v


def _passes(v: Tensor, act: str) -> Tensor:
    """Where relu or relu6 lets a gradient through: strictly inside, and where v is NaN."""
    return ~(v <= 0) if act == "relu" else ~((v <= 0) | (v >= 6))


def _through(g: Tensor, v: Tensor, act: str) -> Tensor:
    """The gradient before the activation, from the one behind it."""
    if act in ("relu", "relu6"):
        return torch.where(_passes(v, act), g, 0)
    if act == "silu":
        s = torch.reciprocal(1 + torch.exp(-v))
        return g * (s * (1 + v * (1 - s)))
    if act == "hardswish":
        return torch.where(v <= -3, 0, torch.where(v < 3, g * (v * (1 / 3) + 0.5), g))
    return g


def _packed(keep: Tensor, rows: int, length: int, last: bool) -> Tensor:
    """One bit per element, in memory order, each row from a fresh byte on: [rows, bytes] uint8."""
    row = (keep.movedim(1, -1) if last else keep).reshape(rows, length)
    row = torch.nn.functional.pad(row.to(torch.uint8), (0, -length % 8)).view(rows, (length + 7) // 8, 8)
    return (row << torch.arange(8, dtype=torch.uint8, device=row.device)).sum(2, dtype=torch.uint8)


def _unpacked(mask: Tensor, u: Tensor) -> Tensor:
    rows, length = rows_of(u)
    keep = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    keep = keep.view(rows, 8 * mask.size(1))[:, :length] != 0
    if channels_last(u):
        return keep.reshape(u.size(0), *u.shape[2:], u.size(1)).movedim(-1, 1)
    return keep.reshape(u.shape)


def _sums(p: Tensor, q: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    """Sums of p and q over the places of each channel, rounded once at the end."""
    axes = list(range(2, p.dim())) if stats == "sample" else [0, *range(2, p.dim())]
    if not axes:  # a sum over no dimension would be one over all
        return p.clone(), q.clone()
    return p.sum(axes, dtype=torch.float64).to(p.dtype), q.sum(axes, dtype=torch.float64).to(q.dtype)


def channel_sums(u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    d = u.to(mean.dtype) - _per_channel(mean, u)
    return _sums(d, d * d, stats)


def _of_sums(u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
    """The gradient of the sums with respect to u, in the form that does not cancel."""
    d = u.to(mean.dtype) - _per_channel(mean, u)
    return _per_channel(2 * grad_s2, u) * d + _per_channel(grad_s1, u)


def channel_sums_backward(u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
    return arranged(_of_sums(u, mean, grad_s1, grad_s2).to(u.dtype), channels_last(u))


def bn_act(
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
    last = channels_last(u)
    v, _, _ = _normalised(u, mean, var, gamma, beta, eps, residual)
    y = arranged(_activated(v, act).to(u.dtype), last)
    s1, s2 = channel_sums(u, mean, stats) if stats else (mean.new_empty(0), mean.new_empty(0))
    mask = _packed(_passes(v, act), *rows_of(u), last) if save_mask else u.new_empty(0, dtype=torch.uint8)
    return y, s1, s2, mask


def bn_act_backward(
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
    last = channels_last(u)
    du, dr, dgamma, dbeta = u.new_empty(0), u.new_empty(0), mean.new_empty(0), mean.new_empty(0)
    if grad_y is None:
        if need_u and grad_s1 is not None and grad_s2 is not None:
            du = channel_sums_backward(u, mean, grad_s1, grad_s2)
        return du, dr, dgamma, dbeta
    v, a, inv = _normalised(u, mean, var, gamma, beta, eps, residual)
    g = grad_y.to(mean.dtype)
    g = torch.where(_unpacked(mask, u), g, 0) if mask is not None else _through(g, v, act)
    if need_u:
        w = _per_channel(a, u) * g
        if grad_s1 is not None and grad_s2 is not None:
            w = w + _of_sums(u, mean, grad_s1, grad_s2)
        du = arranged(w.to(u.dtype), last)
    if need_residual:
        dr = arranged(g.to(u.dtype, copy=True), last)
    if need_affine:
        dbeta, dgamma = _sums(g, g * (u.to(mean.dtype) - _per_channel(mean, u)), "batch")
        dgamma = dgamma * inv
    return du, dr, dgamma, dbeta
