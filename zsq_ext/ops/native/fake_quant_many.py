"""How `cpu` and `cuda` call the native module's fake_quant for many tensors, and its gradients."""

import torch
from torch import Tensor

from zsq_ext.ops.fake_quant_many_spec import Grids, Needs
from zsq_ext.ops.layout import DTYPE_CODE, dense_for, empty_for, in_layout_of
from zsq_ext.ops.native.call import Call
from zsq_ext.ops.native.fake_quant import fields


def fake_quant_many(call: Call, tensors: list[Tensor], grids: Grids) -> list[Tensor]:
    outs = [empty_for(x, s) for x, s in zip(tensors, grids.scales, strict=True)]
    _forward(call, tensors, outs, grids)
    return outs


def fake_quant_many_out(call: Call, tensors: list[Tensor], grids: Grids, outs: list[Tensor]) -> None:
    places = [out if dense_for(out, s) else empty_for(out, s) for out, s in zip(outs, grids.scales, strict=True)]
    _forward(call, tensors, places, grids)
    for out, place in zip(outs, places, strict=True):
        if place is not out:
            out.copy_(place)


def fake_quant_many_backward(
    call: Call, grads: list[Tensor], tensors: list[Tensor], grids: Grids, needs: Needs
) -> tuple[list[Tensor], Tensor, Tensor]:
    scales = grids.scales
    # Where dx is not wanted, something else says how x and its gradient lie in memory.
    dx = [
        empty_for(x, s) if need or not dense_for(x, s) else x
        for x, s, need in zip(tensors, scales, needs.dx, strict=True)
    ]
    seen, upstream = _seen(tensors, dx), _seen(grads, dx)
    lengths = [s.numel() if need else 0 for s, need in zip(scales, needs.sums, strict=True)]
    # Nothing runs for a tensor without elements.
    make = torch.zeros if any(x.numel() == 0 for x in tensors) else torch.empty
    dscale, dzero_point = (make(sum(lengths), dtype=scales[0].dtype, device=scales[0].device) for _ in range(2))
    sums, size, first = (dscale.data_ptr(), dzero_point.data_ptr()), dscale.element_size(), 0
    records = []
    for g, x, out, grid, need, length in zip(upstream, seen, dx, grids.each(), needs.dx, lengths, strict=True):
        at = [p + first * size if length else 0 for p in sums]
        records.append((fields(g, x, out if need else None, grid), *at))
        first += length
    call.with_workspace("fake_quant_many", tuple(records), True, DTYPE_CODE[tensors[0].dtype])
    return [out for out, need in zip(dx, needs.dx, strict=True) if need], dscale, dzero_point


def _seen(tensors: list[Tensor], places: list[Tensor]) -> list[Tensor]:
    return [in_layout_of(place, t) for place, t in zip(places, tensors, strict=True)]


def _forward(call: Call, tensors: list[Tensor], outs: list[Tensor], grids: Grids) -> None:
    """Fills outs, in which memory is as `empty_for` has it."""
    seen = _seen(tensors, outs)  # by this name: a copy must live until the call is over
    records = tuple((fields(None, x, out, grid), 0, 0) for x, out, grid in zip(seen, outs, grids.each(), strict=True))
    call.with_workspace("fake_quant_many", records, False, DTYPE_CODE[tensors[0].dtype])
