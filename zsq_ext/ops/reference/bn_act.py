"""bn_act, channel_sums and their gradients.

Shapes: u, y, residual and their gradients are [N, C, ...]; mean, var, gamma and beta are [C]; sums are [C] under stats
"batch", [N, C] under "sample".
"""

import torch
from torch import Tensor

from zsq_ext.ops.bn_act_spec import Found, Grads, Layer, Needs, Norm, Outputs
from zsq_ext.ops.layout import arranged, channels_last, rows_of
from zsq_ext.ops.reference.channel_range import channel_range
from zsq_ext.ops.reference.fake_quant import fake_quant, fake_quant_backward


def _per_channel(t: Tensor, u: Tensor) -> Tensor:
    """[C] or [N, C], shaped to broadcast over u."""
    return t.reshape(*t.shape[:-1], u.size(1), *[1] * (u.dim() - 2))


def _normalised(u: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """(v, a, inv): what enters the activation, and the channels' slopes. Every operation rounds once, in this order."""
    mean, var, gamma, beta, eps = norm
    # in double: torch's float32 root, from a vector library, is off by a unit for 7 of 1000 numbers
    inv = (var + eps).double().sqrt().to(var.dtype).reciprocal()
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
    """Where a clip lets a gradient through: strictly inside, and where v is NaN; where there is none, everywhere."""
    if act == "none":
        return torch.ones_like(v, dtype=torch.bool)
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


def bn_act(u: Tensor, residual: Tensor | None, layer: Layer, wanted: Outputs) -> Found:
    """What enters the quantizer is rounded to u's dtype first, as fake_quant and channel_range would find it."""
    norm, act, quant = layer
    last = channels_last(u)
    v, _, _ = _normalised(u, residual, norm)
    y = _activated(v, act).to(u.dtype)
    ends = torch.stack(channel_range(y, 1)) if wanted.extremes else norm.mean.new_empty(0)
    passing = _passes(v, act) if wanted.mask else None
    if quant is not None:
        if passing is not None and quant.clip:
            passing &= fake_quant_backward(torch.ones_like(y), y, *quant.grid) != 0
        y = fake_quant(y, *quant.grid)
    mean, stats = norm.mean, wanted.stats
    s1, s2 = (mean.new_empty(0), mean.new_empty(0)) if stats is None else channel_sums(u, mean, stats)
    mask = u.new_empty(0, dtype=torch.uint8) if passing is None else _packed(passing, *rows_of(u), last)
    return arranged(y, last), s1, s2, mask, ends


def bn_act_backward(
    u: Tensor, residual: Tensor | None, mask: Tensor | None, grads: Grads, layer: Layer, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(du, dresidual, dgamma, dbeta), empty where they are not needed."""
    norm, act, quant = layer
    mean, last = norm.mean, channels_last(u)
    du, dr, dgamma, dbeta = u.new_empty(0), u.new_empty(0), mean.new_empty(0), mean.new_empty(0)
    of_sums = None if grads.s1 is None or grads.s2 is None else _of_sums(u, mean, grads.s1, grads.s2)
    if grads.y is None:
        if needs.u and of_sums is not None:
            du = arranged(of_sums.to(u.dtype), last)
        return du, dr, dgamma, dbeta
    v, a, inv = _normalised(u, residual, norm)
    g = grads.y.to(mean.dtype)
    if mask is not None:
        g = torch.where(_unpacked(mask, u), g, 0)
    else:
        if quant is not None and quant.clip:
            g = fake_quant_backward(g, _activated(v, act).to(u.dtype), *quant.grid)
        g = _through(g, v, act)
    if needs.u:
        w = _per_channel(a, u) * g
        w = w if of_sums is None else w + of_sums
        du = arranged(w.to(u.dtype), last)
    if needs.residual:
        dr = arranged(g.to(u.dtype, copy=True), last)
    if needs.affine:
        dbeta, dgamma = _sums(g, g * (u.to(mean.dtype) - _per_channel(mean, u)), "batch")
        dgamma = dgamma * inv
    return du, dr, dgamma, dbeta
