"""qdrop and its backward in Triton. Contract: zsq_ext/ops/reference/qdrop.py.

Philox-4x32-10 is Triton's own; the tests hold it against published vectors, as they do kernels/philox.h.
"""

import triton
import triton.language as tl

from .block import block_of

# 1024 elements are 8 per thread at 4 warps.
_BLOCK = 1024
_WARPS = 4


@triton.jit
def draws(block, key_ptr):
    """The four words of elements 4 * block to 4 * block + 3; key_ptr is [2] int64, the key and the offset."""
    offset = tl.load(key_ptr + 1).to(tl.uint64, bitcast=True)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    upper = tl.zeros(block.shape, tl.uint64) + offset
    return tl.philox(
        tl.load(key_ptr),
        low,
        (block >> 32).to(tl.uint32),
        (upper & 0xFFFFFFFF).to(tl.uint32),
        (upper >> 32).to(tl.uint32),
    )


@triton.jit
def _qdrop_kernel(
    x_ptr,  # [n], as all others; the gradient in the backward
    x_hat_ptr,  # not read in the backward
    out_ptr,  # x where it is kept, else x_hat or 0
    rest_ptr,  # the backward's: 0 where out has the gradient, and the other way round
    key_ptr,  # [2] int64
    n,
    channels,  # channels last: what the memory is, [samples, places, channels]
    places,
    threshold,  # the probability times 2^24
    BACKWARD: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_REST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits before the first multiplication: tensors may exceed 2^31 elements.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    valid = i < n
    if LAST:
        # A channel's neighbours lie apart, so nobody shares a draw here.
        row = i // channels
        logical = ((row // places) * channels + i % channels) * places + row % places
        w0, w1, w2, w3 = draws(logical // 4, key_ptr)
        which = logical % 4
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    else:
        w0, w1, w2, w3 = draws(first // 4 + tl.arange(0, BLOCK // 4), key_ptr)
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    keep = (word >> 8).to(tl.int32) < threshold
    x = tl.load(x_ptr + i, mask=valid, other=0.0)
    if BACKWARD:
        zero = tl.zeros(x.shape, x.dtype)
        if HAS_OUT:
            tl.store(out_ptr + i, tl.where(keep, x, zero), mask=valid)
        if HAS_REST:
            tl.store(rest_ptr + i, tl.where(keep, zero, x), mask=valid)
    else:
        tl.store(out_ptr + i, tl.where(keep, x, tl.load(x_hat_ptr + i, mask=valid, other=0.0)), mask=valid)


def qdrop(x, x_hat, out, rest, key, threshold, n, channels, places, last):
    """The forward where x_hat is given; else x is the gradient. Launches nothing for n = 0."""
    if n == 0:
        return
    block = block_of(n, _BLOCK)
    _qdrop_kernel[(triton.cdiv(n, block),)](
        *(x if t is None else t for t in (x, x_hat, out, rest)),
        key,
        n,
        channels,
        places,
        threshold,
        BACKWARD=x_hat is None,
        HAS_OUT=out is not None,
        HAS_REST=rest is not None,
        LAST=last,
        BLOCK=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
