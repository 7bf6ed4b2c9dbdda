"""Timing that can be trusted: medians after warm-up, inputs past the cache, floors measured in the same run."""

import functools
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from zsq_ext.core.machine import cpu_name
from zsq_ext.ops.backend import backend, backends

# Where the device does not say: larger than the last-level cache of most CPUs.
_CPU_CACHE_BYTES = 64 << 20
# More copies of a small input would not be further from the cache, only slower to make.
_MAX_COPIES = 64


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    ms: float
    p10: float
    p90: float


def copies(make: Callable[[int], Any], call_bytes: int, device: str) -> list[Any]:
    """make(0), make(1), ...: as many inputs as it takes that none is in the cache when its turn comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else _CPU_CACHE_BYTES
    return [make(i) for i in range(min(_MAX_COPIES, 2 + 2 * cache // max(call_bytes, 1)))]


def compare(
    contenders: dict[str, Callable[..., Any]], inputs: Sequence[Any], device: str, seconds: float = 1.0
) -> dict[str, Timing]:
    """Times each contender on the inputs in turn: one call of each per round, so that all meet the same machine.

    Args:
        contenders: name -> function of one element of inputs, unpacked.
        inputs: see `copies`.
        seconds: about how long all of it may take; at least 5 rounds run, and at most 1000.
    """
    for function in contenders.values():
        for _ in range(3):
            function(*inputs[0])
    _sync(device)
    begin = time.perf_counter()
    for function in contenders.values():
        function(*inputs[0])
    _sync(device)
    rounds = int(min(1000, max(5, seconds / (time.perf_counter() - begin))))
    stop = _cuda_times if device == "cuda" else _cpu_times
    return {name: _summary(times) for name, times in stop(contenders, inputs, rounds).items()}


def _cpu_times(contenders: dict[str, Callable[..., Any]], inputs: Sequence[Any], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        args = inputs[i % len(inputs)]
        for name, function in contenders.items():
            begin = time.perf_counter()
            result = function(*args)
            times[name].append((time.perf_counter() - begin) * 1e3)
            del result  # freed outside the clock, so that every call finds the same allocator
    return times


def _cuda_times(
    contenders: dict[str, Callable[..., Any]], inputs: Sequence[Any], rounds: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        args = inputs[i % len(inputs)]
        for name, function in contenders.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function(*args)
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return times


def _summary(times: list[float]) -> Timing:
    ordered = sorted(times)
    at = lambda q: ordered[round(q * (len(ordered) - 1))]  # noqa: E731
    return Timing(at(0.5), at(0.1), at(0.9))


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy into existing memory, read and written bytes counted. Measured once per run."""
    n = (1 << 30 if device == "cuda" else 1 << 26) // 4
    source, target = torch.ones(n, device=device), torch.ones(n, device=device)
    timing = compare({"copy": target.copy_}, [(source,)], device, seconds=0.3)["copy"]
    return 2 * source.nbytes / (timing.ms / 1e3)


@functools.cache
def matmul_rate(device: str) -> float:
    """Floating-point operations per second of an fp32 matrix product of side 2048. Measured once per run."""
    n = 2048
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    timing = compare({"matmul": torch.matmul}, [(a, b)], device, seconds=0.5)["matmul"]
    return 2 * n**3 / (timing.ms / 1e3)


def limits() -> dict[str, dict[str, float]]:
    """What each device reached in this run: copying, and a matrix product in float32."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {d: {"copy_gb_s": copy_bandwidth(d) / 1e9, "matmul_gflop_s": matmul_rate(d) / 1e9} for d in devices}


def peak_mb(function: Callable[[], Any], device: str) -> float | None:
    """What a call allocates beyond what was there, at its peak; None where the device does not count."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def forced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every op in it on that backend."""

    def run(*args: Any) -> Any:
        with backend(name):
            return function(*args)

    return run


def assert_equal(name: str, got: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    """Refuses to time what is wrong.

    Args:
        name: what was computed.
        got, expected: the values; NaN equals NaN.
        tolerance: of the difference's norm relative to the expected one's; 0 asks for the same bits.

    Raises:
        RuntimeError: the values differ.
    """
    got, expected = got.nan_to_num(), expected.nan_to_num()
    same = torch.equal(got, expected)
    if not same and tolerance > 0:
        same = bool((got - expected).norm() <= tolerance * expected.norm())
    if not same:
        raise RuntimeError(f"bench: {name} differs from the reference; not timed")


def row(
    *,
    op: str,
    case: str,
    dtype: torch.dtype,
    device: str,
    backend: str,
    pass_: str,
    timing: Timing,
    bytes_: int,
    flops: int,
    peers: dict[str, Timing],
    flops_per_second: float | None = None,
    peak: float | None = None,
) -> dict[str, Any]:
    """One row of a suite. The floor is what moving the bytes, or doing the arithmetic, takes at the measured rate."""
    floor = bytes_ / copy_bandwidth(device) * 1e3
    if flops_per_second:
        floor = max(floor, flops / flops_per_second * 1e3)
    return {
        "op": op,
        "case": case,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "backend": backend,
        "pass": pass_,
        "ms": timing.ms,
        "ms_p10": timing.p10,
        "ms_p90": timing.p90,
        "bytes": bytes_,
        "flops": flops,
        "floor_ms": floor,
        "pct_of_floor": 100 * floor / timing.ms,
        "peak_mb": peak,
        "peers": {name: peer.ms for name, peer in peers.items()},
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    from zsq_ext import __version__

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "copy_gb_s": copy_bandwidth("cuda") / 1e9,
        }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "zsq_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "cpu_copy_gb_s": copy_bandwidth("cpu") / 1e9,
        "gpu": gpu,
        "backends": backends(),
    }
