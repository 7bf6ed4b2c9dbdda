"""fake_quant_minmax beside what a training step does without it: one weight after the other, in eager PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench import timing
from zsq_ext.core.progress import Progress
from zsq_ext.ops import backend, channel_range, fake_quant, fake_quant_minmax, reference
from zsq_ext.ops.cases import fake_quant_minmax as cases
from zsq_ext.quant.ranges import affine_params


def rows(progress: Progress) -> list[dict[str, Any]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    jobs = [(case, device) for device in devices for case in cases.FAKE_QUANT_MINMAX_BENCH]
    found = []
    with progress.stage("fake_quant_minmax", len(jobs)) as stage:
        for case, device in jobs:
            found += _rows(case, device)
            stage.advance(note=case.name)
    return found


def _rows(case: cases.MinMaxCase, device: str) -> list[dict[str, Any]]:
    tensors, bits, axes, _ = case.args(device)
    n = sum(t.numel() for t in tensors)
    bytes_ = 2 * n * tensors[0].element_size()  # in and out; the second read is a cache's
    inputs = timing.copies(
        lambda seed: (case.args(device, seed)[0], [torch.empty_like(t) for t in tensors]), bytes_, device
    )
    passes: dict[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
        "fresh": lambda tensors, outs: fake_quant_minmax(tensors, bits, axes),
        "out": lambda tensors, outs: fake_quant_minmax(tensors, bits, axes, out=outs),
    }
    peers: dict[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
        "eager": lambda tensors, outs: [_eager(t, b, axis) for t, b, axis in zip(tensors, bits, axes, strict=True)],
        "one by one": lambda tensors, outs: [_one(t, b, axis) for t, b, axis in zip(tensors, bits, axes, strict=True)],
        "clone": lambda tensors, outs: [t.clone() for t in tensors],
    }
    expected = reference.fake_quant_minmax(inputs[0][0], bits, axes, False)[0]
    found = []
    for name in backend.NAMES:
        interpreted = name == "triton" and device == "cpu"
        if name == "reference" or interpreted:
            continue
        if backend.reason_against(name, "fake_quant_minmax", device, case.dtype):
            continue
        ours = {pass_: timing.forced(name, function) for pass_, function in passes.items()}
        for pass_, function in ours.items():
            for got, want in zip(function(*inputs[0]), expected, strict=True):
                timing.assert_equal(f"fake_quant_minmax on {name}, {case.name}, {pass_}", got, want)
        times = timing.compare({**ours, **peers}, inputs, device)
        found += [
            timing.row(
                op="fake_quant_minmax",
                case=case.name,
                dtype=case.dtype,
                device=device,
                backend=name,
                pass_=pass_,
                timing=times[pass_],
                bytes_=bytes_,
                flops=8 * n,
                peers={peer: times[peer] for peer in peers},
                peak=timing.peak_mb(lambda function=function: function(*inputs[0]), device),  # type: ignore[misc]
            )
            for pass_, function in ours.items()
        ]
    return found


def _eager(t: Tensor, bits: int, axis: int) -> Tensor:
    """What people write, for one weight."""
    shape = [1] * t.dim()
    shape[axis] = -1
    rows = t.movedim(axis, 0).flatten(1)
    lo, hi = rows.amin(1), rows.amax(1)
    scale, zero_point, qmin, qmax = affine_params(lo, hi, bits, signed=True, include_zero=False)
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    return ((torch.round(t / scale) + zero_point).clamp(qmin, qmax) - zero_point) * scale


def _one(t: Tensor, bits: int, axis: int) -> Tensor:
    """What a weight quantizer does, by the ops that know one tensor."""
    grid = affine_params(*channel_range(t, axis), bits, signed=True, include_zero=False)
    return fake_quant(t, *grid, axis=axis)
