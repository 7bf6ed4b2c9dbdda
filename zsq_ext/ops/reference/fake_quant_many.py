"""fake_quant and its gradients for many tensors: one after the other."""

import torch
from torch import Tensor

from zsq_ext.ops.fake_quant_many_spec import Grids, Needs
from zsq_ext.ops.reference.fake_quant import fake_quant, fake_quant_lsq_backward


def fake_quant_many(tensors: list[Tensor], grids: Grids) -> list[Tensor]:
    return [fake_quant(x, *grid) for x, grid in zip(tensors, grids.each(), strict=True)]


def fake_quant_many_out(tensors: list[Tensor], grids: Grids, outs: list[Tensor]) -> None:
    for out, found in zip(outs, fake_quant_many(tensors, grids), strict=True):
        out.copy_(found)


def fake_quant_many_backward(
    grads: list[Tensor], tensors: list[Tensor], grids: Grids, needs: Needs
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(dx, dscale, dzero_point): dx of the tensors that need it, and of those that need them all sums in a row."""
    found = [fake_quant_lsq_backward(g, x, *grid) for g, x, grid in zip(grads, tensors, grids.each(), strict=True)]
    dx = [one[0] for one, need in zip(found, needs.dx, strict=True) if need]
    sums = [one[1:] for one, need in zip(found, needs.sums, strict=True) if need]
    none = grids.scales[0].new_empty(0)
    dscale, dzero_point = (torch.cat([none, *(one[k].flatten() for one in sums)]) for k in (0, 1))
    return dx, dscale, dzero_point
