"""Timing that can be trusted: medians after warm-up, inputs past the cache, floors measured in the same run."""

import contextlib
import functools
import itertools
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from zsq_ext.core.machine import cpu_name
from zsq_ext.ops.backend import backend, backends

# A copy's bandwidth is measured with as many bytes as a row moves, in powers of two between these: what fits into a
# shared last cache is moved faster than what does not.
_SMALLEST_COPY, _LARGEST_COPY = 1 << 22, {"cpu": 1 << 28, "cuda": 1 << 31}
_UNKNOWN_CACHE = 16 << 20
# More copies of a small input would not be further from the cache, only slower to make.
_MAX_COPIES = 64
# Counted calls of a turn, which ends early where they are slow: after this long, or sooner where all have little time.
# A call as slow as that is counted even as the first.
_CALLS, _TURN_MS, _SHORTEST_TURN_MS = 6, 50.0, 10.0
# A round as long as that is not repeated for a second look.
_LONG_ROUND = 0.5
# How long a subject is timed, its peers included.
SECONDS = 0.1


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    ms: float
    p10: float
    p90: float


def cache_bytes(device: str) -> int:
    """The second-level cache: of all cores together, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()  # such as 2048K
        return int(size.strip().removesuffix("K")) * 1024 * (os.cpu_count() or 1)
    except (OSError, ValueError):
        return _UNKNOWN_CACHE


def copies(args: Any, call_bytes: int, device: str) -> list[Any]:
    """As many copies of the tensors in args as it takes that none is in that cache when its turn comes again."""
    cache = cache_bytes(device)
    again = lambda: tree_map_only(Tensor, torch.clone, args)  # noqa: E731
    return [args, *(again() for _ in range(min(_MAX_COPIES - 1, 1 + 2 * cache // max(call_bytes, 1))))]


def compare(
    contenders: dict[str, Callable[..., Any]], inputs: Sequence[Any], device: str, seconds: float = SECONDS
) -> dict[str, Timing]:
    """Times the contenders on the inputs, taking turns, so that all meet the same machine.

    A turn is a few calls one after the other, as a program makes them; the first is not counted, because it finds the
    allocator and the threads as another contender left them. Every call takes the next input and every round has an
    order of its own, so that none is served from a cache that a peer has filled, or always follows the same one.

    Args:
        contenders: name -> function of one element of inputs, unpacked.
        inputs: see `copies`.
        seconds: about how long all of it may take; at least 2 rounds run where they are not long, and at most 500.
    """
    turn_ms = min(_TURN_MS, max(_SHORTEST_TURN_MS, 500 * seconds / len(contenders)))
    clock = _cuda_ms if device == "cuda" else _cpu_ms
    taken = itertools.cycle(inputs)

    def turn(function: Callable[..., Any]) -> list[float]:
        inner, on = (function.function, function.on) if isinstance(function, Forced) else (function, None)
        with contextlib.nullcontext() if on is None else backend(on):
            found = [clock(inner, next(taken))]
            while len(found) <= _CALLS and sum(found) < turn_ms:
                found.append(clock(inner, next(taken)))
            return found[1:] or found

    for function in contenders.values():  # compiled and loaded before any clock runs
        function(*inputs[0])
    begin = time.perf_counter()
    times = {name: turn(function) for name, function in contenders.items()}
    round_ = time.perf_counter() - begin
    rounds = int(min(500, max(2 if round_ < _LONG_ROUND else 1, seconds / round_)))
    names = list(contenders)
    order = random.Random(0)
    for _ in range(1, rounds):
        for name in order.sample(names, len(names)):
            times[name] += turn(contenders[name])
    return {name: _summary(found) for name, found in times.items()}


def _cpu_ms(function: Callable[..., Any], args: Any) -> float:
    begin = time.perf_counter()
    result = function(*args)
    ms = (time.perf_counter() - begin) * 1e3
    del result  # freed outside the clock, so that every call finds the same allocator
    return ms


def _cuda_ms(function: Callable[..., Any], args: Any) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function(*args)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _summary(times: list[float]) -> Timing:
    return Timing(*(float(np.quantile(times, q)) for q in (0.5, 0.1, 0.9)))


def copy_bandwidth(device: str, call_bytes: int | None = None) -> float:
    """Bytes per second of a copy into existing memory, read and written bytes counted.

    Args:
        call_bytes: how many a call moves; None for so many that no cache holds them.
    """
    largest = _LARGEST_COPY[device]
    size = largest if call_bytes is None else min(max(call_bytes, _SMALLEST_COPY), largest)
    return _copy_bandwidth(device, 1 << (size - 1).bit_length())


@functools.cache
def _copy_bandwidth(device: str, call_bytes: int) -> float:
    """Measured once per run and size."""
    source, target = (torch.ones(call_bytes // 8, device=device) for _ in range(2))
    inputs = copies((target, source), call_bytes, device)
    timing = compare({"copy": torch.Tensor.copy_}, inputs, device, seconds=0.2)["copy"]
    return call_bytes / (timing.ms / 1e3)


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


def profiled(function: Callable[[], Any], device: str, memory: bool = False) -> Any:
    """A call under torch's profiler, which is kept from printing its own progress; `memory`: what it allocates too."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when a process first profiles
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, profile_memory=memory) as profiler:
        function()
    return profiler


def peak_mb(function: Callable[[], Any], device: str) -> float:
    """What a call allocates beyond what was there, at its peak; on the CPU the tensors that torch's profiler sees."""
    if device != "cuda":
        profiler = profiled(function, device, memory=True)
        events = profiler.profiler.kineto_results.events()
        held = itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]")
        return max(held, default=0) / 2**20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass(frozen=True)
class Forced:
    """A function with every op in it on one backend. `compare` chooses the backend outside the clock."""

    on: str
    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        with backend(self.on):
            return self.function(*args)


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
    floor = bytes_ / copy_bandwidth(device, bytes_) * 1e3
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
