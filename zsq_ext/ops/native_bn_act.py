"""How `cpu` and `cuda` call the native module's bn_act with tensors. channel_sums is bn_act without y."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.layout import ACT_CODE, DTYPE_CODE, arranged, channels_last, empty_arranged, places_of, rows_of

# What stands for the arguments of bn_act, behind mean, where only the sums are asked for: var to act; and of its
# backward, behind mean: var to need_affine.
NO_Y = (None, None, None, 0.0, None, "none")
ONLY_SUMS = (*NO_Y[:5], None, "none", True, False, False)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(
    call: Callable[..., Any],
    last: tuple[Any, ...],
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
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Any]:
    """The op's results, y empty where var is None, and what the call said.

    `last` are the arguments only one backend has: threads; or memory for partial sums, and the stream.
    """
    fastest = channels_last(u)
    y = u.new_empty(0) if var is None else empty_arranged(u, fastest)
    shape = {"batch": u.shape[1:2], "sample": u.shape[:2], None: (0,)}[stats]
    s1, s2 = mean.new_empty(shape), mean.new_empty(shape)
    rows, length = rows_of(u)
    mask = u.new_empty((rows, (length + 7) // 8) if save_mask else 0, dtype=torch.uint8)
    seen = arranged(u, fastest)
    residual = None if residual is None else arranged(residual, fastest)
    answer = call(
        *(_address(t) for t in (seen, residual, None if var is None else y, mask if save_mask else None)),
        *(_address(t) for t in (mean, var, gamma, beta)),
        *(_address(t if stats else None) for t in (s1, s2)),
        eps,
        *places_of(u),
        stats == "sample",
        ACT_CODE[act],
        DTYPE_CODE[u.dtype],
        *last,
    )
    return (y, s1, s2, mask), answer


def backward(
    call: Callable[..., Any],
    last: tuple[Any, ...],
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
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Any]:
    """The gradients, those of u, residual, gamma and beta, and what the call said. `last` as in `forward`."""
    fastest, has_y = channels_last(u), grad_y is not None
    du = empty_arranged(u, fastest) if need_u else u.new_empty(0)
    dr = empty_arranged(u, fastest) if need_residual and has_y else u.new_empty(0)
    affine = need_affine and has_y
    dgamma, dbeta = (mean.new_empty(mean.shape if affine else 0) for _ in range(2))
    seen = arranged(u, fastest)
    grad_y = None if grad_y is None else arranged(grad_y, fastest)
    residual = None if residual is None else arranged(residual, fastest)
    answer = call(
        *(_address(t) for t in (seen, grad_y, residual, mask, mean, var, gamma, beta, grad_s1, grad_s2)),
        du.data_ptr() if need_u else 0,
        dr.data_ptr() if need_residual and has_y else 0,
        dgamma.data_ptr() if affine else 0,
        dbeta.data_ptr() if affine else 0,
        eps,
        *places_of(u),
        grad_s1 is not None and grad_s1.dim() == 2,
        ACT_CODE[act],
        DTYPE_CODE[u.dtype],
        *last,
    )
    return (du, dr, dgamma, dbeta), answer
