"""Backend `triton`: the Triton kernels of kernels/*.py, on CUDA, or on the CPU under TRITON_INTERPRET=1."""

import contextlib
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.layout import (
    arranged,
    channels_last,
    channels_of,
    empty_arranged,
    in_layout_of,
    places_of,
    rows_of,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device is visible, and TRITON_INTERPRET=1 is not set"


def refuses(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda" and not (device == "cpu" and _interpreted()):
        return f"takes CUDA tensors, not {device}"
    if device == "cpu" and dtype == torch.bfloat16:
        return "takes no torch.bfloat16 when interpreted: the interpreter truncates where hardware rounds"
    return None if dtype in _DTYPES else f"takes no {dtype}"


def _kernels() -> Any:
    return importlib.import_module("zsq_ext.kernels.fake_quant")


def _device(x: Tensor) -> Any:
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def _fake_quant(
    grad: Tensor | None, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    out = torch.empty_like(x)
    x = in_layout_of(out, x)
    if grad is not None:
        grad = in_layout_of(out, grad)
    learned = zero_point.dtype != torch.int32
    channels, inner = channels_of(out, scale, axis)
    with _device(x):
        _kernels().fake_quant(grad, x, out, scale, zero_point, learned, x.numel(), channels, inner, qmin, qmax)
    return out


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    return _fake_quant(None, x, scale, zero_point, qmin, qmax, axis)


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    return _fake_quant(grad, x, scale, zero_point, qmin, qmax, axis)


def _cut(u: Tensor, per_sample: bool) -> tuple[Any, Any]:
    kernels = importlib.import_module("zsq_ext.kernels.bn_act")
    return kernels, kernels.Cut(*places_of(u), per_sample)


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
    kernels, cut = _cut(u, stats == "sample")
    last = channels_last(u)
    y = None if var is None else empty_arranged(u, last)
    rows, length = rows_of(u)
    mask = u.new_empty(rows, (length + 7) // 8, dtype=torch.uint8) if save_mask else None
    partials = None if stats is None else mean.new_empty(2, cut.all_chunks, u.size(1))
    seen = arranged(u, last), None if residual is None else arranged(residual, last)
    with torch.cuda.device_of(u) if u.is_cuda else contextlib.nullcontext():
        kernels.forward(cut, *seen, y, mask, mean, var, gamma, beta, partials, eps, act)
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
    kernels, cut = _cut(u, grad_s1 is not None and grad_s1.dim() == 2)
    last, has_y = channels_last(u), grad_y is not None
    du = empty_arranged(u, last) if need_u else None
    dr = empty_arranged(u, last) if need_residual and has_y else None
    partials = mean.new_empty(2, cut.all_chunks, u.size(1)) if need_affine and has_y else None
    dgamma, dbeta = mean.new_empty(0), mean.new_empty(0)
    big = (None if t is None else arranged(t, last) for t in (u, grad_y, residual))
    with torch.cuda.device_of(u) if u.is_cuda else contextlib.nullcontext():
        kernels.backward(cut, *big, mask, mean, var, gamma, beta, grad_s1, grad_s2, du, dr, partials, eps, act)
        if partials is not None and var is not None:
            sum_g, sum_gd = _added_up(partials, 1)
            dbeta, dgamma = sum_g[0], sum_gd[0] * (var + eps).sqrt().reciprocal()
    return u.new_empty(0) if du is None else du, u.new_empty(0) if dr is None else dr, dgamma, dbeta


def channel_sums(u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    return bn_act(u, mean, None, None, None, 0.0, None, "none", stats, False)[1:3]


def channel_sums_backward(u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
    sums = grad_s1, grad_s2
    return bn_act_backward(u, None, *sums, mean, None, None, None, 0.0, None, None, "none", True, False, False)[0]


def fake_quant_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    n = x.numel()
    if n == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    x, grad = in_layout_of(dx, x), in_layout_of(dx, grad)
    dscale, dzero_point = torch.empty_like(scale), torch.empty_like(scale)
    channels, inner = channels_of(dx, scale, axis)
    cut = _kernels().lsq_cut(n, channels, inner)
    partial = torch.empty(2, channels, cut.parts, dtype=torch.float64, device=x.device)
    sums = dscale, dzero_point, partial[0], partial[1]
    learned = zero_point.dtype != torch.int32
    with _device(x):
        _kernels().fake_quant_lsq_backward(
            grad, x, dx, *sums, scale, zero_point, learned, n, channels, inner, qmin, qmax, cut
        )
    return dx, dscale, dzero_point
