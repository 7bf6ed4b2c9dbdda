"""fake_quant beside eager PyTorch, ATen's fused ops, torchao where it is installed, and a plain clone."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.ops import fake_quant, reference
from zsq_ext.ops.cases import fake_quant as cases
from zsq_ext.ops.layout import in_layout_of

# op -> pass -> bytes moved per byte of x: x in, x_hat out; then grad and x in, and the gradient out. "out" is the
# forward into memory that is there; its peers make their own.
_PASSES = {"fake_quant": {"forward": 2, "out": 2, "forward+backward": 5}, "fake_quant_lsq": {"forward+backward": 5}}
# op -> pass -> operations per element
_FLOPS = {"fake_quant": {"forward": 6, "out": 6, "forward+backward": 10}, "fake_quant_lsq": {"forward+backward": 20}}


def subjects(device: str) -> list[Subject]:
    benched: tuple[cases.FakeQuantCase, ...] = (*cases.FAKE_QUANT_BENCH, *cases.FAKE_QUANT_BENCH_LAYERS)
    if device == "cuda":
        benched += cases.FAKE_QUANT_BENCH_LARGE
    jobs = [(op, case, pass_) for op, passes in _PASSES.items() for case in benched for pass_ in passes]
    return [_subject(op, case, device, pass_) for op, case, pass_ in jobs]


def _subject(op: str, case: cases.FakeQuantCase, device: str, pass_: str) -> Subject:
    lsq = op == "fake_quant_lsq"
    public: Callable[..., Tensor] = functools.partial(fake_quant, grad="lsq") if lsq else fake_quant
    # The reference's forward is plain PyTorch, but its gradient needs the straight-through estimator written out.
    forward = pass_ != "forward+backward"
    expected = (lambda grad, *args: reference.fake_quant(*args)) if forward else reference.fake_quant_backward
    theirs = "forward" if pass_ == "out" else pass_
    n = torch.Size(case.shape).numel()
    return Subject(
        op=op,
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_=pass_,
        bytes_=_PASSES[op][pass_] * n * case.dtype.itemsize,
        flops=_FLOPS[op][pass_] * n,
        inputs=lambda: (in_layout_of((args := case.args(device))[0], case.grad(device)), *args),
        ours=_pass(public, pass_, lsq),
        expected=expected,
        peers={name: _pass(_by_rows(function), theirs, lsq) for name, function in _peers(case, lsq).items()},
        runs="fake_quant",
    )


def _pass(function: Callable[..., Tensor], pass_: str, lsq: bool) -> Callable[..., Tensor]:
    """function(x, *grid), or x's gradient (under lsq also scale's) through it, as a function of (grad, x, *grid).

    Under "out" what was grad is the memory to write to.
    """
    if pass_ == "out":
        return lambda out, x, *grid: function(x, *grid, out=out)
    if pass_ == "forward":
        return lambda grad, x, *grid: function(x, *grid)

    def both(grad: Tensor, x: Tensor, scale: Tensor, *grid: Any) -> Tensor:
        x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_(lsq)
        inputs = (x, scale) if lsq else (x,)
        return torch.autograd.grad(function(x, scale, *grid), inputs, grad)[0]

    return both


def _peers(case: cases.FakeQuantCase, lsq: bool) -> dict[str, Callable[..., Tensor]]:
    peers: dict[str, Callable[..., Tensor]] = {"eager": eager}
    if not lsq:  # clone is no quantizer: it is what writing a fresh output costs, page faults included
        peers["clone"] = lambda x, *grid: x.clone()
    if case.dtype == torch.float32:  # ATen's ops on 16-bit types give other codes
        peers["aten"] = aten_lsq if lsq else _aten
        if not lsq and (function := _torchao()) is not None:
            peers["torchao"] = function
    return peers


def _by_rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A peer that knows channels, given groups: each is a row."""

    def run(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
        if scale.dim() == 1:
            return function(x, scale, zero_point, qmin, qmax, axis)
        rows = x.reshape(scale.numel(), -1)
        return function(rows, scale.flatten(), zero_point.flatten(), qmin, qmax, 0).reshape(x.shape)

    return run


def eager(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """What people write: a chain of elementwise ops, with the straight-through gradient of detach. It is LSQ's too."""
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    v = x / scale + zero_point
    clamped = v.clamp(qmin, qmax)
    code = clamped + (clamped.round() - clamped).detach() if x.requires_grad else clamped.round()
    return (code - zero_point) * scale


@functools.cache
def _torchao() -> Callable[..., Tensor] | None:
    """What torchao trains with, where it is installed. FlagGems and others replace eager's operators one by one."""
    try:
        from torchao.quantization.quant_primitives import _fake_quantize_affine
    except ImportError:
        return None

    def run(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
        block = tuple(1 if dim == axis else size for dim, size in enumerate(x.shape))
        codes = torch.int8 if qmin < 0 else torch.uint8
        return _fake_quantize_affine(x, block, scale, zero_point, codes, qmin, qmax)

    return run


def _aten(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, qmin, qmax)


def aten_lsq(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    zero_point = zero_point.float()  # C floats beside n elements
    if axis is None:
        return torch.ops.aten._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, qmin, qmax, 1.0)
    return torch.ops.aten._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, qmin, qmax, 1.0)
