"""view_images, resize_crops and their adjoints in Triton. Contract: zsq_ext/ops/reference/image.py.

A program takes a stretch of the result in memory order, and gathers what each element needs. The neighbours of an
element are mostly those of the next one, and come from the cache.
"""

import struct
from typing import NamedTuple

import triton
import triton.language as tl

from .arith import clip
from .block import block_of

_BLOCK = 1024
# Of a crop a thread takes 4 elements: with 8 of them, and all their taps, registers would not do.
_BLOCK_RESIZE = 512
_WARPS = 4


class Shape(NamedTuple):
    """Dense images: [samples, channels, height, width], or [samples, height, width, channels] where `last`."""

    samples: int
    channels: int
    in_height: int
    in_width: int
    out_height: int
    out_width: int
    last: bool

    @property
    def n(self):
        return self.samples * self.channels * self.out_height * self.out_width


@triton.jit
def _element(channels, out_height, out_width, n, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """(i, sample, channel, row, column) of this program's elements; those beyond the end repeat the last one."""
    # 64 bits before the first multiplication: tensors may exceed 2^31 elements.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.minimum(i, n - 1)
    if LAST:
        c, at = at % channels, at // channels
        x, at = at % out_width, at // out_width
        return i, at // out_height, c, at % out_height, x
    x, at = at % out_width, at // out_width
    y, at = at % out_height, at // out_height
    return i, at // channels, at % channels, y, x


@triton.jit
def _offset(n, c, y, x, channels, height, width, LAST: tl.constexpr):
    return ((n * height + y) * width + x) * channels + c if LAST else ((n * channels + c) * height + y) * width + x


@triton.jit
def _pixel(x_ptr, n, c, y, x, valid, channels, height, width, LAST: tl.constexpr):
    inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(x_ptr + _offset(n, c, y, x, channels, height, width, LAST), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _across(x_ptr, n, c, y, x, valid, centre, edge, channels, height, width, LAST: tl.constexpr):
    before = _pixel(x_ptr, n, c, y, x - 1, valid, channels, height, width, LAST)
    here = _pixel(x_ptr, n, c, y, x, valid, channels, height, width, LAST)
    after = _pixel(x_ptr, n, c, y, x + 1, valid, channels, height, width, LAST)
    return centre * here + edge * (before + after)


@triton.jit
def _view_kernel(
    x_ptr,  # [samples, channels, in_height, in_width]
    y_ptr,  # [samples, channels, out_height, out_width], [n]
    top_ptr,  # [samples] int64, as left
    left_ptr,
    flip_ptr,  # [samples] bool
    low_ptr,  # [channels] float32, as high; not read without CLIP
    high_ptr,
    centre,  # both rounded to float32
    edge,
    n,
    channels,
    in_height,
    in_width,
    out_height,
    out_width,
    ADJOINT: tl.constexpr,
    SMOOTH: tl.constexpr,
    CLIP: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, sample, c, y, x = _element(channels, out_height, out_width, n, LAST, BLOCK)
    valid = i < n
    flip = tl.load(flip_ptr + sample).to(tl.int1)
    top, left = tl.load(top_ptr + sample), tl.load(left_ptr + sample)
    if ADJOINT:
        top = tl.minimum(tl.maximum(top, 0), out_height - in_height)
        left = tl.minimum(tl.maximum(left, 0), out_width - in_width)
        row, column = y - top, tl.where(flip, out_width - 1 - left - x, x - left)
    else:
        top = tl.minimum(tl.maximum(top, 0), in_height - out_height)
        left = tl.minimum(tl.maximum(left, 0), in_width - out_width)
        row, column = y + top, tl.where(flip, in_width - 1 - left - x, x + left)
    if SMOOTH:
        up = _across(x_ptr, sample, c, row - 1, column, valid, centre, edge, channels, in_height, in_width, LAST)
        here = _across(x_ptr, sample, c, row, column, valid, centre, edge, channels, in_height, in_width, LAST)
        down = _across(x_ptr, sample, c, row + 1, column, valid, centre, edge, channels, in_height, in_width, LAST)
        v = centre * here + edge * (up + down)
    else:
        v = _pixel(x_ptr, sample, c, row, column, valid, channels, in_height, in_width, LAST)
    if CLIP:
        v = clip(v, tl.load(low_ptr + c), tl.load(high_ptr + c))
    tl.store(y_ptr + i, v.to(y_ptr.dtype.element_ty), mask=valid)


def _float32(v):
    # The interpreter would go on in float64 with an argument that is none.
    return struct.unpack("f", struct.pack("f", v))[0]


def view_images(x, y, top, left, flip, low, high, edge, adjoint, shape):
    """The view, or the adjoint of a gradient x. Launches nothing for an empty y."""
    if shape.n == 0:
        return
    block = block_of(shape.n, _BLOCK)
    edge = _float32(edge)
    _view_kernel[(triton.cdiv(shape.n, block),)](
        *(x, y, top, left, flip),
        *(x if low is None else low, x if high is None else high),
        _float32(1 - 2 * edge),
        edge,
        shape.n,
        *shape[1:6],
        ADJOINT=adjoint,
        SMOOTH=edge != 0,
        CLIP=low is not None,
        LAST=shape.last,
        BLOCK=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit
def _axis(start_ptr, extent_ptr, sample, full):
    """(start, extent) of each element's crop along an axis, moved into the image."""
    extent = tl.minimum(tl.maximum(tl.load(extent_ptr + sample), 1), full)
    return tl.minimum(tl.maximum(tl.load(start_ptr + sample), 0), full - extent), extent


@triton.jit
def _place(o, extent, size):
    """Output pixel o is at place / (2 size) pixels into the crop, and does not leave it."""
    return tl.minimum(tl.maximum((2 * o + 1) * extent - size, 0), (extent - 1) * 2 * size)


@triton.jit
def _taps(o, extent, size):
    """(first, second, weight of the second) of the pixels of the crop that an output pixel reads."""
    place = _place(o, extent, size)
    first = place // (2 * size)
    weight = tl.div_rn((place - first * 2 * size).to(tl.float32), (tl.zeros_like(place) + 2 * size).to(tl.float32))
    return first, tl.minimum(first + 1, extent - 1), weight


@triton.jit
def _first_at(p, extent, size):
    """The first output pixel whose place is at pixel p of the crop or beyond it."""
    n = (2 * p + 1) * size - extent
    between = tl.where(n <= 0, 0, (tl.maximum(n, 0) + 2 * extent - 1) // (2 * extent))
    return tl.where(p <= 0, 0, tl.where(p >= extent, size, between))


@triton.jit
def _weight(o, p, extent, size):
    """The weight with which output pixel o reads pixel p of the crop, if it does."""
    unit = tl.zeros_like(p) + 2 * size
    beyond = _place(o, extent, size) - p * unit
    w = tl.div_rn(tl.where(beyond < 0, beyond + unit, beyond).to(tl.float32), unit.to(tl.float32))
    return tl.where(beyond < 0, w, 1.0 - w)


@triton.jit
def _resize_kernel(
    x_ptr,  # [samples, channels, in_height, in_width]
    y_ptr,  # [samples, channels, out_height, out_width], [n]
    top_ptr,  # [samples] int64, as left, height and width
    left_ptr,
    height_ptr,
    width_ptr,
    flip_ptr,  # [samples] bool
    n,
    channels,
    in_height,
    in_width,
    out_height,
    out_width,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, sample, c, y, x = _element(channels, out_height, out_width, n, LAST, BLOCK)
    valid = i < n
    top, height = _axis(top_ptr, height_ptr, sample, in_height)
    left, width = _axis(left_ptr, width_ptr, sample, in_width)
    flip = tl.load(flip_ptr + sample).to(tl.int1)
    first, second, right = _taps(tl.where(flip, out_width - 1 - x, x), width, out_width)
    upper, lower, down = _taps(y, height, out_height)
    first, second, upper, lower = left + first, left + second, top + upper, top + lower
    a = _pixel(x_ptr, sample, c, upper, first, valid, channels, in_height, in_width, LAST)
    b = _pixel(x_ptr, sample, c, upper, second, valid, channels, in_height, in_width, LAST)
    above = (1.0 - right) * a + right * b
    a = _pixel(x_ptr, sample, c, lower, first, valid, channels, in_height, in_width, LAST)
    b = _pixel(x_ptr, sample, c, lower, second, valid, channels, in_height, in_width, LAST)
    below = (1.0 - right) * a + right * b
    tl.store(y_ptr + i, ((1.0 - down) * above + down * below).to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _resize_backward_kernel(
    x_ptr,  # the gradient, [samples, channels, in_height, in_width]
    y_ptr,  # [samples, channels, out_height, out_width], [n]
    top_ptr,  # [samples] int64, as left, height and width
    left_ptr,
    height_ptr,
    width_ptr,
    flip_ptr,  # [samples] bool
    n,
    channels,
    in_height,
    in_width,
    out_height,
    out_width,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, sample, c, y, x = _element(channels, out_height, out_width, n, LAST, BLOCK)
    top, height = _axis(top_ptr, height_ptr, sample, out_height)
    left, width = _axis(left_ptr, width_ptr, sample, out_width)
    flip = tl.load(flip_ptr + sample).to(tl.int1)
    y, x = y - top, x - left
    inside = (i < n) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    row, rows = _first_at(y - 1, height, in_height), _first_at(y + 1, height, in_height)
    column, columns = _first_at(x - 1, width, in_width), _first_at(x + 1, width, in_width)
    # How many the element with the most of them reads; the others stop earlier.
    most_rows = tl.max(tl.where(inside, rows - row, 0), axis=0)
    most_columns = tl.max(tl.where(inside, columns - column, 0), axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(most_columns):
        o = column + k
        at = tl.where(flip, in_width - 1 - o, o)
        reads = inside & (o < columns)
        sum = tl.zeros([BLOCK], tl.float32)
        for j in range(most_rows):
            q = row + j
            here = reads & (q < rows)
            g = _pixel(x_ptr, sample, c, q, at, here, channels, in_height, in_width, LAST)
            sum = tl.where(here, sum + _weight(q, y, height, in_height) * g, sum)
        total = tl.where(reads, total + _weight(o, x, width, in_width) * sum, total)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=i < n)


def resize_crops(x, y, top, left, height, width, flip, adjoint, shape):
    """The resized crops, or the adjoint of a gradient x. Launches nothing for an empty y."""
    if shape.n == 0:
        return
    block = block_of(shape.n, _BLOCK_RESIZE)
    kernel = _resize_backward_kernel if adjoint else _resize_kernel
    kernel[(triton.cdiv(shape.n, block),)](
        *(x, y, top, left, height, width, flip),
        shape.n,
        *shape[1:6],
        LAST=shape.last,
        BLOCK=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
