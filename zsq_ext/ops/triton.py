"""Backend `triton`: the Triton kernels of kernels/*.py, on CUDA, or on the CPU under TRITON_INTERPRET=1."""

import contextlib
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.layout import channels_of, in_layout_of

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
