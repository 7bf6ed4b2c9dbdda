"""QDrop: each element quantized or not, by a draw that the backward repeats."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import backend
from zsq_ext.ops import check as checks
from zsq_ext.ops.layout import channels_last, empty_arranged
from zsq_ext.ops.once import differentiable_once

# How finely a draw divides 1.
_STEPS = 2**24


def _fake(x: Tensor, x_hat: Tensor, threshold: int, key: Tensor) -> Tensor:
    return empty_arranged(x, channels_last(x))


def _fake_backward(grad: Tensor, threshold: int, key: Tensor, need_x: bool, need_x_hat: bool) -> tuple[Tensor, Tensor]:
    last = channels_last(grad)
    dx, dx_hat = (empty_arranged(grad, last) if need else grad.new_empty(0) for need in (need_x, need_x_hat))
    return dx, dx_hat


_op = backend.define("qdrop(Tensor x, Tensor x_hat, int threshold, Tensor key) -> Tensor", _fake)
_op_backward = backend.define(
    "qdrop_backward(Tensor grad, int threshold, Tensor key, bool need_x, bool need_x_hat) -> (Tensor, Tensor)",
    _fake_backward,
)


class _QDrop(torch.autograd.Function):
    """Saves the key alone. Stays an op under a compiler too: ten rounds of Philox are no pointwise graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor, threshold: int, key: Tensor) -> Tensor:
        ctx.save_for_backward(key)
        ctx.threshold = threshold
        return _op(x, x_hat, threshold, key)

    @staticmethod
    @differentiable_once("qdrop")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_x_hat, *_ = ctx.needs_input_grad
        dx, dx_hat = _op_backward(grad, ctx.threshold, *saved, need_x, need_x_hat)
        return dx if need_x else None, dx_hat if need_x_hat else None, None, None


def qdrop(x: Tensor, x_hat: Tensor, probability: float, key: Tensor) -> Tensor:
    """Each element of x with a probability, else that of x_hat.

        keep[i] = draw[i] < probability,     y = keep ? x : x_hat

    draw[i] are 24 bits of Philox-4x32-10: word i % 4 of counter i // 4, where i counts the elements in the order of
    x's shape, whatever its strides. So the draws are the same on every backend and in every layout, and the backward
    repeats them instead of saving a mask: dx = keep ? grad : 0, dx_hat = keep ? 0 : grad. Values are copied, not
    computed with. There is no second derivative.

    Args:
        x: any shape and strides; float32, float16, bfloat16, or float64 (on the reference and cpu backends).
        x_hat: x quantized, say; shape, dtype and device of x.
        probability: of keeping x, in [0, 1], to the nearest multiple of 2^-24.
        key: (key, offset), int64 of shape (2,), on x's device: the generator's key, one for each place where qdrop
            stands, and the upper half of its counter. To draw afresh add 1 to the offset, after the backward: on the
            device, so that a CUDA graph draws afresh when it is replayed. Changed before the backward, it is refused
            there.

    Returns:
        A tensor of x's shape and dtype; channels last in memory where x is, else contiguous.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device or range is not as above.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> key = torch.tensor([42, 0])
        >>> qdrop(torch.ones(8), torch.zeros(8), 0.5, key)
        tensor([0., 1., 1., 1., 0., 1., 0., 1.])
        >>> key[1] += 1
        >>> qdrop(torch.ones(8), torch.zeros(8), 0.5, key)
        tensor([1., 1., 1., 0., 1., 0., 1., 1.])

    Source: X. Wei et al., QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization
    (arXiv 2203.05740); the generator is J. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    checks.compute_dtype("qdrop", "x", x)
    checks.beside("qdrop", "x_hat", x_hat, x.dtype, x.shape, x.device, of=" as x is", called="x's shape")
    checks.beside("qdrop", "key", key, torch.int64, (2,), x.device)
    checks.number("qdrop", "probability", probability)
    if not 0 <= probability <= 1:
        raise ValueError(f"qdrop: probability must be in [0, 1], got {probability}")
    threshold = round(probability * _STEPS)
    key = key.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or x_hat.requires_grad):
        return _QDrop.apply(x, x_hat, threshold, key)
    return _op(x, x_hat, threshold, key)
