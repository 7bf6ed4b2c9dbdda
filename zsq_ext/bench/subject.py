"""One thing to time, and how it becomes rows: on every backend that runs it here, beside its peers, checked first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench import timing
from zsq_ext.ops import backend


@dataclass(frozen=True)
class Subject:
    """An op in one case and one pass on one device.

    Args:
        op, case, dtype, device, pass_: what the row says.
        bytes_, flops: what has to move and to be computed, the floor's measure.
        inputs: makes the arguments of every function here.
        ours: the public op; run once on every backend.
        expected: what it must give, a tensor or several.
        peers: what others do, by name. "eager" is also what ``--inductor`` compiles.
        tolerance: of ``ours`` against ``expected``, see ``timing.assert_equal``.
        runs: the registered op that a backend must have; None for what torch runs itself, one row of backend "torch".
        products: the operations are a matrix product's, so its rate bounds them too.
    """

    op: str
    case: str
    dtype: torch.dtype
    device: str
    pass_: str
    bytes_: int
    flops: int
    inputs: Callable[[], tuple[Any, ...]]
    ours: Callable[..., Any]
    expected: Callable[..., Any]
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    tolerance: float = 0.0
    runs: str | None = ""
    products: bool = False


def measured(subject: Subject, inductor: bool = False, seconds: float = timing.SECONDS) -> list[dict[str, Any]]:
    """One row for every backend that runs it here but the reference.

    Raises:
        RuntimeError: a backend gives something else than expected.
    """
    inputs = timing.copies(subject.inputs(), subject.bytes_, subject.device)
    peers = dict(subject.peers)
    if inductor and "eager" in peers:
        peers["inductor"] = torch.compile(peers["eager"], dynamic=False)
    ours: dict[str, Callable[..., Any]] = {} if subject.runs is not None else {"torch": subject.ours}
    for name in backend.NAMES if subject.runs is not None else ():
        interpreted = name == "triton" and subject.device == "cpu"
        reason = backend.reason_against(name, subject.runs or subject.op, subject.device, subject.dtype)
        if name != "reference" and not interpreted and reason is None:
            ours[name] = timing.Forced(name, subject.ours)
    expected = subject.expected(*inputs[0])
    for name, function in ours.items():
        what = f"{subject.op} on {name}, {subject.case}, {subject.pass_}"
        for got, want in zip(_several(function(*inputs[0])), _several(expected), strict=True):
            timing.assert_equal(what, got, want, subject.tolerance)
    times = timing.compare({**ours, **peers}, inputs, subject.device, seconds)
    return [
        timing.row(
            op=subject.op,
            case=subject.case,
            dtype=subject.dtype,
            device=subject.device,
            backend=name,
            pass_=subject.pass_,
            timing=times[name],
            bytes_=subject.bytes_,
            flops=subject.flops,
            flops_per_second=timing.matmul_rate(subject.device) if subject.products else None,
            peers={peer: times[peer] for peer in peers},
            peak=timing.peak_mb(lambda function=function: function(*inputs[0]), "cuda")  # type: ignore[misc]
            if subject.device == "cuda"
            else None,  # what an op allocates is its results
        )
        for name, function in ours.items()
    ]


def _several(found: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else found
