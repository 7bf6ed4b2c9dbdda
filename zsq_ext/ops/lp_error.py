"""How far quantizers are from a tensor: what a search for a range minimises, for all its candidates in one read."""

import torch
from torch import Tensor

from zsq_ext.ops import backend
from zsq_ext.ops import check as checks

# Beyond it a float's rounding is all that a power would show.
LARGEST_POWER = 16

_op = backend.define(
    "lp_error(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, float p, int? axis=None) -> Tensor",
    lambda x, scale, *rest: torch.empty_like(scale, dtype=torch.float64, memory_format=torch.contiguous_format),
)


def lp_error(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    p: float = 2.4,
    axis: int | None = None,
) -> Tensor:
    """The Lp error of several quantizers, summed over a tensor or over each of its channels, in one read.

        error[c, k] = sum over channel c of |x - fake_quant(x, scale[c, k], zero_point[c, k], qmin, qmax)|^p

    x_hat and the difference are in float32 (float64 for float64 x), each operation rounded once; the difference's power
    is within (6 + 3 p) 2^-24 of itself, and exact but for its rounding for p = 2. No more than 16 powers are added
    before the sum goes on in float64, so it is within (22 + 3 p) 2^-24 of itself, in an order that depends on sizes and
    memory format alone. A power below 2^-115 may count as 0, and one beyond 2^115 as infinity. NaN in x makes its
    channel's errors NaN, an infinity infinite. No gradient.

    Args:
        x: any shape and strides; float32, float16, bfloat16, or float64 (on the reference and cpu backends).
        scale: the steps, in units of x, > 0: (C, K) with C = x.shape[axis] and K quantizers of each channel, or (1, K)
            for the whole tensor; float32, or float64 where x is.
        zero_point: the codes of 0, of scale's shape, int32.
        qmin, qmax: the codes' range, inclusive.
        p: the exponent, above 0 and at most 16; 2.4 is what BRECQ and Genie use.
        axis: the channels' dimension; None for the whole tensor.

    Returns:
        A tensor of scale's shape, float64.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, range, axis or exponent is not as above.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> x = torch.tensor([0.1, 0.5, 1.0])
        >>> scale, zero_point = torch.tensor([[0.5, 0.25]]), torch.zeros(1, 2, dtype=torch.int32)
        >>> lp_error(x, scale, zero_point, 0, 3, p=2).float()  # the second ends at 0.75
        tensor([[0.0100, 0.0725]])

    Source: Y. Li et al., BRECQ (arXiv 2102.05426), whose released code tries 80 ranges; that of Genie (arXiv
    2212.04780) tries 100.
    """
    compute = checks.compute_dtype("lp_error", "x", x)
    checks.code_range("lp_error", qmin, qmax)
    checks.number("lp_error", "p", p)
    if not 0 < p <= LARGEST_POWER:
        raise ValueError(f"lp_error: p must be above 0 and at most {LARGEST_POWER}, got {p}")
    axis = checks.dimension("lp_error", "x", x, axis)
    channels = 1 if axis is None else x.size(axis)
    checks.tensor("lp_error", "scale", scale)
    shape = scale.shape
    if scale.dim() != 2 or scale.size(0) != channels:
        raise ValueError(f"lp_error: scale must have shape ({channels}, K), got {tuple(shape)}")
    of = f" for {x.dtype} x"
    checks.beside("lp_error", "scale", scale, compute, shape, x.device, of=of)
    checks.beside("lp_error", "zero_point", zero_point, torch.int32, shape, x.device, of=of, called="scale's shape")
    return _op(x.detach(), scale.detach().contiguous(), zero_point.contiguous(), qmin, qmax, float(p), axis)
