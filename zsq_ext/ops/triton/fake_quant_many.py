"""fake_quant and its gradients for many tensors on Triton.

Addresses may change from call to call, so a table of them is made anew for each; it waits for its copy, which a CUDA
graph cannot hold: there the backend `cuda` serves, which takes the table by value.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq_ext.ops.fake_quant_many_spec import Grids, Needs
from zsq_ext.ops.layout import channels_of, dense_for, empty_for, in_layout_of
from zsq_ext.ops.triton.launch import kernels, on_device_of


def fake_quant_many(tensors: list[Tensor], grids: Grids) -> list[Tensor]:
    outs = [empty_for(x, s) for x, s in zip(tensors, grids.scales, strict=True)]
    _forward(tensors, outs, grids)
    return outs


def fake_quant_many_out(tensors: list[Tensor], grids: Grids, outs: list[Tensor]) -> None:
    places = [out if dense_for(out, s) else empty_for(out, s) for out, s in zip(outs, grids.scales, strict=True)]
    _forward(tensors, places, grids)
    for out, place in zip(outs, places, strict=True):
        if place is not out:
            out.copy_(place)


def fake_quant_many_backward(
    grads: list[Tensor], tensors: list[Tensor], grids: Grids, needs: Needs
) -> tuple[list[Tensor], Tensor, Tensor]:
    scales = grids.scales
    # Where dx is not wanted, something else says how x and its gradient lie in memory.
    dx = [
        empty_for(x, s) if need or not dense_for(x, s) else x
        for x, s, need in zip(tensors, scales, needs.dx, strict=True)
    ]
    seen, upstream = ([in_layout_of(place, t) for place, t in zip(dx, ts, strict=True)] for ts in (tensors, grads))
    dscale, dzero_point = (
        torch.zeros(sum(s.numel() for s, need in zip(scales, needs.sums, strict=True) if need), device=dx[0].device)
        for _ in range(2)
    )
    launchers, groups, at = kernels("fake_quant_many"), defaultdict(list), 0
    for k, grid in enumerate(grids.each()):
        if (n := seen[k].numel()) > 0:
            channels, inner = channels_of(seen[k], grid[0], grid[-1])
            cut = launchers.cut_of(n, channels, inner)
            addresses = upstream[k].data_ptr(), seen[k].data_ptr(), dx[k].data_ptr() if needs.dx[k] else 0
            numbers = n // channels, channels, inner, *grid[2:4], cut.steps, cut.parts
            fields = *addresses, grid[0].data_ptr(), grid[1].data_ptr(), *numbers
            groups[cut.rows, cut.cols].append(_Item(cut, channels, at if needs.sums[k] else None, fields))
        at += grid[0].numel() if needs.sums[k] else 0
    like = tensors[0], scales[0], grids.zero_points[0]
    with on_device_of(dscale):
        for items in groups.values():
            _backward(items, like, dscale, dzero_point)
    return [out for out, need in zip(dx, needs.dx, strict=True) if need], dscale, dzero_point


class _Item(NamedTuple):
    """A tensor of the backward's table."""

    cut: Any
    channels: int
    at: int | None  # where its sums begin, if they are wanted
    fields: tuple[int, ...]  # of its record, behind what depends on its neighbours


def _backward(items: list[_Item], like: tuple[Tensor, ...], dscale: Tensor, dzero_point: Tensor) -> None:
    """One launch for tensors that are cut alike, and one for their sums."""
    items = sorted(items, key=lambda item: item.at is None)
    records, program, channel, part = [], 0, 0, 0
    for cut, channels, at, fields in items:
        records.append((program, channel, part, at or 0, *fields))
        program += -(-channels // cut.cols) * cut.parts
        channel += 0 if at is None else channels
        part += channels * cut.parts
    table = torch.tensor(records, dtype=torch.int64, device=dscale.device)
    partial = torch.empty(2, part, dtype=torch.float64, device=dscale.device)
    wanted = sum(item.at is not None for item in items)
    kernels("fake_quant_many").backward(
        table,
        like,
        like[2].dtype != torch.int32,
        items[0].cut,
        (program, channel),
        wanted,
        partial,
        dscale,
        dzero_point,
    )


def _forward(tensors: list[Tensor], outs: list[Tensor], grids: Grids) -> None:
    """Fills outs, in which memory is as `empty_for` has it."""
    seen = [in_layout_of(out, x) for out, x in zip(outs, tensors, strict=True)]
    launchers, records, first = kernels("fake_quant_many"), [], 0
    for x, out, (scale, zero_point, qmin, qmax, axis) in zip(seen, outs, grids.each(), strict=True):
        if x.numel() == 0:
            continue
        addresses = x.data_ptr(), out.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
        records.append((first, *addresses, x.numel(), *channels_of(x, scale, axis), qmin, qmax))
        first += launchers.programs(x.numel())
    if records:
        table = torch.tensor(records, dtype=torch.int64, device=outs[0].device)
        like = outs[0], grids.scales[0], grids.zero_points[0]
        with on_device_of(table):
            launchers.forward(table, like, like[2].dtype != torch.int32, first)
