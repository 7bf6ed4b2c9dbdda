"""fake_quant and its backwards in Triton. Contract: zsq_ext/ops/reference/fake_quant.py."""

from typing import NamedTuple

import triton
import triton.language as tl

from .arith import clamp, round_half_even
from .block import block_of

# 1024 elements are 8 per thread at 4 warps: one 16-byte access in 16-bit types, two in float32.
_BLOCK = 1024
_WARPS = 4

# LSQ, per part: blocks summed in float32 by a tree and added up in float64. More of them where there would be more
# than PARTS parts, which is what the second stage takes at once.
_STEPS = 8
PARTS = 1024


@triton.jit
def _fake_quant_kernel(
    grad_ptr,  # [n] in x's dtype; not read in the forward
    x_ptr,  # [n]
    out_ptr,  # [n]
    scale_ptr,  # [channels] float32
    zero_point_ptr,  # [channels] int32, or float32 where LEARNED
    n,
    channels,  # element i belongs to channel (i // inner) % channels
    inner,
    qmin,  # float32, like every code here
    qmax,
    BACKWARD: tl.constexpr,
    LEARNED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits before the first multiplication: tensors may exceed 2^31 elements.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < n
    if PER_CHANNEL:
        c = (i // inner) % channels
        scale = tl.load(scale_ptr + c, mask=valid, other=1.0)
        zero_point = tl.load(zero_point_ptr + c, mask=valid, other=0).to(tl.float32)
    else:
        scale = tl.load(scale_ptr)
        zero_point = tl.load(zero_point_ptr).to(tl.float32)
    if LEARNED:
        zero_point = round_half_even(zero_point)

    x = tl.load(x_ptr + i, mask=valid, other=0.0).to(tl.float32)
    ratio = tl.div_rn(x, scale)
    if BACKWARD:
        code = ratio + zero_point
        grad = tl.load(grad_ptr + i, mask=valid, other=0.0)
        out = tl.where((code >= qmin) & (code <= qmax), grad, 0.0)
    else:
        code = clamp(round_half_even(ratio) + zero_point, qmin, qmax)
        out = (code - zero_point) * scale
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=valid)


def fake_quant(grad, x, out, scale, zero_point, learned, n, channels, inner, qmin, qmax):
    """The forward where grad is None, else the straight-through gradient. Launches nothing for n = 0."""
    if n == 0:
        return
    block = block_of(n, _BLOCK)
    _fake_quant_kernel[(triton.cdiv(n, block),)](
        x if grad is None else grad,
        x,
        out,
        scale,
        zero_point,
        n,
        channels,
        inner,
        float(qmin),
        float(qmax),
        BACKWARD=grad is not None,
        LEARNED=learned,
        PER_CHANNEL=channels > 1,
        BLOCK=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


class Cut(NamedTuple):
    """How what is gathered per channel is cut: a program takes COLS channels, and `steps` blocks of ROWS of each."""

    rows: int
    cols: int
    steps: int
    parts: int  # per channel


def cut_of(n, channels, inner):
    """n > 0. Depends on sizes alone, and with it what LSQ sums in which order."""
    cols = min(32, triton.next_power_of_2(channels)) if inner == 1 else 1  # channels last: neighbours side by side
    rows = _BLOCK // cols
    blocks = triton.cdiv(n // channels, rows)
    steps = min(blocks, max(_STEPS, triton.cdiv(blocks, PARTS)))
    return Cut(rows, cols, steps, triton.cdiv(blocks, steps))


@triton.jit
def lsq_part(
    grad_ptr,
    x_ptr,
    dx_ptr,
    step_ptr,  # [channels, parts] float64: what goes into dscale
    clip_ptr,  # [channels, parts] float64: what goes into dzero_point / scale
    scale_ptr,
    zero_point_ptr,
    unit,  # which tile of channels, and which part of them, int64
    m,  # elements of a channel
    channels,
    inner,
    qmin,
    qmax,
    steps,
    parts,
    written,  # elements of a channel for which dx is wanted: m, or 0
    LEARNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """What one program does for LSQ's gradient of a tensor, alone or among many."""
    tile = unit // parts
    part = unit % parts
    c = tile * COLS + tl.arange(0, COLS)
    real = c < channels
    scale = tl.load(scale_ptr + c, mask=real, other=1.0)
    zero_point = tl.load(zero_point_ptr + c, mask=real, other=0).to(tl.float32)
    if LEARNED:
        zero_point = round_half_even(zero_point)
    scale, zero_point = scale[None, :], zero_point[None, :]

    step = tl.zeros([COLS], tl.float64)
    clip = tl.zeros([COLS], tl.float64)
    for k in range(steps):
        j = ((part * steps + k) * ROWS + tl.arange(0, ROWS))[:, None]  # the channel's elements, counted over outer
        i = ((j // inner) * channels + c[None, :]) * inner + j % inner
        valid = (j < m) & real[None, :]
        x = tl.load(x_ptr + i, mask=valid, other=0.0).to(tl.float32)
        raw = tl.load(grad_ptr + i, mask=valid, other=0.0)
        grad = raw.to(tl.float32)
        ratio = tl.div_rn(x, scale)
        code = ratio + zero_point
        inside = (code >= qmin) & (code <= qmax)
        tl.store(dx_ptr + i, tl.where(inside, raw, 0.0).to(dx_ptr.dtype.element_ty), mask=valid & (j < written))
        code = clamp(round_half_even(ratio) + zero_point, qmin, qmax)
        term = grad * (code - zero_point - tl.where(inside, ratio, 0.0))
        clipped = tl.where(inside, 0.0, tl.where(code == code, -grad, code))
        step += tl.sum(tl.where(valid, term, 0.0), axis=0).to(tl.float64)
        clip += tl.sum(tl.where(valid, clipped, 0.0), axis=0).to(tl.float64)
    tl.store(step_ptr + c * parts + part, step, mask=real)
    tl.store(clip_ptr + c * parts + part, clip, mask=real)


@triton.jit
def lsq_finish(
    dscale_ptr,  # one float32, as dzero_point
    dzero_point_ptr,
    step_ptr,  # [parts] float64
    clip_ptr,  # [parts] float64
    scale_ptr,  # one float32
    parts,
    PARTS: tl.constexpr,  # the same for every tensor, so that its parts are always added alike
):
    """The second stage for one channel."""
    part = tl.arange(0, PARTS)
    step = tl.sum(tl.load(step_ptr + part, mask=part < parts, other=0.0), axis=0)
    clip = tl.sum(tl.load(clip_ptr + part, mask=part < parts, other=0.0), axis=0)
    scale = tl.load(scale_ptr).to(tl.float64)
    tl.store(dscale_ptr, step.to(tl.float32))
    tl.store(dzero_point_ptr, (scale * clip).to(tl.float32))


@triton.jit
def _lsq_kernel(
    grad_ptr,  # [n] in x's dtype
    x_ptr,  # [n]
    dx_ptr,  # [n]
    step_ptr,  # [channels, parts] float64, as clip
    clip_ptr,
    scale_ptr,  # [channels] float32
    zero_point_ptr,  # [channels] int32, or float32 where LEARNED
    m,
    channels,
    inner,
    qmin,
    qmax,
    steps,
    parts,
    LEARNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    lsq_part(
        grad_ptr,
        x_ptr,
        dx_ptr,
        step_ptr,
        clip_ptr,
        scale_ptr,
        zero_point_ptr,
        tl.program_id(0).to(tl.int64),
        m,
        channels,
        inner,
        qmin,
        qmax,
        steps,
        parts,
        m,
        LEARNED,
        ROWS,
        COLS,
    )


@triton.jit
def _lsq_finish_kernel(
    dscale_ptr,  # [channels] float32
    dzero_point_ptr,  # [channels] float32
    step_ptr,  # [channels, parts] float64
    clip_ptr,  # [channels, parts] float64
    scale_ptr,  # [channels] float32
    parts,
    PARTS: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    at = c * parts
    lsq_finish(dscale_ptr + c, dzero_point_ptr + c, step_ptr + at, clip_ptr + at, scale_ptr + c, parts, PARTS)


def fake_quant_lsq_backward(
    grad, x, dx, dscale, dzero_point, step, clip, scale, zero_point, learned, n, channels, inner, qmin, qmax, cut
):
    """LSQ's gradient: the straight-through gradient into dx, and the two sums per channel. n > 0."""
    _lsq_kernel[(triton.cdiv(channels, cut.cols) * cut.parts,)](
        grad,
        x,
        dx,
        step,
        clip,
        scale,
        zero_point,
        n // channels,
        channels,
        inner,
        float(qmin),
        float(qmax),
        cut.steps,
        cut.parts,
        LEARNED=learned,
        ROWS=cut.rows,
        COLS=cut.cols,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    _lsq_finish_kernel[(channels,)](
        dscale,
        dzero_point,
        step,
        clip,
        scale,
        cut.parts,
        PARTS=PARTS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
