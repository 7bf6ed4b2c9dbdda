"""How `cpu` and `cuda` call the native module's bn_act. channel_sums is bn_act without y."""

import torch
from torch import Tensor

from zsq_ext.ops.layout import ACT_CODE, DTYPE_CODE, arranged, channels_last, empty_arranged, places_of, rows_of
from zsq_ext.ops.native.call import Call, address


def bn_act(
    call: Call,
    u: Tensor,
    mean: Tensor,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: str,
    stats: str | None,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y is empty where var is None."""
    last = channels_last(u)
    y = None if var is None else empty_arranged(u, last)
    shape = {"batch": u.shape[1:2], "sample": u.shape[:2], None: (0,)}[stats]
    s1, s2 = mean.new_empty(shape), mean.new_empty(shape)
    rows, length = rows_of(u)
    mask = u.new_empty((rows, (length + 7) // 8) if save_mask else 0, dtype=torch.uint8)
    seen = arranged(u, last)
    residual = None if residual is None else arranged(residual, last)
    call.with_workspace(
        "bn_act",
        *(address(t) for t in (seen, residual, y, mask if save_mask else None)),
        *(address(t) for t in (mean, var, gamma, beta)),
        *(address(t if stats else None) for t in (s1, s2)),
        eps,
        (*places_of(u), stats == "sample"),
        ACT_CODE[act],
        DTYPE_CODE[u.dtype],
    )
    return u.new_empty(0) if y is None else y, s1, s2, mask


def bn_act_backward(
    call: Call,
    u: Tensor,
    grad_y: Tensor | None,
    grad_s1: Tensor | None,
    grad_s2: Tensor | None,
    mean: Tensor,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None,
    mask: Tensor | None,
    act: str,
    need_u: bool,
    need_residual: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last, has_y = channels_last(u), grad_y is not None
    du = empty_arranged(u, last) if need_u else u.new_empty(0)
    dr = empty_arranged(u, last) if need_residual and has_y else u.new_empty(0)
    affine = need_affine and has_y
    dgamma, dbeta = (mean.new_empty(mean.shape if affine else 0) for _ in range(2))
    seen = arranged(u, last)
    grad_y = None if grad_y is None else arranged(grad_y, last)
    residual = None if residual is None else arranged(residual, last)
    call.with_workspace(
        "bn_act_backward",
        *(address(t) for t in (seen, grad_y, residual, mask, mean, var, gamma, beta, grad_s1, grad_s2)),
        du.data_ptr() if need_u else 0,
        dr.data_ptr() if need_residual and has_y else 0,
        dgamma.data_ptr() if affine else 0,
        dbeta.data_ptr() if affine else 0,
        eps,
        (*places_of(u), grad_s1 is not None and grad_s1.dim() == 2),
        ACT_CODE[act],
        DTYPE_CODE[u.dtype],
    )
    return du, dr, dgamma, dbeta


def channel_sums(call: Call, u: Tensor, mean: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    return bn_act(call, u, mean, None, None, None, 0.0, None, "none", stats, False)[1:3]


def channel_sums_backward(call: Call, u: Tensor, mean: Tensor, grad_s1: Tensor, grad_s2: Tensor) -> Tensor:
    sums = grad_s1, grad_s2
    return bn_act_backward(call, u, None, *sums, mean, None, None, None, 0.0, None, None, "none", True, False, False)[0]
