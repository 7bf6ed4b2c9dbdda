"""Min-max fake-quantization of many tensors in Triton. Contract: zsq_ext/ops/reference/fake_quant_minmax.py."""

import triton
import triton.language as tl

from .arith import clamp, round_half_even
from .channel_range import ends

# 1024 elements are 8 per thread at 4 warps; a channel of a large weight is some 5 of them.
_BLOCK = 1024
_WARPS = 4
# The interpreter pays per block, not per element.
_BLOCK_INTERPRETED = 1 << 14

# x, out, the first of its channels among all, length of a channel, bits
FIELDS = 5
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _minmax_kernel(
    table_ptr,  # [count, FIELDS] int64
    like_ptr,  # the type of all tensors; not read
    scale_ptr,  # [all channels] float32
    zero_point_ptr,  # [all channels] int32
    count,
    SYMMETRIC: tl.constexpr,
    COUNT: tl.constexpr,  # a power of two, at least count
    BLOCK: tl.constexpr,
):
    # A program takes a channel; the last tensor that begins at it or before has it.
    unit = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, COUNT)
    firsts = tl.load(table_ptr + t * _FIELDS + 2, mask=t < count, other=9223372036854775807)
    row = table_ptr + (tl.sum((firsts <= unit).to(tl.int32), axis=0) - 1) * _FIELDS
    length = tl.load(row + 3)
    begin = (unit - tl.load(row + 2)) * length
    x_ptr = tl.load(row).to(like_ptr.dtype) + begin
    out_ptr = tl.load(row + 1).to(like_ptr.dtype) + begin
    bits = tl.load(row + 4).to(tl.int32)

    lo = tl.full([BLOCK], float("inf"), tl.float32)
    hi = tl.full([BLOCK], float("-inf"), tl.float32)
    nan = tl.zeros([BLOCK], tl.int32)
    for k in range(0, length, BLOCK):
        i = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < length, other=0.0).to(tl.float32)
        lo = tl.where((i < length) & (x < lo), x, lo)
        hi = tl.where((i < length) & (x > hi), x, hi)
        nan = tl.where(x == x, nan, 1)
    low, high = ends(lo, hi, nan, 0)

    # The grid between the ends, as channel_range.h has it.
    qmin = (0 - (1 << (bits - 1))).to(tl.float32)
    levels = ((1 << bits) - 1).to(tl.float32)
    bound = tl.where(tl.abs(low) > tl.abs(high), tl.abs(low), tl.abs(high))
    if SYMMETRIC:
        low, high = -bound, bound
    width = high - low
    scale = tl.div_rn(tl.where(width < 1e-8, 1e-8, width), levels)
    finest = bound * 1.1920928955078125e-07  # 2^-23
    scale = tl.where(scale < finest, finest, scale)
    zero_point = qmin - round_half_even(tl.div_rn(low, scale))
    if SYMMETRIC:
        zero_point = zero_point * 0.0
    zero_point = tl.where(zero_point == zero_point, zero_point, 0.0)
    tl.store(scale_ptr + unit, scale)
    tl.store(zero_point_ptr + unit, zero_point.to(tl.int32))

    for k in range(0, length, BLOCK):
        i = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < length, other=0.0).to(tl.float32)
        code = clamp(round_half_even(tl.div_rn(x, scale)) + zero_point, qmin, qmin + levels)
        out = (code - zero_point) * scale
        tl.store(out_ptr + i, out.to(like_ptr.dtype.element_ty), mask=i < length)


def fake_quant_minmax(table, like, scale, zero_point, symmetric):
    """table: [tensors, FIELDS] int64 on the device, of tensors of like's type. One launch for all channels."""
    count = table.shape[0]
    _minmax_kernel[(scale.shape[0],)](
        table,
        like,
        scale,
        zero_point,
        count,
        SYMMETRIC=symmetric,
        COUNT=triton.next_power_of_2(count),
        BLOCK=_BLOCK_INTERPRETED if triton.knobs.runtime.interpret else _BLOCK,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
