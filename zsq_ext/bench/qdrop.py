"""qdrop beside torch.where over torch.rand, which saves its mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench import timing
from zsq_ext.core.progress import Progress
from zsq_ext.ops import backend, qdrop, reference
from zsq_ext.ops.cases import qdrop as cases

# pass -> tensors of x's size that move: x and x_hat in, y out; then grad in, and both gradients out
_TENSORS = {"forward": 3, "forward+backward": 6}
# pass -> operations per element: a quarter of a draw, and the comparison
_FLOPS = {"forward": 20, "forward+backward": 40}


def rows(progress: Progress) -> list[dict[str, Any]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    jobs = [(case, device, pass_) for device in devices for case in cases.QDROP_BENCH for pass_ in _TENSORS]
    found = []
    with progress.stage("qdrop", len(jobs)) as stage:
        for case, device, pass_ in jobs:
            found += _rows(case, device, pass_)
            stage.advance(note=case.name)
    return found


def _rows(case: cases.QDropCase, device: str, pass_: str) -> list[dict[str, Any]]:
    x = case.args(device)[0]
    bytes_ = _TENSORS[pass_] * x.nbytes
    inputs = timing.copies(lambda seed: (torch.randn_like(x), *case.args(device, seed)), bytes_, device)

    ours: dict[str, Callable[..., Tensor]] = {}
    for name in backend.NAMES:
        interpreted = name == "triton" and device == "cpu"
        if name == "reference" or interpreted or backend.reason_against(name, "qdrop", device, case.dtype):
            continue
        ours[name] = timing.forced(name, _pass(qdrop, pass_))
    peers = {"eager": _pass(_eager, pass_), "clone": lambda grad, x, *rest: x.clone()}

    grad, *args = inputs[0]
    threshold, key = round(case.probability * 2**24), args[3]
    if pass_ == "forward":
        expected = reference.qdrop(args[0], args[1], threshold, key)
    else:
        expected = reference.qdrop_backward(grad, threshold, key, True, False)[0]
    for name, function in ours.items():
        timing.assert_equal(f"qdrop on {name}, {case.name}, {pass_}", function(*inputs[0]), expected)

    times = timing.compare({**ours, **peers}, inputs, device)
    return [
        timing.row(
            op="qdrop",
            case=case.name,
            dtype=case.dtype,
            device=device,
            backend=name,
            pass_=pass_,
            timing=times[name],
            bytes_=bytes_,
            flops=_FLOPS[pass_] * x.numel(),
            peers={peer: times[peer] for peer in peers},
            peak=timing.peak_mb(lambda function=function: function(*inputs[0]), device),  # type: ignore[misc]
        )
        for name, function in ours.items()
    ]


def _pass(function: Callable[..., Tensor], pass_: str) -> Callable[..., Tensor]:
    """y, or the gradient of x, that of x_hat computed too."""

    def both(grad: Tensor, x: Tensor, x_hat: Tensor, *rest: Any) -> Tensor:
        leaves = x.detach().requires_grad_(), x_hat.detach().requires_grad_()
        return torch.autograd.grad(function(*leaves, *rest), leaves, grad)[0]

    return (lambda grad, *args: function(*args)) if pass_ == "forward" else both


def _eager(x: Tensor, x_hat: Tensor, probability: float, key: Tensor) -> Tensor:
    """What people write."""
    return torch.where(torch.rand_like(x) < probability, x, x_hat)
