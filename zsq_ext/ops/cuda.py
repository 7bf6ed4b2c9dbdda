"""Backend `cuda`: CUDA C++ from kernels/*.cu, launched on the current stream of the tensors' device."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import native, native_bn_act
from zsq_ext.ops.layout import DTYPE_CODE, places_of


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


def _partials(u: Tensor, mean: Tensor, wanted: bool, per_sample: bool) -> Tensor | None:
    """Memory for what the first stage of a sum leaves behind."""
    if not wanted:
        return None
    return mean.new_empty(2, native.module.cuda_bn_act_chunks(*places_of(u), per_sample), u.size(1))


def _stream(partials: Tensor | None) -> tuple[int, int]:
    return 0 if partials is None else partials.data_ptr(), torch.cuda.current_stream().cuda_stream


def bn_act(u: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = rest[-2]
    with torch.cuda.device_of(u):
        partials = _partials(u, mean, stats is not None, stats == "sample")
        out, error = native_bn_act.forward(native.module.cuda_bn_act, _stream(partials), u, mean, *rest)
    if error:
        raise RuntimeError(f"bn_act: CUDA launch failed: {error}")
    return out


def bn_act_backward(
    u: Tensor, grad_y: Tensor | None, grad_s1: Tensor | None, grad_s2: Tensor | None, mean: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_sample = grad_s1 is not None and grad_s1.dim() == 2
    call, grads = native.module.cuda_bn_act_backward, (grad_y, grad_s1, grad_s2)
    with torch.cuda.device_of(u):
        partials = _partials(u, mean, rest[-1] and grad_y is not None, per_sample)
        out, error = native_bn_act.backward(call, _stream(partials), u, *grads, mean, *rest)
    if error:
        raise RuntimeError(f"bn_act_backward: CUDA launch failed: {error}")
    return out


def channel_sums(u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    return bn_act(u, mean, *native_bn_act.NO_Y, stats, False)[1:3]


def channel_sums_backward(u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
    return bn_act_backward(u, None, grad_s1, grad_s2, mean, *native_bn_act.ONLY_SUMS)[0]


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
