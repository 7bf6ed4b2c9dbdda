"""bn_act, channel_sums and their gradients on Triton."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.layout import arranged, channels_last, empty_arranged, places_of, rows_of
from zsq_ext.ops.triton.launch import kernels, on_device_of


def _cut(u: Tensor, per_sample: bool) -> tuple[Any, Any]:
    launchers = kernels("bn_act")
    return launchers, launchers.Cut(*places_of(u), per_sample)


def _added_up(partials: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The second stage: [2, all chunks, channels] to two sums [groups, channels]."""
    two, chunks, channels = partials.shape
    per_group = partials.view(two, groups, chunks // max(groups, 1), channels)
    first, second = (t.sum(1, dtype=torch.float64).float() for t in per_group)
    return first, second


def bn_act(
    u: Tensor,
    mean: Tensor,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: str,
    stats: str | None,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launchers, cut = _cut(u, stats == "sample")
    last = channels_last(u)
    y = None if var is None else empty_arranged(u, last)
    rows, length = rows_of(u)
    mask = u.new_empty(rows, (length + 7) // 8, dtype=torch.uint8) if save_mask else None
    partials = None if stats is None else mean.new_empty(2, cut.all_chunks, u.size(1))
    seen = arranged(u, last), None if residual is None else arranged(residual, last)
    with on_device_of(u):
        launchers.forward(cut, *seen, y, mask, mean, var, gamma, beta, partials, eps, act)
        if partials is None:
            s1, s2 = mean.new_empty(0), mean.new_empty(0)
        else:
            s1, s2 = _added_up(partials, cut.groups)
            s1, s2 = (s1, s2) if stats == "sample" else (s1[0], s2[0])
    nothing = u.new_empty(0)
    return nothing if y is None else y, s1, s2, u.new_empty(0, dtype=torch.uint8) if mask is None else mask


def bn_act_backward(
    u: Tensor,
    grad_y: Tensor | None,
    grad_s1: Tensor | None,
    grad_s2: Tensor | None,
    mean: Tensor,
    var: Tensor | None,
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
    launchers, cut = _cut(u, grad_s1 is not None and grad_s1.dim() == 2)
    last, has_y = channels_last(u), grad_y is not None
    du = empty_arranged(u, last) if need_u else None
    dr = empty_arranged(u, last) if need_residual and has_y else None
    partials = mean.new_empty(2, cut.all_chunks, u.size(1)) if need_affine and has_y else None
    dgamma, dbeta = mean.new_empty(0), mean.new_empty(0)
    big = (None if t is None else arranged(t, last) for t in (u, grad_y, residual))
    with on_device_of(u):
        launchers.backward(cut, *big, mask, mean, var, gamma, beta, grad_s1, grad_s2, du, dr, partials, eps, act)
        if partials is not None and var is not None:
            sum_g, sum_gd = _added_up(partials, 1)
            dbeta, dgamma = sum_g[0], sum_gd[0] * (var + eps).sqrt().reciprocal()
    return u.new_empty(0) if du is None else du, u.new_empty(0) if dr is None else dr, dgamma, dbeta


def channel_sums(u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    return bn_act(u, mean, None, None, None, 0.0, None, "none", stats, False)[1:3]


def channel_sums_backward(u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
    sums = grad_s1, grad_s2
    return bn_act_backward(u, None, *sums, mean, None, None, None, 0.0, None, None, "none", True, False, False)[0]
