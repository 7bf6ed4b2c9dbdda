"""adaround of a block's weights, regulariser and learned steps included, beside the published chain of ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.ops import adaround_many, reference
from zsq_ext.ops.adaround_spec import Rounding
from zsq_ext.ops.cases import adaround as cases

# pass -> bytes per element: v and base in, w_hat out; then grad, v and base in, and v's gradient out
_BYTES = {"forward": 4 + 2 + 4, "forward+backward": 10 + 4 + 4 + 2 + 4}
# pass -> operations per element, of which a power takes 40 and a sigmoid 20
_FLOPS = {"forward": 70, "forward+backward": 150}

_BETA = 10.0


def subjects(device: str) -> list[Subject]:
    return [_subject(name, device, pass_) for name in cases.ADAROUND_BENCH for pass_ in _BYTES]


def _subject(name: str, device: str, pass_: str) -> Subject:
    weights = [cases.AdaRoundCase(name, shape=shape) for shape in cases.ADAROUND_BENCH[name]]

    def make() -> tuple[list[Tensor], tuple[Any, ...]]:
        v, base, scale, zero_point, qmin, qmax, _ = zip(*(w.args(device) for w in weights), strict=True)
        return [w.grads(device)[0] for w in weights], (v, base, scale, zero_point, qmin[0], qmax[0])

    n = sum(torch.Size(w.shape).numel() for w in weights)
    return Subject(
        op="adaround",
        case=name,
        dtype=torch.float32,
        device=device,
        pass_=pass_,
        bytes_=_BYTES[pass_] * n,
        flops=_FLOPS[pass_] * n,
        inputs=make,
        ours=_pass(_fused, pass_),
        expected=lambda grads, args: _expected(grads, args, pass_),
        peers={"eager": _pass(_eager, pass_)},
        tolerance=1e-5,  # another exponential than the library's
    )


def _pass(function: Callable[..., Any], pass_: str) -> Callable[..., Tensor]:
    """The first w_hat, or the gradient of the first v, all weights and steps learned."""

    def forward(grads: list[Tensor], args: tuple[Any, ...]) -> Tensor:
        return function(*args)[0][0]

    def both(grads: list[Tensor], args: tuple[Any, ...]) -> Tensor:
        v, base, scale, *rest = args
        v, scale = ([t.detach().requires_grad_() for t in ts] for ts in (v, scale))
        found, reg = function(v, base, scale, *rest)
        return torch.autograd.grad([*found, reg], [*v, *scale], [*grads, torch.ones_like(reg)])[0]

    return forward if pass_ == "forward" else both


def _fused(*args: Any) -> Any:
    return adaround_many(*args, beta=_BETA)


def _expected(grads: list[Tensor], args: tuple[Any, ...], pass_: str) -> Tensor:
    v, base, scale, zero_point, qmin, qmax = args
    beta = torch.tensor(_BETA, device=v[0].device)
    first = v[:1], Rounding(base[:1], scale[:1], zero_point[:1], [qmin], [qmax], 0), beta
    if pass_ == "forward":
        return reference.adaround(*first, False)[0][0]
    return reference.adaround_backward(grads[:1], *first, torch.ones_like(beta), False)[0][0]


def _eager(
    v: list[Tensor], base: list[Tensor], scale: list[Tensor], zero_point: list[Tensor], qmin: int, qmax: int
) -> Any:
    """What people write: a chain of elementwise ops for each weight."""
    found, reg = [], torch.zeros((), device=v[0].device)
    for v_, base_, scale_, zero_point_ in zip(v, base, scale, zero_point, strict=True):
        shape = [-1] + [1] * (v_.dim() - 1)
        scale_, zero_point_ = scale_.view(shape), zero_point_.view(shape)
        h = torch.clamp(torch.sigmoid(v_) * 1.2 - 0.1, 0, 1)
        found.append((torch.clamp(base_ + h, qmin, qmax) - zero_point_) * scale_)
        reg = reg + (1 - (2 * h - 1).abs().pow(_BETA)).sum()
    return found, reg
