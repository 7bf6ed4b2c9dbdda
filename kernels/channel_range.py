"""The extremes of channels in Triton. Contract: zsq_ext/ops/reference/channel_range.py."""

import triton
import triton.language as tl

from .fake_quant import cut_of

_WARPS = 4

__all__ = ["channel_range", "cut_of"]


@triton.jit
def ends(lo, hi, nan, AXIS: tl.constexpr):
    """The ends of what each lane has seen, along an axis; lo and hi are numbers, nan says where there was none."""
    # tl.min and tl.max drop NaN on some hardware, so that none may reach them.
    bad = tl.max(nan, axis=AXIS) != 0
    return tl.where(bad, float("nan"), tl.min(lo, axis=AXIS)), tl.where(bad, float("nan"), tl.max(hi, axis=AXIS))


@triton.jit
def _range_kernel(
    x_ptr,  # [n]
    lo_ptr,  # [channels, parts] float32
    hi_ptr,  # [channels, parts] float32
    m,  # elements of a channel
    channels,
    inner,
    steps,
    parts,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64) // parts
    part = tl.program_id(0).to(tl.int64) % parts
    c = tile * COLS + tl.arange(0, COLS)
    real = c < channels
    lo = tl.full([ROWS, COLS], float("inf"), tl.float32)
    hi = tl.full([ROWS, COLS], float("-inf"), tl.float32)
    nan = tl.zeros([ROWS, COLS], tl.int32)
    for k in range(steps):
        j = ((part * steps + k) * ROWS + tl.arange(0, ROWS))[:, None]  # the channel's elements, counted over outer
        i = ((j // inner) * channels + c[None, :]) * inner + j % inner
        valid = (j < m) & real[None, :]
        x = tl.load(x_ptr + i, mask=valid, other=0.0).to(tl.float32)
        lo = tl.where(valid & (x < lo), x, lo)
        hi = tl.where(valid & (x > hi), x, hi)
        nan = tl.where(x == x, nan, 1)
    low, high = ends(lo, hi, nan, 0)
    tl.store(lo_ptr + c * parts + part, low, mask=real)
    tl.store(hi_ptr + c * parts + part, high, mask=real)


def channel_range(x, lo, hi, n, channels, inner, cut):
    """Fills lo and hi, [channels, parts] each. n > 0."""
    _range_kernel[(triton.cdiv(channels, cut.cols) * cut.parts,)](
        x,
        lo,
        hi,
        n // channels,
        channels,
        inner,
        cut.steps,
        cut.parts,
        ROWS=cut.rows,
        COLS=cut.cols,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
