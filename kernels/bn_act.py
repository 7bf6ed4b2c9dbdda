"""bn_act, channel_sums and their backwards in Triton. Contract: zsq_ext/ops/reference/bn_act.py.

A program takes a tile of rows and columns. Where channels are last, a row is a place and a column a channel; elsewhere
a row is one channel of one sample and a column a place. Sums and ends run along the axis that is not the channels',
leave one partial result per tile and channel, and are added up and united by the caller.
"""

import triton
import triton.language as tl

from .arith import clamp, round_half_even
from .bn_act_tiles import Cut, place
from .channel_range import ends

__all__ = ["Cut", "backward", "forward"]


@triton.jit
def _bytes(length):
    return (length - 1) // 8 + 1  # length + 7 might not fit into 32 bits


@triton.jit
def _norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, c, valid, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr):
    mean = tl.load(mean_ptr + c, mask=valid, other=0.0)
    var = tl.load(var_ptr + c, mask=valid, other=1.0)
    one = tl.full(var.shape, 1.0, tl.float32)
    gamma = tl.load(gamma_ptr + c, mask=valid, other=1.0) if HAS_GAMMA else one
    beta = tl.load(beta_ptr + c, mask=valid, other=0.0) if HAS_BETA else one * 0.0
    a = gamma * tl.div_rn(one, tl.sqrt_rn(var + eps))
    return a, beta - mean * a


@triton.jit
def _steps(y, scale_ptr, zero_point_ptr, stride, c, valid):
    """y / scale, the zero-point and the scale. y has been rounded to what is stored; grids are `stride` apart."""
    scale = tl.load(scale_ptr + c * stride, mask=valid, other=1.0)
    zero_point = tl.load(zero_point_ptr + c * stride, mask=valid, other=0).to(tl.float32)
    return tl.div_rn(y, tl.broadcast_to(scale, y.shape)), zero_point, scale


@triton.jit
def _activated(v, ACT: tl.constexpr):
    if ACT == "relu":
        v = tl.where(v < 0.0, 0.0, v)
    elif ACT == "relu6":
        v = clamp(v, 0.0, 6.0)
    elif ACT == "silu":
        v = tl.div_rn(v, 1.0 + tl.exp(-v))
    elif ACT == "hardswish":
        v = v * clamp(v + 3.0, 0.0, 6.0) * (1 / 6)
    return v


@triton.jit
def _passes(v, ACT: tl.constexpr):
    # Strictly inside, and where v is NaN: "not outside" says both.
    outside = (v <= 0.0) & (ACT != "none")
    if ACT == "relu6":
        outside = outside | (v >= 6.0)
    return outside == 0


@triton.jit
def _through(g, v, ACT: tl.constexpr):
    if ACT == "relu" or ACT == "relu6":
        g = tl.where(_passes(v, ACT), g, 0.0)
    elif ACT == "silu":
        s = tl.div_rn(tl.full(v.shape, 1.0, tl.float32), 1.0 + tl.exp(-v))
        g = g * (s * (1.0 + v * (1.0 - s)))
    elif ACT == "hardswish":
        g = tl.where(v <= -3.0, 0.0, tl.where(v < 3.0, g * (v * (1 / 3) + 0.5), g))
    return g


@triton.jit
def _store_sums(p, q, partials_ptr, size, chunk, channels, channel, valid, LAST: tl.constexpr):
    """One partial sum of p and q for each channel of the tile, q's `size` behind p's."""
    AXIS: tl.constexpr = 0 if LAST else 1
    p, q = tl.sum(tl.where(valid, p, 0.0), AXIS, keep_dims=True), tl.sum(tl.where(valid, q, 0.0), AXIS, keep_dims=True)
    at, some = partials_ptr + chunk * channels + channel, tl.max(valid.to(tl.int32), AXIS, keep_dims=True) != 0
    tl.store(at, p, mask=some)
    tl.store(at + size, q, mask=some)


@triton.jit
def _store_ends(y, stored: tl.constexpr, partials_ptr, size, chunk, channels, channel, valid, LAST: tl.constexpr):
    """The ends of y for each channel of the tile, rounded to what is stored, the largest `size` behind the smallest."""
    AXIS: tl.constexpr = 0 if LAST else 1
    number = valid & (y == y)
    lo, hi = tl.where(number, y, float("inf")), tl.where(number, y, float("-inf"))
    lo, hi = ends(lo, hi, (valid & (y != y)).to(tl.int32), AXIS)
    at, some = partials_ptr + chunk * channels + channel, tl.max(valid.to(tl.int32), AXIS, keep_dims=True) != 0
    tl.store(at, tl.expand_dims(lo.to(stored).to(tl.float32), AXIS), mask=some)
    tl.store(at + size, tl.expand_dims(hi.to(stored).to(tl.float32), AXIS), mask=some)


@triton.jit
def _forward_kernel(
    u_ptr,  # [n], as residual and y
    residual_ptr,
    y_ptr,
    mask_ptr,  # one bit per element; every row starts a byte
    partials_ptr,  # [2][all chunks][channels] float32, as ends
    ends_ptr,
    mean_ptr,  # [channels] float32, as var, gamma and beta
    var_ptr,
    gamma_ptr,
    beta_ptr,
    scale_ptr,  # [channels] or [1] float32
    zero_point_ptr,  # as scale, int32
    eps,
    stride,  # of scale and zero_point, from channel to channel
    qmin,
    qmax,
    size,  # all chunks * channels
    samples,
    channels,
    places,
    count,
    chunks,
    columns,
    ACT: tl.constexpr,
    LAST: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_QUANT: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
):
    row, col, length, valid, c, _, chunk = place(
        samples, channels, places, count, chunks, columns, LAST, PER_SAMPLE, R, L
    )
    known = c < channels
    i = row * length + col
    u = tl.load(u_ptr + i, mask=valid, other=0.0).to(tl.float32)
    if HAS_Y:
        a, b = _norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, c, known, HAS_GAMMA, HAS_BETA)
        v = a * u + b
        if HAS_RESIDUAL:
            v = v + tl.load(residual_ptr + i, mask=valid, other=0.0).to(tl.float32)
        y = _activated(v, ACT)
        if HAS_ENDS:
            _store_ends(y, y_ptr.dtype.element_ty, ends_ptr, size, chunk, channels, c, valid, LAST)
        keep = _passes(v, ACT) & valid
        if HAS_QUANT:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            ratio, zero_point, scale = _steps(y, scale_ptr, zero_point_ptr, stride, c, known)
            if CLIP:
                keep = keep & (ratio + zero_point >= qmin) & (ratio + zero_point <= qmax)
            y = (clamp(round_half_even(ratio) + zero_point, qmin, qmax) - zero_point) * scale
        if HAS_MASK:
            bits = tl.reshape(keep.to(tl.int32), (R, L // 8, 8))
            byte = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
            bytes_ = _bytes(length)
            at = tl.program_id(0).to(tl.int64) % columns * (L // 8) + tl.arange(0, L // 8)[None, :]
            there = (tl.max(valid.to(tl.int32), 1, keep_dims=True) != 0) & (at < bytes_)
            tl.store(mask_ptr + row * bytes_ + at, byte.to(tl.uint8), mask=there)
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=valid)
    if HAS_SUMS:
        d = u - tl.load(mean_ptr + c, mask=known, other=0.0)
        _store_sums(d, d * d, partials_ptr, size, chunk, channels, c, valid, LAST)


@triton.jit
def _backward_kernel(
    u_ptr,  # [n], as residual, grad, du and dr
    residual_ptr,
    mask_ptr,  # as the forward left it
    grad_ptr,
    grad_s1_ptr,  # [groups, channels] float32, as grad_s2
    grad_s2_ptr,
    du_ptr,
    dr_ptr,
    partials_ptr,  # [2][all chunks][channels] float32
    mean_ptr,  # [channels] float32, as var, gamma and beta
    var_ptr,
    gamma_ptr,
    beta_ptr,
    scale_ptr,  # [channels] or [1] float32
    zero_point_ptr,  # as scale, int32
    eps,
    stride,  # of scale and zero_point, from channel to channel
    qmin,
    qmax,
    size,  # all chunks * channels
    samples,
    channels,
    places,
    count,
    chunks,
    columns,
    ACT: tl.constexpr,
    LAST: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_QUANT: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_STATS: tl.constexpr,
    NEED_U: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    NEED_AFFINE: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
):
    row, col, length, valid, c, group, chunk = place(
        samples, channels, places, count, chunks, columns, LAST, PER_SAMPLE, R, L
    )
    known = c < channels
    i = row * length + col
    u = tl.load(u_ptr + i, mask=valid, other=0.0).to(tl.float32)
    d = u - tl.load(mean_ptr + c, mask=known, other=0.0)
    w = d
    if HAS_GRAD:
        a, b = _norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, c, known, HAS_GAMMA, HAS_BETA)
        g = tl.load(grad_ptr + i, mask=valid, other=0.0).to(tl.float32)
        if HAS_MASK:
            byte = tl.load(mask_ptr + row * _bytes(length) + col // 8, mask=valid, other=0).to(tl.int32)
            g = tl.where(((byte >> (col % 8).to(tl.int32)) & 1) != 0, g, 0.0)
        else:
            v = a * u + b
            if HAS_RESIDUAL:
                v = v + tl.load(residual_ptr + i, mask=valid, other=0.0).to(tl.float32)
            if HAS_QUANT and CLIP:
                y = _activated(v, ACT).to(u_ptr.dtype.element_ty).to(tl.float32)
                ratio, zero_point, _ = _steps(y, scale_ptr, zero_point_ptr, stride, c, known)
                g = tl.where((ratio + zero_point >= qmin) & (ratio + zero_point <= qmax), g, 0.0)
            g = _through(g, v, ACT)
        if NEED_RESIDUAL:
            tl.store(dr_ptr + i, g.to(dr_ptr.dtype.element_ty), mask=valid)
        if NEED_AFFINE:
            _store_sums(g, g * d, partials_ptr, size, chunk, channels, c, valid, LAST)
        w = a * g
    if NEED_U:
        if HAS_STATS:
            s1 = tl.load(grad_s1_ptr + group * channels + c, mask=known, other=0.0)
            s2 = tl.load(grad_s2_ptr + group * channels + c, mask=known, other=0.0)
            q = (2.0 * s2) * d + s1
            w = w + q if HAS_GRAD else q
        tl.store(du_ptr + i, w.to(du_ptr.dtype.element_ty), mask=valid)


def forward(cut, u, residual, layer, y, mask, partials, ends):
    """Fills y, mask, the partial sums and the partial ends, those of them that are not None; ends only beside y."""
    cut.launch(
        _forward_kernel,
        layer,
        (u, residual, y, mask, partials, ends),
        HAS_Y=y is not None,
        HAS_MASK=mask is not None,
        HAS_SUMS=partials is not None,
        HAS_ENDS=ends is not None,
    )


def backward(cut, u, residual, mask, grads, layer, du, dr, partials):
    """Fills du, dr and the partial sums of g and g * (u - mean), those of them that are not None."""
    cut.launch(
        _backward_kernel,
        layer,
        (u, residual, mask, *grads, du, dr, partials),
        HAS_MASK=mask is not None,
        HAS_GRAD=grads.y is not None,
        HAS_STATS=grads.s1 is not None,
        NEED_U=du is not None,
        NEED_RESIDUAL=dr is not None,
        NEED_AFFINE=partials is not None,
    )
