"""The Lp error of many grids in Triton. Contract: zsq_ext/ops/reference/lp_error.py; arithmetic: lp_error.h."""

import struct

import triton
import triton.language as tl

from .arith import clamp, round_half_even
from .elementary import exp_of, log_correction

_WARPS = 4
# Elements at a time beside up to 128 grids: 16 numbers a thread.
_ELEMENTS, _GRIDS = 16, 128
# Elements of a program, which make a part of a channel's sum, unless there were more than 1024 parts.
_CHUNK, _CHUNKS = 1024, 1024


def cut_of(length):
    """(chunk, chunks) of a channel."""
    chunk = _CHUNK * triton.cdiv(length, _CHUNK * _CHUNKS)
    return chunk, triton.cdiv(length, chunk) if length else 0


def _exponent(p):
    """(p, its first 12 bits, and the rest): exponent_of of lp_error.h."""
    (bits,) = struct.unpack("I", struct.pack("f", p))
    (high,) = struct.unpack("f", struct.pack("I", bits & 0xFFFFF000))
    return p, high, p - high


@triton.jit
def _power(a, whole_p, high_p, low_p):
    """lp_power of lp_error.h."""
    offset = a.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (offset >> 23).to(tl.float32)
    f = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    log_m = f + (log_correction(f) - (f * f) * 0.5)
    whole = high_p * e
    n = round_half_even(whole)
    r = (whole - n) + low_p * e
    t = r * 0.693147180559945 + whole_p * log_m
    biased = clamp(n, -127.0, 128.0).to(tl.int32) + 127
    power = exp_of(t) * (biased << 23).to(tl.float32, bitcast=True)
    return tl.where(a < 1.17549435e-38, 0.0, tl.where(a <= 3.40282347e38, power, a))


@triton.jit
def _lp_error_kernel(
    x_ptr,  # [channels, length]
    scale_ptr,  # [channels, candidates] float32
    zero_point_ptr,  # [channels, candidates] int32
    sums_ptr,  # [channels, chunks, candidates] float64
    length,
    candidates,
    chunk,
    chunks,
    qmin,
    qmax,
    whole_p,  # float32, as `_exponent` has them
    high_p,
    low_p,
    SQUARE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    GRIDS: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    channel, begin = unit // chunks, (unit % chunks) * chunk
    k = tl.program_id(1) * GRIDS + tl.arange(0, GRIDS)
    real = k < candidates
    scale = tl.load(scale_ptr + channel * candidates + k, mask=real, other=1.0)[None, :]
    zero_point = tl.load(zero_point_ptr + channel * candidates + k, mask=real, other=0).to(tl.float32)[None, :]
    total = tl.zeros([GRIDS], tl.float64)
    stop = tl.minimum(begin + chunk, length)
    for start in range(begin, stop, ELEMENTS):
        i = start + tl.arange(0, ELEMENTS)
        x = tl.load(x_ptr + channel * length + i, mask=i < stop, other=0.0).to(tl.float32)[:, None]
        code = clamp(round_half_even(tl.div_rn(x, scale)) + zero_point, qmin, qmax)
        d = x - (code - zero_point) * scale
        term = d * d if SQUARE else _power(tl.abs(d), whole_p, high_p, low_p)
        total += tl.sum(tl.where((i < stop)[:, None], term, 0.0), axis=0).to(tl.float64)
    tl.store(sums_ptr + unit * candidates + k, total, mask=real)


def lp_error(x, scale, zero_point, sums, length, qmin, qmax, p):
    """Fills sums, [channels, chunks, candidates]."""
    chunk, chunks = cut_of(length)
    channels, candidates = scale.shape
    if chunks * channels * candidates == 0:
        return
    grids = min(_GRIDS, triton.next_power_of_2(candidates))
    _lp_error_kernel[(channels * chunks, triton.cdiv(candidates, grids))](
        x,
        scale,
        zero_point,
        sums,
        length,
        candidates,
        chunk,
        chunks,
        float(qmin),
        float(qmax),
        *_exponent(p),
        SQUARE=p == 2,
        ELEMENTS=_ELEMENTS,
        GRIDS=grids,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
