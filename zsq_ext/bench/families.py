"""The suite `families`: each op of zsq_ext.ops beside eager PyTorch and ATen's fused op, where there is one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench import bn_act, timing
from zsq_ext.core.progress import Progress
from zsq_ext.ops import backend, cases, fake_quant, reference


def rows(progress: Progress) -> list[dict[str, Any]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    jobs = [(case, device, p) for device in devices for case in cases.FAKE_QUANT_BENCH for p in _PASSES]
    found = []
    with progress.stage("fake_quant", len(jobs)) as stage:
        for case, device, pass_ in jobs:
            found += _fake_quant_rows(case, device, pass_)
            stage.advance(note=case.name)
    return found + bn_act.rows(progress)


# pass -> bytes moved per byte of x: x in, x_hat out; then grad and x in, and the gradient out
_PASSES = {"forward": 2, "forward+backward": 5}


def _fake_quant_rows(case: cases.FakeQuantCase, device: str, pass_: str) -> list[dict[str, Any]]:
    x = case.args(device)[0]
    bytes_ = _PASSES[pass_] * x.nbytes
    inputs = timing.copies(lambda seed: (case.grad(device), *case.args(device, seed)), bytes_, device)

    ours: dict[str, Callable[..., Tensor]] = {}
    for name in backend.NAMES:
        interpreted = name == "triton" and device == "cpu"
        if name == "reference" or interpreted or backend.reason_against(name, "fake_quant", device, case.dtype):
            continue
        ours[name] = _forced(name, _pass(fake_quant, pass_))
    peers = {name: _pass(function, pass_) for name, function in _peers(case).items()}

    # The reference's forward is plain PyTorch, but its gradient needs the straight-through estimator written out.
    expected = reference.fake_quant(*inputs[0][1:])
    if pass_ != "forward":
        expected = reference.fake_quant_backward(*inputs[0])
    for name, function in ours.items():
        timing.assert_equal(f"fake_quant on {name}, {case.name}, {pass_}", function(*inputs[0]), expected)

    times = timing.compare({**ours, **peers}, inputs, device)
    return [
        timing.row(
            op="fake_quant",
            case=case.name,
            dtype=case.dtype,
            device=device,
            backend=name,
            pass_=pass_,
            timing=times[name],
            bytes_=bytes_,
            flops=6 * x.numel() + (4 * x.numel() if pass_ != "forward" else 0),
            peers={peer: times[peer] for peer in peers},
            peak=timing.peak_mb(lambda function=function: function(*inputs[0]), device),  # type: ignore[misc]
        )
        for name, function in ours.items()
    ]


def _pass(function: Callable[..., Tensor], pass_: str) -> Callable[..., Tensor]:
    """function(x, *grid), or the gradient of x through it, as a function of (grad, x, *grid)."""
    if pass_ == "forward":
        return lambda grad, x, *grid: function(x, *grid)

    def both(grad: Tensor, x: Tensor, *grid: Any) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x, *grid), x, grad)[0]

    return both


def _forced(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        with backend.backend(name):
            return function(*args)

    return run


def _peers(case: cases.FakeQuantCase) -> dict[str, Callable[..., Tensor]]:
    # clone is no quantizer: it is what writing a fresh output costs, page faults included
    peers: dict[str, Callable[..., Tensor]] = {"eager": _eager, "clone": lambda x, *grid: x.clone()}
    if case.dtype == torch.float32:  # ATen's ops on 16-bit types give other codes
        peers["aten"] = _aten
    return peers


def _eager(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """What people write: a chain of elementwise ops, with the straight-through gradient of detach."""
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    v = x / scale + zero_point
    clamped = v.clamp(qmin, qmax)
    code = clamped + (clamped.round() - clamped).detach() if x.requires_grad else clamped.round()
    return (code - zero_point) * scale


def _aten(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, qmin, qmax)
