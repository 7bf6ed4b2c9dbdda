"""Class activation maps: a weighted sum over channels, and the count that its weights' closed form needs."""

import math
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import backend
from zsq_ext.ops import check as checks
from zsq_ext.ops.layout import COMPUTE, channels_last, empty_arranged
from zsq_ext.ops.once import differentiable_once


def _fake_map(activation: Tensor, alpha: Tensor, floor: float | None) -> Tensor:
    return alpha.new_empty((activation.size(0), *activation.shape[2:]))


def _fake_map_backward(activation: Tensor, *rest: Any) -> Tensor:
    return empty_arranged(activation, channels_last(activation))


_op_map = backend.define("cam_map(Tensor activation, Tensor alpha, float? floor) -> Tensor", _fake_map)
_op_map_backward = backend.define(
    "cam_map_backward(Tensor activation, Tensor alpha, Tensor maps, Tensor grad, float? floor) -> Tensor",
    _fake_map_backward,
)
_op_count = backend.define(
    "count_active(Tensor x, float? upper) -> Tensor", lambda x, upper: x.new_empty(x.shape[:2], dtype=torch.int32)
)


class _CamMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, alpha: Tensor, floor: float | None) -> Tensor:
        maps = _op_map(activation, alpha, floor)
        # Of the activation only shape and memory format are read again; whatever made it keeps it alive anyway.
        ctx.save_for_backward(activation, alpha, maps)
        ctx.floor = floor
        return maps

    @staticmethod
    @differentiable_once("cam_map")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        return _op_map_backward(*saved, grad, ctx.floor), None, None


def _check_activation(op: str, name: str, x: Tensor) -> None:
    checks.compute_dtype(op, name, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape (B, K, H, W), got {tuple(x.shape)}")


def cam_map(activation: Tensor, alpha: Tensor, *, floor: float | None = None) -> Tensor:
    """The class activation map: a sum over channels, weighted per sample, behind a ReLU.

        S = relu( sum_k max(alpha_k, floor) A_k ),     dA_k = max(alpha_k, floor) * dS where S > 0

    One read of A forward, one write of its gradient back: the product of their shape is never formed. Summed in
    float32 (float64 for float64 A), in an order that the shape alone fixes, so a backend repeats its own bits, on any
    number of threads; backends differ by rounding. NaN stays NaN, and passes the gradient. There is no second
    derivative.

    Args:
        activation: A, (B, K, H, W), any strides; float32, float16, bfloat16, or float64 (on the reference and cpu
            backends).
        alpha: weights (B, K), constants; float32, or float64 where A is.
        floor: raise the weights to at least this; None leaves them.

    Returns:
        S, (B, H, W), contiguous, in the dtype of alpha. Its gradient has A's dtype and memory format.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device or number is not as above.
        NotImplementedError: the forced backend cannot run it; or a second derivative is asked for.

    Example:
        >>> activation = torch.tensor([[[[1.0, -2.0]], [[4.0, 1.0]]]])
        >>> cam_map(activation, torch.tensor([[1.0, 0.5]]))
        tensor([[[3., 0.]]])

    Source: R. Selvaraju et al., Grad-CAM (arXiv 1610.02391); the floor is that of SynQ's released code.
    """
    _check_activation("cam_map", "activation", activation)
    dtype, of = COMPUTE[activation.dtype], f" for {activation.dtype} activation"
    checks.beside("cam_map", "alpha", alpha, dtype, activation.shape[:2], activation.device, of=of)
    if floor is not None:
        checks.number("cam_map", "floor", floor, rule="None or a number")
        if not -math.inf < floor < math.inf:
            raise ValueError(f"cam_map: floor must be None or finite, got {floor}")
    alpha, floor = alpha.detach().contiguous(), None if floor is None else float(floor)
    if activation.requires_grad and torch.is_grad_enabled():
        return _CamMap.apply(activation, alpha, floor)
    return _op_map(activation, alpha, floor)


def count_active(x: Tensor, upper: float | None = None) -> Tensor:
    """At how many positions of each channel an activation passes the gradient: what enters it is > 0, and < upper.

    Exact on every backend, in one read. NaN is not counted. It has no gradient.

    Args:
        x: what enters the activation, (B, K, H, W), any strides; float32, float16, bfloat16, or float64 (on the
            reference and cpu backends).
        upper: None for ReLU, 6 for ReLU6.

    Returns:
        (B, K) int32.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape or number is not as above.
        NotImplementedError: the forced backend cannot run it.

    Example:
        >>> count_active(torch.tensor([[[[-1.0, 0.0, 3.0, 6.0, 9.0]]]]), 6)
        tensor([[1]], dtype=torch.int32)
    """
    _check_activation("count_active", "x", x)
    if upper is not None:
        checks.number("count_active", "upper", upper, rule="None or a number")
        if not 0 < upper < math.inf:
            raise ValueError(f"count_active: upper must be None or positive and finite, got {upper}")
    return _op_count(x.detach(), None if upper is None else float(upper))
