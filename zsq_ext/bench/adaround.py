"""adaround of a block's weights, regulariser and learned steps included, beside the published chain of ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench import timing
from zsq_ext.core.progress import Progress
from zsq_ext.ops import adaround_many, backend, reference
from zsq_ext.ops.cases import adaround as cases

# pass -> bytes per element: v and base in, w_hat out; then grad, v and base in, and v's gradient out
_BYTES = {"forward": 4 + 2 + 4, "forward+backward": 10 + 4 + 4 + 2 + 4}
# pass -> operations per element, of which a power takes 40 and a sigmoid 20
_FLOPS = {"forward": 70, "forward+backward": 150}

_BETA = 10.0


def rows(progress: Progress) -> list[dict[str, Any]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    jobs = [(name, device, pass_) for device in devices for name in cases.ADAROUND_BENCH for pass_ in _BYTES]
    found = []
    with progress.stage("adaround", len(jobs)) as stage:
        for name, device, pass_ in jobs:
            found += _rows(name, device, pass_)
            stage.advance(note=name)
    return found


def _rows(name: str, device: str, pass_: str) -> list[dict[str, Any]]:
    weights = [cases.AdaRoundCase(name, shape=shape) for shape in cases.ADAROUND_BENCH[name]]

    def make(seed: int) -> tuple[list[Tensor], tuple[Any, ...]]:
        v, base, scale, zero_point, qmin, qmax, _ = zip(*(w.args(device, seed) for w in weights), strict=True)
        return [w.grads(device, seed)[0] for w in weights], (v, base, scale, zero_point, qmin[0], qmax[0])

    n = sum(torch.Size(w.shape).numel() for w in weights)
    bytes_ = _BYTES[pass_] * n
    inputs = timing.copies(make, bytes_, device)

    ours: dict[str, Callable[..., Tensor]] = {}
    for backend_name in backend.NAMES:
        interpreted = backend_name == "triton" and device == "cpu"
        reason = backend.reason_against(backend_name, "adaround", device, torch.float32)
        if backend_name != "reference" and not interpreted and reason is None:
            ours[backend_name] = timing.forced(backend_name, _pass(_fused, pass_))
    peers = {"eager": _pass(_eager, pass_)}

    expected = _expected(inputs[0], pass_)
    for backend_name, function in ours.items():
        # Another exponential than the library's.
        timing.assert_equal(f"adaround on {backend_name}, {name}, {pass_}", function(*inputs[0]), expected, 1e-5)

    times = timing.compare({**ours, **peers}, inputs, device)
    return [
        timing.row(
            op="adaround",
            case=name,
            dtype=torch.float32,
            device=device,
            backend=backend_name,
            pass_=pass_,
            timing=times[backend_name],
            bytes_=bytes_,
            flops=_FLOPS[pass_] * n,
            peers={peer: times[peer] for peer in peers},
            peak=timing.peak_mb(lambda function=function: function(*inputs[0]), device),  # type: ignore[misc]
        )
        for backend_name, function in ours.items()
    ]


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


def _expected(input_: Any, pass_: str) -> Tensor:
    grads, (v, base, scale, zero_point, qmin, qmax) = input_
    beta = torch.tensor(_BETA, device=v[0].device)
    first = v[:1], base[:1], scale[:1], zero_point[:1], [qmin], [qmax], 0, beta
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
