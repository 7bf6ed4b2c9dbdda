"""From values to a quantizer's range, and from a range to (scale, zero_point).

Everything here is computed on the tensor's own device without reading a value back to the host, and no
gradient flows into a range. Per-tensor results have shape (1,), per-channel results (C,).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from zsq_ext.ops import channel_range, lp_error
from zsq_ext.ops import check as checks
from zsq_ext.ops.lp_error import LARGEST_POWER

SMALLEST_RANGE = 1e-8
"""A narrower range counts as this wide, in units of x, so that a constant tensor has a scale."""

FINEST_SCALE = 2.0**-23
"""Smallest scale relative to the largest bound, fp32's own resolution: below it the zero-point would no longer be
exact in fp32."""

CLIP_RATIOS = tuple(i / 100 for i in range(100, 0, -1))
"""Shrink factors tried by `lp_search`: 1.00, 0.99, ..., 0.01, as Genie-M does. BRECQ stops after the first 80."""


def affine_params(
    lo: Tensor, hi: Tensor, bits: int, *, signed: bool, include_zero: bool, symmetric: bool = False
) -> tuple[Tensor, Tensor, int, int]:
    """Scale and zero-point of the uniform asymmetric quantizer whose grid spans [lo, hi].

        scale      = max(hi - lo, 1e-8) / (2^bits - 1)
        zero_point = qmin - round_half_even(lo / scale)

    Real zero is always a grid point. With `include_zero=False` it may lie outside [qmin, qmax], as the published weight
    quantizers have it. A channel that is constant and far from zero would need a zero-point beyond int32; its scale is
    therefore at least 2^-23 of its largest bound, which still reproduces the constant.

    Values are not looked at, which would wait for the device. An end that is NaN or infinite makes every value of its
    channel NaN, so that no valid code hides it; a zero_point that has no value then is 0. What calibrates looks once,
    when it is done.

    Args:
        lo, hi: range ends in units of x, lo <= hi; 0-d, (1,) or (C,), floating point.
        bits: code width, 2 to 8.
        signed: codes in [-2^(bits-1), 2^(bits-1) - 1] instead of [0, 2^bits - 1].
        include_zero: widen the range to lo <= 0 <= hi first. Activations need it: padding must be exact.
        symmetric: widen the range to [-m, m] with m = max(|lo|, |hi|) first. Then zero_point is qmin + 2^(bits-1), so 0
            for signed codes, which is the formula's tie.

    Returns:
        scale (fp32, or fp64 for fp64 ranges), zero_point (int32), both (1,) or (C,), and the ints qmin, qmax.

    Raises:
        ValueError: bits out of range, or shapes that differ or have more than one axis.
        TypeError: lo or hi not floating point.

    Example:
        >>> lo, hi = torch.tensor([-1.0]), torch.tensor([2.0])
        >>> affine_params(lo, hi, 2, signed=False, include_zero=True)
        (tensor([1.]), tensor([1], dtype=torch.int32), 0, 3)

    Source: the min-max quantizer of ZeroQ, GDFQ, IntraQ, HAST and SynQ, with the scale written as a step.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"affine_params: bits must be an integer from 2 to 8, got {checks.shown(bits)}")
    for name, value in (("signed", signed), ("include_zero", include_zero), ("symmetric", symmetric)):
        checks.flag("affine_params", name, value)
    lo, hi = (_wide(t, "affine_params", name) for t, name in ((lo, "lo"), (hi, "hi")))
    if lo.shape != hi.shape or lo.ndim > 1:
        raise ValueError(
            f"affine_params: lo and hi must have one common shape, () or (C,), got {tuple(lo.shape)}, {tuple(hi.shape)}"
        )
    lo, hi = lo.reshape(-1), hi.reshape(-1)
    qmin = -(2 ** (bits - 1)) if signed else 0
    qmax = qmin + 2**bits - 1
    if include_zero:
        lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    if symmetric:
        hi = torch.maximum(lo.abs(), hi.abs())
        lo = -hi
    width = (hi - lo).clamp_min(SMALLEST_RANGE)
    # a tensor divisor, because CUDA turns division by a Python number into a multiplication by its inverse
    scale = width / torch.full_like(width, qmax - qmin)
    scale = torch.maximum(scale, torch.maximum(lo.abs(), hi.abs()) * FINEST_SCALE)
    # a quotient of a symmetric range may come out just beside the tie
    steps = torch.full_like(lo, -(2 ** (bits - 1))) if symmetric else torch.round(lo / scale)
    zero_point = (qmin - steps).nan_to_num(0).to(torch.int32)
    return scale, zero_point, qmin, qmax


def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of a tensor, or of each channel along `axis`.

    Args:
        x: values, any non-empty shape, floating point. NaN propagates.
        axis: the channel axis; None takes the whole tensor.

    Returns:
        (lo, hi), each (1,) or (C,), detached, fp32 (fp64 for fp64 x).

    Raises:
        ValueError: x empty, or axis not an axis of x.
        TypeError: x not floating point.
    """
    _check_values(x, axis, "min_max")
    return channel_range(x, axis)


def abs_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The range as wide on either side of 0 that holds a tensor, or each channel along `axis`.

        (-m, m) with m = max |x|

    Args:
        x, axis: as for `min_max`.

    Returns:
        (lo, hi), each (1,) or (C,), detached, fp32 (fp64 for fp64 x).

    Raises:
        ValueError: x empty, or axis not an axis of x.
        TypeError: x not floating point.

    Example:
        >>> lo, hi = abs_max(torch.tensor([[-1.5, 0.5], [0.25, 0.75]]), axis=0)
        >>> affine_params(lo, hi, 2, signed=True, include_zero=True, symmetric=True)
        (tensor([1.0000, 0.5000]), tensor([0, 0], dtype=torch.int32), -2, 1)
    """
    _check_values(x, axis, "abs_max")
    lo, hi = channel_range(x, axis)
    m = torch.maximum(lo.abs(), hi.abs())
    return -m, m


def percentile(x: Tensor, percent: float = 99.99, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The values below and above which the outermost (100 - percent) % of x lie, at each end.

    Nearest rank without interpolation: of n sorted values, number ceil(n * percent / 100) from either end. So both
    bounds are values of x, and percent=100 is `min_max`.

    Args:
        x: values, any non-empty shape, floating point.
        percent: in (50, 100].
        axis: the channel axis; None takes the whole tensor.

    Returns:
        (lo, hi), each (1,) or (C,), detached, fp32 (fp64 for fp64 x).

    Raises:
        ValueError: percent out of range, x empty, or axis not an axis of x.
        TypeError: x not floating point.
    """
    checks.number("percentile", "percent", percent)
    if not 50 < percent <= 100:
        raise ValueError(f"percentile: percent must be above 50 and at most 100, got {percent}")
    rows = _rows(x, axis, "percentile")
    n = rows.shape[1]
    rank = min(n, max(1, math.ceil(n * percent / 100)))
    lo, hi = rows.kthvalue(n + 1 - rank, dim=1).values, rows.kthvalue(rank, dim=1).values
    return _wide(lo, "percentile", "x"), _wide(hi, "percentile", "x")


def lp_search(
    x: Tensor,
    bits: int,
    p: float = 2.4,
    *,
    axis: int | None = None,
    signed: bool,
    include_zero: bool,
    symmetric: bool = False,
    start: tuple[Tensor, Tensor] | None = None,
    ratios: Iterable[float] = CLIP_RATIOS,
) -> tuple[Tensor, Tensor]:
    """The shrunken range that quantizes x with the smallest Lp error.

        r* = argmin_r  mean |x - Q_{r lo, r hi}(x)|^p,     result (r* lo, r* hi)

    Where two ratios tie, the earlier one (the wider range) is kept; the unshrunken one where no error is finite. The
    errors are those of `zsq_ext.ops.lp_error`, which tries all ratios in one read of x and says how exact they are.

    Args:
        x: values, any non-empty shape, floating point.
        bits, signed, include_zero, symmetric: the quantizer, as for `affine_params`.
        p: the norm's exponent, above 0 and at most 16; 2 is the mean squared error, 2.4 what BRECQ and Genie use.
        axis: the channel axis, one ratio per channel; None takes the whole tensor.
        start: (lo, hi), (1,) or (C,), to shrink instead of the extremes of x.
        ratios: the factors r to try, in order.

    Returns:
        (lo, hi), each (1,) or (C,), detached, for `affine_params`.

    Raises:
        ValueError: p out of range, no ratios, x empty, bits or axis out of range.
        TypeError: x not floating point.

    Source: BRECQ (arXiv 2102.05426) and Genie (arXiv 2212.04780), released code.
    """
    checks.number("lp_search", "p", p)
    if not 0 < p <= LARGEST_POWER:
        raise ValueError(f"lp_search: p must be above 0 and at most {LARGEST_POWER}, got {p}")
    ratios = _checked_ratios(ratios)
    _check_values(x, axis, "lp_search")
    if start is not None and not (isinstance(start, (tuple, list)) and len(start) == 2):
        raise TypeError(f"lp_search: start must be None or a pair (lo, hi), got {checks.shown(start)}")
    ends = channel_range(x, axis) if start is None else start
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = 1 if axis is None else x.shape[axis]
    lo, hi = (_wide(t, "lp_search", "start").to(dtype).reshape(-1).expand(channels)[:, None] for t in ends)
    factors = torch.tensor(ratios, dtype=dtype).to(lo.device, non_blocking=True)  # does not wait for the device
    lows, highs = lo * factors, hi * factors  # (C, ratios)
    scale, zero_point, qmin, qmax = affine_params(
        lows.flatten(), highs.flatten(), bits, signed=signed, include_zero=include_zero, symmetric=symmetric
    )
    error = lp_error(x, scale.view_as(lows), zero_point.view_as(lows), qmin, qmax, p, axis)
    least, best = torch.where(error.isnan(), math.inf, error).min(1, keepdim=True)
    lo, hi = (torch.where(least.isfinite(), t.gather(1, best), end) for t, end in ((lows, lo), (highs, hi)))
    return lo[:, 0], hi[:, 0]


def ema_update(
    lo_raw: Tensor, hi_raw: Tensor, step: Tensor, batch_lo: Tensor, batch_hi: Tensor, beta: float = 0.9
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a moving average of ranges; `ema_value` reads the range from the state.

        r_t = beta r_{t-1} + (1 - beta) x_t,     r_0 = 0

    Args:
        lo_raw, hi_raw: the averages so far, zero at first; any shape, floating point.
        step: number of updates so far, 0-d int64, zero at first.
        batch_lo, batch_hi: the batch's extremes x_t, broadcastable to the averages.
        beta: memory, in [0, 1).

    Returns:
        The new (lo_raw, hi_raw, step). New tensors: a module copies them into its buffers.

    Example:
        >>> state = torch.zeros(1), torch.zeros(1), torch.zeros((), dtype=torch.int64)
        >>> state = ema_update(*state, torch.tensor([-1.0]), torch.tensor([2.0]), 0.5)
        >>> ema_value(*state, 0.5)
        (tensor([-1.]), tensor([2.]))
    """
    _check_memory(beta)
    return lo_raw + (1 - beta) * (batch_lo - lo_raw), hi_raw + (1 - beta) * (batch_hi - hi_raw), step + 1


def ema_value(lo_raw: Tensor, hi_raw: Tensor, step: Tensor, beta: float = 0.9) -> tuple[Tensor, Tensor]:
    """The bias-corrected range of a state of `ema_update`.

        value_t = r_t / (1 - beta^t)

    Args:
        lo_raw, hi_raw, step, beta: as for `ema_update`.

    Returns:
        (lo, hi) of the averages' shape; zeros before the first update.

    Source: Adam's bias correction; what the GDFQ lineage meant (`ema_update_legacy` is what it does).
    """
    correction = _bias_correction(step, beta, lo_raw.dtype)
    return lo_raw / correction, hi_raw / correction


def ema_update_legacy(
    lo: Tensor, hi: Tensor, step: Tensor, batch_lo: Tensor, batch_hi: Tensor, beta: float = 0.9
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the released range recursion, which feeds the corrected value back.

        m_t = (beta m_{t-1} + (1 - beta) x_t) / (1 - beta^t),     m_0 = 0

    The correction compounds: at beta = 0.9 a constant signal of 1 reads 3945 at step 21 and is back within 1e-4 only
    after 200 steps. For parity with published runs of at least that many steps; m_t is the range itself.

    Args:
        lo, hi: the range so far, zero at first; any shape, floating point.
        step, batch_lo, batch_hi, beta: as for `ema_update`.

    Returns:
        The new (lo, hi, step).

    Source: released code of GDFQ, IntraQ, HAST and SynQ.
    """
    step = step + 1
    correction = _bias_correction(step, beta, lo.dtype)
    lo = (beta * lo + (1 - beta) * batch_lo) / correction
    hi = (beta * hi + (1 - beta) * batch_hi) / correction
    return lo, hi, step


def _check_memory(beta: float) -> None:
    checks.number("ema", "beta", beta)
    if not 0 <= beta < 1:
        raise ValueError(f"ema: beta must be in [0, 1), got {beta}")


def _bias_correction(step: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """1 - beta^t, with t at least 1 so that an unused state reads zero instead of NaN."""
    _check_memory(beta)
    if beta == 0:
        return torch.ones_like(step, dtype=dtype)
    # expm1 keeps all digits at small t, where 1 - beta^t cancels
    return -torch.expm1(step.clamp_min(1).to(dtype) * math.log(beta))


def _checked_ratios(ratios: Iterable[float]) -> tuple[float, ...]:
    if not isinstance(ratios, Iterable) or isinstance(ratios, (str, Tensor)):
        raise TypeError(f"lp_search: ratios must be several numbers, got {checks.shown(ratios)}")
    ratios = tuple(ratios)
    if not ratios:
        raise ValueError("lp_search: ratios must name at least one factor, got none")
    for i, ratio in enumerate(ratios):
        checks.number("lp_search", "ratios", ratio, f"[{i}]")
        if not 0 < ratio < math.inf:
            raise ValueError(f"lp_search: ratios[{i}] must be positive and finite, got {ratio}")
    return ratios


def _check_values(x: Tensor, axis: int | None, function: str) -> None:
    checks.tensor(function, "x", x)
    if not x.is_floating_point():
        raise TypeError(f"{function}: x must be floating point, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"{function}: x must not be empty, got shape {tuple(x.shape)}")
    checks.dimension(function, "x", x, axis)


def _rows(x: Tensor, axis: int | None, function: str) -> Tensor:
    """x as (C, values) with one row per channel, or (1, values) for the whole tensor."""
    _check_values(x, axis, function)
    x = x.detach()
    if axis is None:
        return x.reshape(1, -1)
    return x.movedim(axis, 0).flatten(1) if x.ndim > 1 else x[:, None]


def _wide(x: Tensor, function: str, name: str) -> Tensor:
    """x detached in fp32, or in fp64 if it is that already."""
    checks.tensor(function, name, x)
    if not x.is_floating_point():
        raise TypeError(f"{function}: {name} must be floating point, got {x.dtype}")
    return x.detach() if x.dtype == torch.float64 else x.detach().float()
