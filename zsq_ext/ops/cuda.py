"""Backend `cuda`: CUDA C++ from kernels/*.cu, launched on the current stream of the tensors' device."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import native
from zsq_ext.ops.layout import DTYPE_CODE


def missing() -> str | None:
    if native.problem:
        return native.problem
    if not native.module.cuda_archs:
        return "the native module was built without CUDA (no nvcc was found, or ZSQ_CUDA=OFF)"
    if not torch.backends.cuda.is_built():
        return "this build of torch has no CUDA"
    return None if torch.cuda.is_available() else "no CUDA device is visible"


def refuses(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return f"takes CUDA tensors, not {device}"
    return None if dtype in DTYPE_CODE and dtype != torch.float64 else f"takes no {dtype}"


def _launched(op: str, error: str) -> None:
    if error:
        raise RuntimeError(f"{op}: CUDA launch failed: {error}")


def _fake_quant(grad: Tensor | None, x: Tensor, *grid: Any) -> Tensor:
    with torch.cuda.device_of(x):
        stream = torch.cuda.current_stream().cuda_stream
        out, error = native.fake_quant(native.module.cuda_fake_quant, stream, grad, x, *grid)
    _launched("fake_quant", error)
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
    call, workspace = native.module.cuda_fake_quant_lsq_backward, native.module.cuda_fake_quant_lsq_workspace
    with torch.cuda.device_of(x):
        stream = torch.cuda.current_stream().cuda_stream
        found, error = native.fake_quant_lsq_backward(
            call, workspace, stream, grad, x, scale, zero_point, qmin, qmax, axis
        )
    _launched("fake_quant_lsq_backward", error)
    return found
