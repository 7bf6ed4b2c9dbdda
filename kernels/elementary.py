"""elementary.h for Triton, operation by operation: the same bits. Launched with enable_fp_fusion=False."""

import triton
import triton.language as tl


@triton.jit
def exp_of(t):
    shifted = t * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (t - n * 0.693359375) - n * -2.12194440e-4
    p = tl.full(t.shape, 1.9875691500e-4, tl.float32)
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = (p * (r * r) + r) + 1.0
    power = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return p * power.to(tl.float32, bitcast=True)


@triton.jit
def log_correction(f):
    p = tl.full(f.shape, 7.0376836292e-2, tl.float32)
    p = p * f + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    return (p * f) * (f * f)


@triton.jit
def log_of(a):
    offset = a.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (offset >> 23).to(tl.float32)
    f = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    p = log_correction(f) + e * -2.12194440e-4
    p = p - z * 0.5
    return (f + p) + e * 0.693359375


@triton.jit
def power(a, y):
    t = y * log_of(a)
    return exp_of(tl.where(t < -87.0, -87.0, t))
