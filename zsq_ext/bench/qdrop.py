"""qdrop beside torch.where over torch.rand, which saves its mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.ops import qdrop, reference
from zsq_ext.ops.cases import qdrop as cases

# pass -> tensors of x's size that move: x and x_hat in, y out; then grad in, and both gradients out
_TENSORS = {"forward": 3, "forward+backward": 6}
# pass -> operations per element: a quarter of a draw, and the comparison
_FLOPS = {"forward": 20, "forward+backward": 40}


def subjects(device: str) -> list[Subject]:
    return [_subject(case, device, pass_) for case in cases.QDROP_BENCH for pass_ in _TENSORS]


def _subject(case: cases.QDropCase, device: str, pass_: str) -> Subject:
    threshold = round(case.probability * 2**24)

    def make() -> tuple[Any, ...]:
        x, *rest = case.args(device)
        return torch.randn_like(x), x, *rest

    def expected(grad: Tensor, x: Tensor, x_hat: Tensor, probability: float, key: Tensor) -> Tensor:
        if pass_ == "forward":
            return reference.qdrop(x, x_hat, threshold, key)
        return reference.qdrop_backward(grad, threshold, key, True, False)[0]

    n = torch.Size(case.shape).numel()
    return Subject(
        op="qdrop",
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_=pass_,
        bytes_=_TENSORS[pass_] * n * case.dtype.itemsize,
        flops=_FLOPS[pass_] * n,
        inputs=make,
        ours=_pass(qdrop, pass_),
        expected=expected,
        peers={"eager": _pass(_eager, pass_), "clone": lambda grad, x, *rest: x.clone()},
    )


def _pass(function: Callable[..., Tensor], pass_: str) -> Callable[..., Tensor]:
    """y, or the gradient of x, that of x_hat computed too."""

    def both(grad: Tensor, x: Tensor, x_hat: Tensor, *rest: Any) -> Tensor:
        leaves = x.detach().requires_grad_(), x_hat.detach().requires_grad_()
        return torch.autograd.grad(function(*leaves, *rest), leaves, grad)[0]

    return (lambda grad, *args: function(*args)) if pass_ == "forward" else both


def _eager(x: Tensor, x_hat: Tensor, probability: float, key: Tensor) -> Tensor:
    """What people write."""
    return torch.where(torch.rand_like(x) < probability, x, x_hat)
