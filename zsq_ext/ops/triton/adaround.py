"""adaround and its gradient on Triton: a launch for each weight."""

import torch
from torch import Tensor

from zsq_ext.ops.adaround_spec import Rounding
from zsq_ext.ops.layout import empty_rows, in_layout_of
from zsq_ext.ops.triton.launch import kernels, on_device_of


def _run(
    grad: Tensor | None,
    weight: tuple[Tensor, Tensor, Tensor, Tensor, int, int],
    axis: int | None,
    beta: Tensor | None,
    grad_reg: Tensor | None,
    hard: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """(w_hat or dv, partial sums [channels, parts])."""
    v, base, scale, zero_point, qmin, qmax = weight
    channels = scale.numel()
    out = empty_rows(v, channels, axis)
    inner = v.numel() // max(channels, 1)
    v, base = in_layout_of(out, v), in_layout_of(out, base)
    grad = None if grad is None else in_layout_of(out, grad)
    launchers = kernels("adaround")
    cut = launchers.cut_of(channels, inner)
    sums = scale.new_empty(channels, cut.columns) if need_sums else None
    with on_device_of(v):
        launchers.adaround(
            cut, grad, v, base, out, scale, zero_point, beta, grad_reg, sums, channels, inner, qmin, qmax, hard
        )
    return out, sums


def adaround(v: list[Tensor], rounding: Rounding, beta: Tensor | None, hard: bool) -> tuple[list[Tensor], Tensor]:
    found, parts = [], []
    for t, weight in zip(v, rounding.each(), strict=True):
        out, sums = _run(None, (t, *weight), rounding.axis, beta, None, hard, beta is not None)
        found.append(out)
        if sums is not None:
            parts.append(sums.sum(dtype=torch.float64))
    first = rounding.scale[0]
    return found, torch.stack(parts).sum().to(first.dtype) if parts else first.new_empty(0)


def adaround_backward(
    grad: list[Tensor],
    v: list[Tensor],
    rounding: Rounding,
    beta: Tensor | None,
    grad_reg: Tensor | None,
    need_scale: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    dv, dscale = [], []
    for g, t, weight in zip(grad, v, rounding.each(), strict=True):
        out, sums = _run(g, (t, *weight), rounding.axis, beta, grad_reg, False, need_scale)
        dv.append(out)
        if sums is not None:
            dscale.append(sums.sum(1, dtype=torch.float64).to(sums.dtype))
    return dv, dscale
