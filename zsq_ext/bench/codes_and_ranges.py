"""quantize, dequantize and channel_range beside eager PyTorch and ATen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq_ext.bench import timing
from zsq_ext.core.progress import Progress
from zsq_ext.ops import backend, channel_range, dequantize, quantize, reference
from zsq_ext.ops.cases import fake_quant as cases


class _Job(NamedTuple):
    """One op on the arguments (code, x, scale, zero_point, qmin, qmax, axis); peers take the same."""

    ours: Callable[..., Any]
    reference: Callable[..., Any]
    peers: dict[str, Callable[..., Any]]
    bytes: Callable[[Tensor, Tensor], int]
    flops: int


_JOBS = {
    "quantize": _Job(
        lambda code, *args: quantize(*args),
        lambda code, *args: reference.quantize(*args),
        {"eager": lambda code, *args: reference.quantize(*args)},
        lambda code, x: x.nbytes + code.nbytes,
        5,
    ),
    "dequantize": _Job(
        lambda code, x, s, z, lo, hi, axis: dequantize(code, s, z, axis, x.dtype),
        lambda code, x, s, z, lo, hi, axis: reference.dequantize(code, s, z, axis, x.dtype),
        {"eager": lambda code, x, s, z, lo, hi, axis: reference.dequantize(code, s, z, axis, x.dtype)},
        lambda code, x: x.nbytes + code.nbytes,
        3,
    ),
    "channel_range": _Job(
        lambda code, x, s, z, lo, hi, axis: channel_range(x, axis),
        lambda code, x, s, z, lo, hi, axis: reference.channel_range(x, axis),
        {"aten": lambda code, x, s, z, lo, hi, axis: _aminmax(x, axis)},
        lambda code, x: x.nbytes,
        2,
    ),
}


def _aminmax(x: Tensor, axis: int | None) -> Any:
    return torch.aminmax(x) if axis is None else torch.aminmax(x.movedim(axis, 0).flatten(1), dim=1)


def rows(progress: Progress) -> list[dict[str, Any]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    benched = [case for case in cases.FAKE_QUANT_BENCH if not case.groups]
    jobs = [(op, case, device) for device in devices for op in _JOBS for case in benched]
    found = []
    with progress.stage("codes and ranges", len(jobs)) as stage:
        for op, case, device in jobs:
            found += _rows(op, case, device)
            stage.advance(note=f"{op} {case.name}")
    return found


def _rows(op: str, case: cases.FakeQuantCase, device: str) -> list[dict[str, Any]]:
    job = _JOBS[op]

    def arguments(seed: int) -> tuple[Any, ...]:
        args = case.args(device, seed)
        return reference.quantize(*args), *args

    first = arguments(0)
    bytes_ = job.bytes(*first[:2])
    inputs = timing.copies(arguments, bytes_, device)
    ours = {}
    for name in backend.NAMES:
        interpreted = name == "triton" and device == "cpu"
        if name == "reference" or interpreted or backend.reason_against(name, op, device, case.dtype):
            continue
        ours[name] = timing.forced(name, job.ours)
        for got, want in zip(_tuple(ours[name](*first)), _tuple(job.reference(*first)), strict=True):
            timing.assert_equal(f"{op} on {name}, {case.name}", got, want)
    times = timing.compare({**ours, **job.peers}, inputs, device)
    return [
        timing.row(
            op=op,
            case=case.name,
            dtype=case.dtype,
            device=device,
            backend=name,
            pass_="forward",
            timing=times[name],
            bytes_=bytes_,
            flops=job.flops * first[1].numel(),
            peers={peer: times[peer] for peer in job.peers},
            peak=timing.peak_mb(lambda function=function: function(*first), device),  # type: ignore[misc]
        )
        for name, function in ours.items()
    ]


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
