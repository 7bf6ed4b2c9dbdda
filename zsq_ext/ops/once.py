"""Gradients that can be taken once."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


class _Once(torch.autograd.Function):
    """A gradient that hangs on all it was computed from, and says so when it is differentiated itself."""

    @staticmethod
    def forward(ctx: Any, op: str, run: Callable[[], tuple[Tensor | None, ...]], *tensors: Tensor | None) -> Any:
        ctx.op = op
        return run()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(f"{ctx.op}: a gradient must be taken once, got a gradient of the gradient")


def once(op: str, run: Callable[[], Any], *tensors: Tensor | None) -> Any:
    """run(), the gradients of op. Where a graph of them is made they hang on the tensors, and refuse a gradient."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return run()
    return _Once.apply(op, run, *tensors)


def differentiable_once(op: str | None = None) -> Callable[[Backward], Backward]:
    """Marks the backward of an autograd.Function: no gradient of the gradient, and an error rather than none.

    The error names op; ctx.op where that is None, because several public functions share this one. The backward is
    given the saved tensors behind ctx, because checkpointing lets them be asked for once.

    torch's own `once_differentiable` refuses only where the gradient is asked for alone. Beside other terms, or where
    an unused input is allowed, what is missing counts as 0 there.
    """

    def marked(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            return once(ctx.op if op is None else op, lambda: backward(ctx, saved, *grads), *grads, *saved)

        return run

    return marked
