"""The suite `families`: each op of zsq_ext.ops beside eager PyTorch and ATen's fused op, where there is one."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench import bn_act, heads, timing
from zsq_ext.core.progress import Progress
from zsq_ext.ops import backend, fake_quant, reference
from zsq_ext.ops.cases import fake_quant as cases


def rows(progress: Progress) -> list[dict[str, Any]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    jobs = [
        (op, case, device, p)
        for device in devices
        for op, passes in _PASSES.items()
        for case in cases.FAKE_QUANT_BENCH
        for p in passes
    ]
    found = []
    with progress.stage("fake_quant", len(jobs)) as stage:
        for op, case, device, pass_ in jobs:
            found += _fake_quant_rows(op, case, device, pass_)
            stage.advance(note=case.name)
    return found + bn_act.rows(progress) + heads.rows(progress)


# op -> pass -> bytes moved per byte of x: x in, x_hat out; then grad and x in, and the gradient out
_PASSES = {"fake_quant": {"forward": 2, "forward+backward": 5}, "fake_quant_lsq": {"forward+backward": 5}}
# op -> pass -> operations per element
_FLOPS = {"fake_quant": {"forward": 6, "forward+backward": 10}, "fake_quant_lsq": {"forward+backward": 20}}


def _fake_quant_rows(op: str, case: cases.FakeQuantCase, device: str, pass_: str) -> list[dict[str, Any]]:
    x = case.args(device)[0]
    bytes_ = _PASSES[op][pass_] * x.nbytes
    inputs = timing.copies(lambda seed: (case.grad(device), *case.args(device, seed)), bytes_, device)
    lsq = op == "fake_quant_lsq"
    public: Callable[..., Tensor] = functools.partial(fake_quant, grad="lsq") if lsq else fake_quant

    ours: dict[str, Callable[..., Tensor]] = {}
    for name in backend.NAMES:
        interpreted = name == "triton" and device == "cpu"
        if name == "reference" or interpreted or backend.reason_against(name, "fake_quant", device, case.dtype):
            continue
        ours[name] = timing.forced(name, _pass(public, pass_, lsq))
    peers = {name: _pass(function, pass_, lsq) for name, function in _peers(case, lsq).items()}

    # The reference's forward is plain PyTorch, but its gradient needs the straight-through estimator written out.
    expected = reference.fake_quant(*inputs[0][1:])
    if pass_ != "forward":
        expected = reference.fake_quant_backward(*inputs[0])
    for name, function in ours.items():
        timing.assert_equal(f"{op} on {name}, {case.name}, {pass_}", function(*inputs[0]), expected)

    times = timing.compare({**ours, **peers}, inputs, device)
    return [
        timing.row(
            op=op,
            case=case.name,
            dtype=case.dtype,
            device=device,
            backend=name,
            pass_=pass_,
            timing=times[name],
            bytes_=bytes_,
            flops=_FLOPS[op][pass_] * x.numel(),
            peers={peer: times[peer] for peer in peers},
            peak=timing.peak_mb(lambda function=function: function(*inputs[0]), device),  # type: ignore[misc]
        )
        for name, function in ours.items()
    ]


def _pass(function: Callable[..., Tensor], pass_: str, lsq: bool) -> Callable[..., Tensor]:
    """function(x, *grid), or x's gradient (under lsq also scale's) through it, as a function of (grad, x, *grid)."""
    if pass_ == "forward":
        return lambda grad, x, *grid: function(x, *grid)

    def both(grad: Tensor, x: Tensor, scale: Tensor, *grid: Any) -> Tensor:
        x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_(lsq)
        inputs = (x, scale) if lsq else (x,)
        return torch.autograd.grad(function(x, scale, *grid), inputs, grad)[0]

    return both


def _peers(case: cases.FakeQuantCase, lsq: bool) -> dict[str, Callable[..., Tensor]]:
    peers: dict[str, Callable[..., Tensor]] = {"eager": _eager}
    if not lsq:  # clone is no quantizer: it is what writing a fresh output costs, page faults included
        peers["clone"] = lambda x, *grid: x.clone()
    if case.dtype == torch.float32:  # ATen's ops on 16-bit types give other codes
        peers["aten"] = _aten_lsq if lsq else _aten
    return peers


def _eager(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """What people write: a chain of elementwise ops, with the straight-through gradient of detach. It is LSQ's too."""
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


def _aten_lsq(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    zero_point = zero_point.float()  # C floats beside n elements
    if axis is None:
        return torch.ops.aten._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, qmin, qmax, 1.0)
    return torch.ops.aten._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, qmin, qmax, 1.0)
