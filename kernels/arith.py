"""Arithmetic for Triton kernels that rounds once per operation and keeps NaN, as arith.h does for CUDA.

Kernels that use it are launched with enable_fp_fusion=False, so that nothing is contracted.
"""

import triton
import triton.language as tl

# From here on every float32 is an integer.
_INTEGERS = tl.constexpr(8388608.0)


@triton.jit
def round_half_even(v):
    # Adding 2^23 leaves no bits for a fraction, and the hardware rounds what falls off half to even. libdevice's
    # rint would do, but the interpreter has no libdevice.
    a = tl.abs(v)
    r = tl.where(a < _INTEGERS, (a + _INTEGERS) - _INTEGERS, a)
    return tl.where(v < 0, -r, r)


@triton.jit
def clamp(v, lo, hi):
    # NaN fails both comparisons and stays NaN; tl.minimum and tl.maximum would turn it into a bound.
    return tl.where(v < lo, lo, tl.where(v > hi, hi, v))


@triton.jit
def clip(v, lo, hi):
    # As clamp, but one bound after the other: where lo > hi, hi holds.
    v = tl.where(v < lo, lo, v)
    return tl.where(v > hi, hi, v)
