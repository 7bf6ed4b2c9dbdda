"""fake_quant and its backward for many tensors in one launch. Contract: zsq_ext/ops/reference/fake_quant_many.py."""

import triton
import triton.language as tl

from .arith import clamp, round_half_even
from .fake_quant import PARTS, cut_of, lsq_finish, lsq_part

__all__ = ["backward", "cut_of", "forward", "programs"]

# 1024 elements are 8 per thread at 4 warps.
_BLOCK = 1024
_WARPS = 4
# The interpreter pays per program, not per element. What is summed does not depend on it.
_BLOCK_INTERPRETED = 1 << 16

# A record of the forward's table: its first program, x, out, scale, zero_point, n, channels, inner, qmin, qmax.
FORWARD_FIELDS = 10
_FORWARD_FIELDS = tl.constexpr(FORWARD_FIELDS)
# Of the backward's: its first program, its first channel of those whose sums are wanted, where its partial sums and its
# sums begin, grad, x, dx or 0, scale, zero_point, m, channels, inner, qmin, qmax, steps, parts.
BACKWARD_FIELDS = 16
_BACKWARD_FIELDS = tl.constexpr(BACKWARD_FIELDS)


def block():
    return _BLOCK_INTERPRETED if triton.knobs.runtime.interpret else _BLOCK


def programs(n):
    """How many programs the forward of n elements takes."""
    return triton.cdiv(n, block())


@triton.jit
def _record(table_ptr, field, unit, count, FIELDS: tl.constexpr, COUNT: tl.constexpr):
    """The last record whose `field` is not beyond unit."""
    t = tl.arange(0, COUNT)
    firsts = tl.load(table_ptr + t * FIELDS + field, mask=t < count, other=9223372036854775807)
    return table_ptr + (tl.sum((firsts <= unit).to(tl.int32), axis=0) - 1) * FIELDS


@triton.jit
def _forward_kernel(
    table_ptr,  # [count, FORWARD_FIELDS] int64
    x_like_ptr,  # the types of all tensors; not read
    scale_like_ptr,
    zero_point_like_ptr,
    count,
    LEARNED: tl.constexpr,
    COUNT: tl.constexpr,  # a power of two, at least count
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    record = _record(table_ptr, 0, unit, count, _FORWARD_FIELDS, COUNT)
    x_ptr = tl.load(record + 1).to(x_like_ptr.dtype)
    out_ptr = tl.load(record + 2).to(x_like_ptr.dtype)
    scale_ptr = tl.load(record + 3).to(scale_like_ptr.dtype)
    zero_point_ptr = tl.load(record + 4).to(zero_point_like_ptr.dtype)
    n, channels, inner = tl.load(record + 5), tl.load(record + 6), tl.load(record + 7)
    qmin, qmax = tl.load(record + 8).to(tl.float32), tl.load(record + 9).to(tl.float32)

    i = (unit - tl.load(record)) * BLOCK + tl.arange(0, BLOCK)
    valid = i < n
    c = (i // inner) % channels
    scale = tl.load(scale_ptr + c, mask=valid, other=1.0)
    zero_point = tl.load(zero_point_ptr + c, mask=valid, other=0).to(tl.float32)
    if LEARNED:
        zero_point = round_half_even(zero_point)
    x = tl.load(x_ptr + i, mask=valid, other=0.0).to(tl.float32)
    code = clamp(round_half_even(tl.div_rn(x, scale)) + zero_point, qmin, qmax)
    out = (code - zero_point) * scale
    tl.store(out_ptr + i, out.to(x_like_ptr.dtype.element_ty), mask=valid)


def forward(table, like, learned, grid):
    """table: [tensors, FORWARD_FIELDS] on the device; like: an x, a scale and a zero_point. One launch of `grid`."""
    count = table.shape[0]
    _forward_kernel[(grid,)](
        table,
        *like,
        count,
        LEARNED=learned,
        COUNT=triton.next_power_of_2(count),
        BLOCK=block(),
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit
def _backward_kernel(
    table_ptr,  # [count, BACKWARD_FIELDS] int64
    x_like_ptr,  # the types of all tensors; not read
    scale_like_ptr,
    zero_point_like_ptr,
    step_ptr,  # [all parts of all channels] float64, as clip
    clip_ptr,
    count,
    LEARNED: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    record = _record(table_ptr, 0, unit, count, _BACKWARD_FIELDS, COUNT)
    partial = tl.load(record + 2)
    dx = tl.load(record + 6)
    lsq_part(
        tl.load(record + 4).to(x_like_ptr.dtype),
        tl.load(record + 5).to(x_like_ptr.dtype),
        dx.to(x_like_ptr.dtype),
        step_ptr + partial,
        clip_ptr + partial,
        tl.load(record + 7).to(scale_like_ptr.dtype),
        tl.load(record + 8).to(zero_point_like_ptr.dtype),
        unit - tl.load(record),
        tl.load(record + 9),
        tl.load(record + 10),
        tl.load(record + 11),
        tl.load(record + 12).to(tl.float32),
        tl.load(record + 13).to(tl.float32),
        tl.load(record + 14),
        tl.load(record + 15),
        tl.where(dx != 0, tl.load(record + 9), 0),
        LEARNED,
        ROWS,
        COLS,
    )


@triton.jit
def _finish_kernel(
    table_ptr,  # as above; the first `count` records are those whose sums are wanted
    scale_like_ptr,
    dscale_ptr,  # [channels of all tensors whose sums are wanted] float32, as dzero_point
    dzero_point_ptr,
    step_ptr,
    clip_ptr,
    count,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    record = _record(table_ptr, 1, unit, count, _BACKWARD_FIELDS, COUNT)
    c, parts = unit - tl.load(record + 1), tl.load(record + 15)
    at = tl.load(record + 2) + c * parts
    scale_ptr = tl.load(record + 7).to(scale_like_ptr.dtype)
    out = tl.load(record + 3) + c
    lsq_finish(dscale_ptr + out, dzero_point_ptr + out, step_ptr + at, clip_ptr + at, scale_ptr + c, parts, PARTS)


def backward(table, like, learned, cut, grids, wanted, partial, dscale, dzero_point):
    """LSQ's gradient of tensors that are cut alike.

    table: [tensors, BACKWARD_FIELDS], first the `wanted` records whose sums are wanted. like: as for `forward`. cut: of
    any of them, whose rows and cols count. grids: programs of the first stage, and of the second. partial: [2, parts of
    all channels] float64.
    """
    count = table.shape[0]
    _backward_kernel[(grids[0],)](
        table,
        *like,
        partial[0],
        partial[1],
        count,
        LEARNED=learned,
        COUNT=triton.next_power_of_2(count),
        ROWS=cut.rows,
        COLS=cut.cols,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    if wanted:
        _finish_kernel[(grids[1],)](
            table,
            like[1],
            dscale,
            dzero_point,
            partial[0],
            partial[1],
            wanted,
            COUNT=triton.next_power_of_2(wanted),
            PARTS=PARTS,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
