"""fake_quant and its backward in Triton. Contract: zsq_ext/ops/reference.py."""

import triton
import triton.language as tl

from .arith import clamp, round_half_even

# 1024 elements are 8 per thread at 4 warps: one 16-byte access in 16-bit types, two in float32.
_BLOCK = 1024
_WARPS = 4
# The interpreter pays per program, not per element.
_BLOCK_INTERPRETED = 1 << 16


@triton.jit
def _fake_quant_kernel(
    grad_ptr,  # [n] in x's dtype; not read in the forward
    x_ptr,  # [n]
    out_ptr,  # [n]
    scale_ptr,  # [channels] float32
    zero_point_ptr,  # [channels] int32
    n,
    channels,  # element i belongs to channel (i // inner) % channels
    inner,
    qmin,  # float32, like every code here
    qmax,
    BACKWARD: tl.constexpr,
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


def fake_quant(grad, x, out, scale, zero_point, n, channels, inner, qmin, qmax):
    """The forward where grad is None, else the straight-through gradient. Launches nothing for n = 0."""
    if n == 0:
        return
    block = _BLOCK_INTERPRETED if triton.knobs.runtime.interpret else _BLOCK
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
        PER_CHANNEL=channels > 1,
        BLOCK=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
