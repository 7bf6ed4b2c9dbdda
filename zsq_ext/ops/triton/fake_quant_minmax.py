"""fake_quant_minmax on Triton."""

import torch
from torch import Tensor

from zsq_ext.ops.layout import empty_sliced, in_layout_of, sliced
from zsq_ext.ops.triton.launch import kernels, on_device_of


def fake_quant_minmax(
    tensors: list[Tensor], bits: list[int], axes: list[int], symmetric: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    outs = [empty_sliced(t, axis) for t, axis in zip(tensors, axes, strict=True)]
    return outs, *_run(tensors, bits, axes, symmetric, outs)


def fake_quant_minmax_out(
    tensors: list[Tensor], bits: list[int], axes: list[int], symmetric: bool, outs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    places = [out if sliced(out, axis) else empty_sliced(out, axis) for out, axis in zip(outs, axes, strict=True)]
    grid = _run(tensors, bits, axes, symmetric, places)
    for out, place in zip(outs, places, strict=True):
        if place is not out:
            out.copy_(place)
    return grid


def _run(
    tensors: list[Tensor], bits: list[int], axes: list[int], symmetric: bool, outs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    seen = [in_layout_of(out, t) for out, t in zip(outs, tensors, strict=True)]
    rows, channels = [], 0
    for x, out, axis, b in zip(seen, outs, axes, bits, strict=True):
        rows.append((x.data_ptr(), out.data_ptr(), channels, x.numel() // x.size(axis), b))
        channels += x.size(axis)
    # Addresses may change from call to call, so the table is made anew, in memory that is copied without a wait. A CUDA
    # graph would copy it again when others use that memory: there the backend `cuda` serves, which takes it by value.
    device = seen[0].device
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    scale = torch.empty(channels, device=table.device)
    zero_point = torch.empty_like(scale, dtype=torch.int32)
    with on_device_of(table):
        kernels("fake_quant_minmax").fake_quant_minmax(table, seen[0], scale, zero_point, symmetric)
    return scale, zero_point
