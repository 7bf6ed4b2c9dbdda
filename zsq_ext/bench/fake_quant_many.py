"""fake_quant_many under LSQ beside one weight after the other: our own op, eager PyTorch, ATen's learnable op."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench import fake_quant as one
from zsq_ext.bench.subject import Subject
from zsq_ext.ops import fake_quant, fake_quant_many, reference
from zsq_ext.ops.cases import fake_quant_many as cases
from zsq_ext.ops.fake_quant_many_spec import Grids

# pass -> bytes moved per byte of the weights: x in, x_hat out; then grad and x in, and the gradient out
_BYTES = {"forward": 2, "forward+backward": 5}
# pass -> operations per element
_FLOPS = {"forward": 6, "forward+backward": 20}

# All weights and all steps in one list each, as torch.autograd.grad wants them.
Lists = tuple[list[Any], ...]


def subjects(device: str) -> list[Subject]:
    return [_subject(case, device, pass_) for case in cases.FAKE_QUANT_MANY_BENCH for pass_ in _BYTES]


def _subject(case: cases.ManyCase, device: str, pass_: str) -> Subject:
    n = sum(torch.Size(each.shape).numel() for each in case.each)
    peers: dict[str, Callable[..., Tensor]] = {
        "one by one": functools.partial(fake_quant, grad="lsq"),
        "eager": one.eager,
        "aten": one.aten_lsq,
    }
    return Subject(
        op="fake_quant_many",
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_=pass_,
        bytes_=_BYTES[pass_] * n * case.dtype.itemsize,
        flops=_FLOPS[pass_] * n,
        inputs=lambda: (case.grads(device), case.args(device)),
        ours=_pass(fake_quant_many, pass_),
        expected=lambda grads, lists: _expected(grads, lists, pass_),
        peers={name: _pass(_each(function), pass_) for name, function in peers.items()},
    )


def _each(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    return lambda *lists: [function(*args) for args in zip(*lists, strict=True)]


def _pass(function: Callable[..., list[Tensor]], pass_: str) -> Callable[[list[Tensor], Lists], list[Tensor]]:
    """All x_hat; or the gradients of all x, through a backward that gives those of all scales too."""
    if pass_ == "forward":
        return lambda grads, lists: function(*lists)

    def both(grads: list[Tensor], lists: Lists) -> list[Tensor]:
        x, scale, *rest = lists
        x, scale = ([t.detach().requires_grad_() for t in ts] for ts in (x, scale))
        return list(torch.autograd.grad(function(x, scale, *rest), [*x, *scale], grads)[: len(x)])

    return both


def _expected(grads: list[Tensor], lists: Lists, pass_: str) -> list[Tensor]:
    if pass_ == "forward":
        return reference.fake_quant_many(lists[0], Grids(*lists[1:]))
    return [reference.fake_quant_backward(grad, *args) for grad, *args in zip(grads, *lists, strict=True)]
