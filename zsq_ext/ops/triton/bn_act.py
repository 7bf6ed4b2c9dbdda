"""bn_act, channel_sums and their gradients on Triton."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.bn_act_spec import Found, Grads, Layer, Needs, Norm, Outputs
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


def bn_act(u: Tensor, residual: Tensor | None, layer: Layer, wanted: Outputs) -> Found:
    """y is empty where there is no var."""
    mean, stats = layer.norm.mean, wanted.stats
    launchers, cut = _cut(u, stats == "sample")
    last = channels_last(u)
    y = None if layer.norm.var is None else empty_arranged(u, last)
    rows, length = rows_of(u)
    mask = u.new_empty(rows, (length + 7) // 8, dtype=torch.uint8) if wanted.mask else None
    partials = None if stats is None else mean.new_empty(2, cut.all_chunks, u.size(1))
    ends = mean.new_empty(2, cut.all_chunks, u.size(1)) if wanted.extremes else None
    seen = arranged(u, last), None if residual is None else arranged(residual, last)
    with on_device_of(u):
        launchers.forward(cut, *seen, layer, y, mask, partials, ends)
        extremes = mean.new_empty(0) if ends is None else torch.stack((ends[0].amin(0), ends[1].amax(0))) + 0.0
        if partials is None:
            s1, s2 = mean.new_empty(0), mean.new_empty(0)
        else:
            s1, s2 = _added_up(partials, cut.groups)
            s1, s2 = (s1, s2) if stats == "sample" else (s1[0], s2[0])
    bits = u.new_empty(0, dtype=torch.uint8) if mask is None else mask
    return u.new_empty(0) if y is None else y, s1, s2, bits, extremes


def bn_act_backward(
    u: Tensor, residual: Tensor | None, mask: Tensor | None, grads: Grads, layer: Layer, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = layer.norm
    launchers, cut = _cut(u, grads.s1 is not None and grads.s1.dim() == 2)
    last, has_y = channels_last(u), grads.y is not None
    du = empty_arranged(u, last) if needs.u else None
    dr = empty_arranged(u, last) if needs.residual and has_y else None
    partials = norm.mean.new_empty(2, cut.all_chunks, u.size(1)) if needs.affine and has_y else None
    dgamma, dbeta = norm.mean.new_empty(0), norm.mean.new_empty(0)
    seen, residual, grad_y = (None if t is None else arranged(t, last) for t in (u, residual, grads.y))
    with on_device_of(u):
        launchers.backward(cut, seen, residual, mask, grads._replace(y=grad_y), layer, du, dr, partials)
        if partials is not None and norm.var is not None:
            sum_g, sum_gd = _added_up(partials, 1)
            dbeta, dgamma = sum_g[0], sum_gd[0] * (norm.var + norm.eps).double().sqrt().float().reciprocal()
    return u.new_empty(0) if du is None else du, u.new_empty(0) if dr is None else dr, dgamma, dbeta


def channel_sums(u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    return bn_act(u, None, Layer(Norm(mean)), Outputs(stats))[1:3]


def channel_sums_backward(u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
    return bn_act_backward(u, None, None, Grads(None, grad_s1, grad_s2), Layer(Norm(mean)), Needs())[0]
