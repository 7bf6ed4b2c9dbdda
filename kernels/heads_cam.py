"""cam_map, its backward and count_active in Triton. Contract: zsq_ext/ops/reference/heads.py."""

import triton
import triton.language as tl

from .block import block_of

_WARPS = 4
# What a program of cam_map sums before it moves on: channels times positions, or positions times channels.
_CHANNELS = 64
_PLACES = 32
# Elements of the activation's gradient per program.
_BLOCK = 1024


@triton.jit
def _floored(alpha_ptr, i, valid, floor, HAS_FLOOR: tl.constexpr):
    alpha = tl.load(alpha_ptr + i, mask=valid, other=0.0)
    return tl.where(alpha < floor, floor, alpha) if HAS_FLOOR else alpha


@triton.jit
def _cam_map_kernel(
    x_ptr,  # [samples, channels, places], or [samples, places, channels]: the strides say
    alpha_ptr,  # [samples, channels] float32
    maps_ptr,  # [samples, places] float32
    channels,
    places,
    floor,
    channel_stride,
    place_stride,
    tiles,
    HAS_FLOOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
):
    sample, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    p = tile * PLACES + tl.arange(0, PLACES)
    total = tl.zeros([PLACES], tl.float32)
    for begin in range(0, channels, CHANNELS):
        k = begin + tl.arange(0, CHANNELS)
        valid = (k < channels)[:, None] & (p < places)[None, :]
        alpha = _floored(alpha_ptr, sample * channels + k, k < channels, floor, HAS_FLOOR)
        at = sample * channels * places + k[:, None] * channel_stride + p[None, :] * place_stride
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(valid, alpha[:, None] * x, 0.0), 0)
    tl.store(maps_ptr + sample * places + p, tl.where(total < 0.0, 0.0, total), mask=p < places)


def cam_map(x, alpha, maps, samples, channels, places, last, floor):
    """floor may be None."""
    tiles = triton.cdiv(places, _PLACES)
    if samples * tiles == 0:
        return
    _cam_map_kernel[(samples * tiles,)](
        *(x, alpha, maps, channels, places, 0.0 if floor is None else float(floor)),
        *((1, channels) if last else (places, 1)),
        tiles,
        HAS_FLOOR=floor is not None,
        CHANNELS=_CHANNELS,
        PLACES=_PLACES,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit
def _cam_map_backward_kernel(
    alpha_ptr,  # [samples, channels] float32
    maps_ptr,  # [samples, places] float32, as grad
    grad_ptr,
    out_ptr,  # [n] as the activation
    n,
    channels,
    places,
    floor,
    LAST: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < n
    sample, rest = i // (channels * places), i % (channels * places)
    k = rest % channels if LAST else rest // places
    p = rest // channels if LAST else rest % places
    alpha = _floored(alpha_ptr, sample * channels + k, valid, floor, HAS_FLOOR)
    at = sample * places + p
    pull = tl.load(grad_ptr + at, mask=valid, other=0.0)
    pull = tl.where(tl.load(maps_ptr + at, mask=valid, other=0.0) <= 0.0, 0.0, pull)
    tl.store(out_ptr + i, (alpha * pull).to(out_ptr.dtype.element_ty), mask=valid)


def cam_map_backward(alpha, maps, grad, out, samples, channels, places, last, floor):
    """floor may be None."""
    n = samples * channels * places
    if n == 0:
        return
    block = block_of(n, _BLOCK)
    _cam_map_backward_kernel[(triton.cdiv(n, block),)](
        *(alpha, maps, grad, out, n, channels, places, 0.0 if floor is None else float(floor)),
        LAST=last,
        HAS_FLOOR=floor is not None,
        BLOCK=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit
def _count_active_kernel(
    x_ptr,  # as in _cam_map_kernel
    count_ptr,  # [samples, channels] int32
    channels,
    places,
    upper,
    channel_stride,
    place_stride,
    tiles,
    HAS_UPPER: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
):
    sample, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    k = tile * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.int32)
    for begin in range(0, places, PLACES):
        p = begin + tl.arange(0, PLACES)
        valid = (k < channels)[:, None] & (p < places)[None, :]
        at = sample * channels * places + k[:, None] * channel_stride + p[None, :] * place_stride
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        active = x > 0.0
        if HAS_UPPER:
            active = active & (x < upper)
        total += tl.sum(active.to(tl.int32), 1)
    tl.store(count_ptr + sample * channels + k, total, mask=k < channels)


def count_active(x, count, samples, channels, places, last, upper):
    """upper may be None."""
    tiles = triton.cdiv(channels, _CHANNELS)
    if samples * tiles == 0:
        return
    _count_active_kernel[(samples * tiles,)](
        *(x, count, channels, places, 0.0 if upper is None else float(upper)),
        *((1, channels) if last else (places, 1)),
        tiles,
        HAS_UPPER=upper is not None,
        CHANNELS=_CHANNELS,
        PLACES=_PLACES,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
