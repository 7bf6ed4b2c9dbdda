"""How `cpu` and `cuda` call the native module's fake_quant_minmax."""

from array import array

import torch
from torch import Tensor

from zsq_ext.ops.layout import COMPUTE, DTYPE_CODE, empty_sliced, in_layout_of, sliced
from zsq_ext.ops.native.call import Call


def fake_quant_minmax(
    call: Call, tensors: list[Tensor], bits: list[int], axes: list[int], symmetric: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    outs = [empty_sliced(t, axis) for t, axis in zip(tensors, axes, strict=True)]
    return outs, *_run(call, tensors, bits, axes, symmetric, outs)


def fake_quant_minmax_out(
    call: Call, tensors: list[Tensor], bits: list[int], axes: list[int], symmetric: bool, outs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    places = [out if sliced(out, axis) else empty_sliced(out, axis) for out, axis in zip(outs, axes, strict=True)]
    grid = _run(call, tensors, bits, axes, symmetric, places)
    for out, place in zip(outs, places, strict=True):
        if place is not out:
            out.copy_(place)
    return grid


def _run(
    call: Call, tensors: list[Tensor], bits: list[int], axes: list[int], symmetric: bool, outs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Fills outs, which are sliced, and returns (scale, zero_point) of all channels."""
    channels = [t.size(axis) for t, axis in zip(tensors, axes, strict=True)]
    scale = torch.empty(sum(channels), dtype=COMPUTE[tensors[0].dtype], device=tensors[0].device)
    zero_point = torch.empty_like(scale, dtype=torch.int32)
    seen = [in_layout_of(out, t) for out, t in zip(outs, tensors, strict=True)]
    table = array("q")  # the records of csrc/cpu/fake_quant.h
    for x, out, c, b in zip(seen, outs, channels, bits, strict=True):
        table.extend((x.data_ptr(), out.data_ptr(), c, x.numel() // c, b))
    grid = scale.data_ptr(), zero_point.data_ptr()
    dtype = DTYPE_CODE[tensors[0].dtype]
    call("fake_quant_minmax", table.buffer_info()[0], len(tensors), *grid, symmetric, dtype)
    return scale, zero_point
