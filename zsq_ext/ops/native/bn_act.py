"""How `cpu` and `cuda` call the native module's bn_act. channel_sums is bn_act without y."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.bn_act_spec import Found, Grads, Layer, Needs, Norm, Outputs
from zsq_ext.ops.layout import ACT_CODE, DTYPE_CODE, arranged, channels_last, empty_arranged, places_of, rows_of
from zsq_ext.ops.native.call import Call, address


def _fields(u: Tensor, layer: Layer, per_sample: bool) -> tuple[Any, ...]:
    """What the structs of both directions end with: norm, quantizer, shape, and codes."""
    norm, act, quant = layer
    grid: tuple[Any, ...] = 0, 0, 0, 0, 0, False
    if quant is not None:
        scale, zero_point, *rest = quant
        grid = scale.data_ptr(), zero_point.data_ptr(), int(scale.numel() > 1), *rest
    return (
        (*(address(t) for t in norm[:4]), norm.eps),
        grid,
        (*places_of(u), per_sample),
        ACT_CODE[act],
        DTYPE_CODE[u.dtype],
    )


def bn_act(call: Call, u: Tensor, residual: Tensor | None, layer: Layer, wanted: Outputs) -> Found:
    """y is empty where there is no var."""
    last, mean, stats = channels_last(u), layer.norm.mean, wanted.stats
    y = None if layer.norm.var is None else empty_arranged(u, last)
    shape = {"batch": u.shape[1:2], "sample": u.shape[:2], None: (0,)}[stats]
    s1, s2 = mean.new_empty(shape), mean.new_empty(shape)
    rows, length = rows_of(u)
    mask = u.new_empty((rows, (length + 7) // 8) if wanted.mask else 0, dtype=torch.uint8)
    ends = mean.new_empty((2, u.size(1)) if wanted.extremes else 0)
    seen = arranged(u, last)
    residual = None if residual is None else arranged(residual, last)
    call.with_workspace(
        "bn_act",
        *(address(t) for t in (seen, residual, y, mask if wanted.mask else None)),
        *(address(t if stats else None) for t in (s1, s2)),
        address(ends if wanted.extremes else None),
        *_fields(u, layer, stats == "sample"),
    )
    return u.new_empty(0) if y is None else y, s1, s2, mask, ends


def bn_act_backward(
    call: Call, u: Tensor, residual: Tensor | None, mask: Tensor | None, grads: Grads, layer: Layer, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last, mean, has_y = channels_last(u), layer.norm.mean, grads.y is not None
    du = empty_arranged(u, last) if needs.u else None
    dr = empty_arranged(u, last) if needs.residual and has_y else None
    dgamma, dbeta = (torch.empty_like(mean) if needs.affine and has_y else None for _ in range(2))
    seen, grad_y, residual = (None if t is None else arranged(t, last) for t in (u, grads.y, residual))
    call.with_workspace(
        "bn_act_backward",
        *(address(t) for t in (seen, residual, mask, grad_y, grads.s1, grads.s2, du, dr, dgamma, dbeta)),
        *_fields(u, layer, grads.s1 is not None and grads.s1.dim() == 2),
    )
    none, nothing = u.new_empty(0), mean.new_empty(0)
    return (
        *(none if t is None else t for t in (du, dr)),  # type: ignore[return-value]
        *(nothing if t is None else t for t in (dgamma, dbeta)),
    )


def channel_sums(call: Call, u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    return bn_act(call, u, None, Layer(Norm(mean)), Outputs(stats))[1:3]


def channel_sums_backward(call: Call, u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
    return bn_act_backward(call, u, None, None, Grads(None, grad_s1, grad_s2), Layer(Norm(mean)), Needs())[0]
