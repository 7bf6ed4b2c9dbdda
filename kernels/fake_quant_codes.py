"""The two halves of fake_quant in Triton. Contract: zsq_ext/ops/reference/fake_quant.py."""

import triton
import triton.language as tl

from .arith import clamp, round_half_even
from .block import block_of

# 1024 elements are 8 per thread at 4 warps, of which a thread reads or writes 32 bytes of float32.
_BLOCK = 1024
_WARPS = 4


@triton.jit
def _codes_kernel(
    x_ptr,  # [n] values, or codes where BACK
    out_ptr,  # [n] the other
    scale_ptr,  # [channels] float32
    zero_point_ptr,  # [channels] int32
    n,
    channels,  # element i belongs to channel (i // inner) % channels
    inner,
    qmin,  # float32, like every code here
    qmax,
    BACK: tl.constexpr,
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

    x = tl.load(x_ptr + i, mask=valid, other=0).to(tl.float32)
    if BACK:
        out = (x - zero_point) * scale
    else:
        code = clamp(round_half_even(tl.div_rn(x, scale)) + zero_point, qmin, qmax)
        # An integer has no NaN, and what a conversion makes of one differs from machine to machine.
        out = tl.where(code == code, code, clamp(zero_point, qmin, qmax)).to(tl.int32)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=valid)


def fake_quant_codes(x, out, scale, zero_point, n, channels, inner, qmin, qmax, back):
    """Values to codes, or where `back` codes to values. Launches nothing for n = 0."""
    if n == 0:
        return
    block = block_of(n, _BLOCK)
    _codes_kernel[(triton.cdiv(n, block),)](
        x,
        out,
        scale,
        zero_point,
        n,
        channels,
        inner,
        float(qmin),
        float(qmax),
        BACK=back,
        PER_CHANNEL=channels > 1,
        BLOCK=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
