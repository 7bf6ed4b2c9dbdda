"""adaround and its backward in Triton, one weight per launch. Contract: zsq_ext/ops/reference/adaround.py."""

from typing import NamedTuple

import triton
import triton.language as tl

from .arith import clamp
from .elementary import exp_of, power

# 1024 elements are 8 per thread at 4 warps. The interpreter pays per program, not per element.
_TILE = 1024
_TILE_INTERPRETED = 1 << 16
_WARPS = 4


class Cut(NamedTuple):
    """How a weight [channels, inner] is cut: a program takes R rows and L columns of them."""

    R: int
    L: int
    columns: int  # programs side by side; as many partial sums has a row
    grid: tuple[int]


def cut_of(channels, inner):
    """Depends on sizes alone, and with it what is summed in which order."""
    L = min(1024, triton.next_power_of_2(max(inner, 1)))
    R = _TILE // L
    if triton.knobs.runtime.interpret:
        R = min(_TILE_INTERPRETED // L, triton.next_power_of_2(max(channels, 1)))
    columns = triton.cdiv(inner, L)
    return Cut(R, L, columns, (triton.cdiv(channels, R) * columns,))


@triton.jit
def _soft(v):
    """(sigmoid, stretched, h). Beyond 2.4 h is clamped anyway, so the exponential need not go far."""
    one = tl.full(v.shape, 1.0, tl.float32)
    s = tl.div_rn(one, 1.0 + exp_of(clamp(-v, -8.0, 8.0)))
    stretched = s * 1.2 - 0.1
    return s, stretched, clamp(stretched, 0.0, 1.0)


@triton.jit
def _adaround_kernel(
    grad_ptr,  # [channels, inner] in v's dtype, as out; not read in the forward
    v_ptr,
    base_ptr,  # [channels, inner] int16
    out_ptr,
    scale_ptr,  # [channels] float32
    zero_point_ptr,  # [channels] int32
    beta_ptr,  # [] float32
    grad_reg_ptr,  # [] float32
    sums_ptr,  # [channels, columns] float32: of the regulariser, or of what goes into dscale
    channels,
    inner,
    columns,
    qmin,  # float32, like every code here
    qmax,
    BACKWARD: tl.constexpr,
    HARD: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
):
    # 64 bits before the first multiplication: tensors may exceed 2^31 elements.
    column = tl.program_id(0).to(tl.int64) % columns
    c = (tl.program_id(0).to(tl.int64) // columns * R + tl.arange(0, R))[:, None]
    col = (column * L + tl.arange(0, L))[None, :]
    real = c < channels
    valid = real & (col < inner)
    i = c * inner + col
    scale = tl.load(scale_ptr + c, mask=real, other=1.0)
    zero_point = tl.load(zero_point_ptr + c, mask=real, other=0).to(tl.float32)
    v = tl.load(v_ptr + i, mask=valid, other=0.0).to(tl.float32)
    base = tl.load(base_ptr + i, mask=valid, other=0).to(tl.float32)

    if HARD:
        h = tl.where(v >= 0.0, 1.0, tl.where(v < 0.0, 0.0, v))
    else:
        s, stretched, h = _soft(v)
    code = base + h
    steps = clamp(code, qmin, qmax) - zero_point
    if HAS_BETA:
        beta = tl.load(beta_ptr)
        u = 2.0 * h - 1.0
        p = power(tl.abs(u), beta - 1.0)
    if BACKWARD:
        grad = tl.load(grad_ptr + i, mask=valid, other=0.0).to(tl.float32)
        dh = tl.where((code >= qmin) & (code <= qmax), grad * scale, 0.0)
        if HAS_BETA:
            weight = tl.load(grad_reg_ptr) * (2.0 * beta)
            dh = dh - weight * tl.where(u < 0.0, -p, tl.where(u > 0.0, p, 0.0))
        slope = 1.2 * (s * (1.0 - s))
        out = tl.where((stretched >= 0.0) & (stretched <= 1.0), dh * slope, 0.0)
        term = grad * steps
    else:
        out = steps * scale
        if HAS_BETA:
            term = 1.0 - p * tl.abs(u)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=valid)
    if HAS_SUMS:
        sums = tl.sum(tl.where(valid, term, 0.0), 1, keep_dims=True)
        tl.store(sums_ptr + c * columns + column, sums, mask=real)


def adaround(cut, grad, v, base, out, scale, zero_point, beta, grad_reg, sums, channels, inner, qmin, qmax, hard):
    """Fills out and, where they are not None, the partial sums: of the regulariser where grad is None, else for dscale.

    Launches nothing without elements.
    """
    if 0 in cut.grid:
        return
    absent = (v if t is None else t for t in (beta, grad_reg, sums))
    _adaround_kernel[cut.grid](
        v if grad is None else grad,
        v,
        base,
        out,
        scale,
        zero_point,
        *absent,
        channels,
        inner,
        cut.columns,
        float(qmin),
        float(qmax),
        BACKWARD=grad is not None,
        HARD=hard,
        HAS_BETA=beta is not None,
        HAS_SUMS=sums is not None,
        R=cut.R,
        L=cut.L,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
