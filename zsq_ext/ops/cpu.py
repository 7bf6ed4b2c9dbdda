"""Backend `cpu`: C++ with AVX2 and threads, from csrc/cpu/."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import native, native_bn_act
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


def bn_act(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    threads = torch.get_num_threads()
    return native_bn_act.forward(native.module.cpu_bn_act, (threads,), u, *rest)[0]


def bn_act_backward(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    threads = torch.get_num_threads()
    return native_bn_act.backward(native.module.cpu_bn_act_backward, (threads,), u, *rest)[0]


def channel_sums(u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    return bn_act(u, mean, *native_bn_act.NO_Y, stats, False)[1:3]


def channel_sums_backward(u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
    return bn_act_backward(u, None, grad_s1, grad_s2, mean, *native_bn_act.ONLY_SUMS)[0]
