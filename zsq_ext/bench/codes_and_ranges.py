"""quantize, dequantize and channel_range beside eager PyTorch and ATen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.ops import channel_range, dequantize, quantize, reference
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


def subjects(device: str) -> list[Subject]:
    benched = [case for case in cases.FAKE_QUANT_BENCH if not case.groups]
    return [_subject(op, case, device) for op in _JOBS for case in benched]


def _subject(op: str, case: cases.FakeQuantCase, device: str) -> Subject:
    job = _JOBS[op]

    def arguments() -> tuple[Any, ...]:
        args = case.args(device)
        return reference.quantize(*args), *args

    first = arguments()
    return Subject(
        op=op,
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_="forward",
        bytes_=job.bytes(*first[:2]),
        flops=job.flops * first[1].numel(),
        inputs=arguments,
        ours=job.ours,
        expected=job.reference,
        peers=job.peers,
    )
