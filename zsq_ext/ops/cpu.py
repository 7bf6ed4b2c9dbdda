"""Backend `cpu`: C++ with AVX2 and threads, from csrc/cpu/."""

import torch
from torch import Tensor

from zsq_ext.ops import native
from zsq_ext.ops.layout import DTYPE_CODE


def missing() -> str | None:
    return native.problem


def refuses(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"takes CPU tensors, not {device}"
    return None if dtype in DTYPE_CODE else f"takes no {dtype}"


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    threads = torch.get_num_threads()
    return native.fake_quant(native.module.cpu_fake_quant, threads, None, x, scale, zero_point, qmin, qmax, axis)[0]


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    threads = torch.get_num_threads()
    return native.fake_quant(native.module.cpu_fake_quant, threads, grad, x, scale, zero_point, qmin, qmax, axis)[0]


def fake_quant_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    call, threads = native.module.cpu_fake_quant_lsq_backward, torch.get_num_threads()
    return native.fake_quant_lsq_backward(call, None, threads, grad, x, scale, zero_point, qmin, qmax, axis)[0]
