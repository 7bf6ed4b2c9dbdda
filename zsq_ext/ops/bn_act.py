"""Batch norm in eval mode, residual, activation, quantizer and the statistics of what entered, in one pass each way."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import backend, reference
from zsq_ext.ops import check as checks
from zsq_ext.ops.bn_act_spec import LAYER, Found, Grads, Layer, Needs, Norm, Outputs, Quant
from zsq_ext.ops.bn_act_sums import STATS, check_channels, check_eps, check_input, fake_sums, pair, wants_undefined
from zsq_ext.ops.layout import channels_last, empty_arranged, rows_of
from zsq_ext.ops.once import once

ACTS = ("none", "relu", "relu6", "silu", "hardswish")
QUANT_GRADS = ("ste_clip", "ste")


def _gathered(u: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return u, residual, Layer.of(*rest[3:]), Outputs(*rest[:3])


def _gathered_backward(u: Tensor, residual: Tensor | None, mask: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return u, residual, mask, Grads(*rest[:3]), Layer.of(*rest[6:]), Needs(*rest[3:6])


def _fake(u: Tensor, *rest: Any) -> Found:
    _, _, layer, wanted = _gathered(u, *rest)
    mean, (rows, length) = layer.norm.mean, rows_of(u)
    mask = u.new_empty((rows, (length + 7) // 8) if wanted.mask else 0, dtype=torch.uint8)
    ends = mean.new_empty((2, u.size(1)) if wanted.extremes else 0)
    return empty_arranged(u, channels_last(u)), *fake_sums(u, mean, wanted.stats), mask, ends


def _fake_backward(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, grads, layer, needs = _gathered_backward(u, *rest)
    last, has_y, mean = channels_last(u), grads.y is not None, layer.norm.mean
    du = empty_arranged(u, last) if needs.u else u.new_empty(0)
    dr = empty_arranged(u, last) if needs.residual and has_y else u.new_empty(0)
    affine = mean.shape if needs.affine and has_y else (0,)
    return du, dr, mean.new_empty(affine), mean.new_empty(affine)


_op = backend.define(
    f"bn_act(Tensor u, Tensor? residual, str? stats, bool save_mask, bool extremes, {LAYER}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    gathered=_gathered,
)
_op_backward = backend.define(
    "bn_act_backward(Tensor u, Tensor? residual, Tensor? mask, Tensor? grad_y, Tensor? grad_s1, Tensor? grad_s2, "
    f"bool need_u, bool need_residual, bool need_affine, {LAYER}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    gathered=_gathered_backward,
)


def _forward(u: Tensor, residual: Tensor | None, wanted: Outputs, layer: Layer) -> Found:
    if wanted.stats is None and not wanted.extremes and backend.decomposes():
        return reference.bn_act(u, residual, layer, wanted)
    return _op(u, residual, *wanted, *layer.flat)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend.decomposes():
        u, residual, mask, grads, layer, needs = _gathered_backward(*args)
        if grads.s1 is None and not needs.affine:  # no sums, neither of u nor of the gradient
            return reference.bn_act_backward(u, residual, mask, grads, layer, needs)
    return _op_backward(*args)


class _BnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, residual: Tensor | None, stats: str | None, extremes: bool, *flat: Any
    ) -> tuple[Tensor, ...]:
        wants_undefined(ctx)
        layer = Layer.of(*flat)
        # Without a residual everything is recomputed from u. With one, a clip leaves a bit per element behind; a smooth
        # activation needs u and the residual again, and keeping the residual costs nothing where it is alive anyway,
        # as the input of the convolutions beside the shortcut is, while what enters the activation never is.
        save_mask = residual is not None and layer.clips
        y, s1, s2, mask, ends = _forward(u, residual, Outputs(stats, save_mask, extremes), layer)
        kept = residual if layer.act not in ("none", "relu", "relu6") else None
        mean, var, gamma, beta, eps, act, scale, zero_point, *rest = flat
        ctx.save_for_backward(u, kept, mask if save_mask else None, mean, var, gamma, beta, scale, zero_point)
        ctx.rest = eps, act, rest, stats
        ctx.mark_non_differentiable(ends)
        return y, s1, s2, ends

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *grad_rest: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # checkpointing lets them be asked for once
        u, residual, mask, *norm, scale, zero_point = saved
        eps, act, rest, stats = ctx.rest
        need_u, need_residual, _, _, _, _, need_gamma, need_beta, *others = ctx.needs_input_grad
        grads = grad_y, *((None, None) if stats is None else pair(*grad_rest[:2]))
        du = dr = dgamma = dbeta = None
        if grad_y is not None or grads[1] is not None:
            passed = need_residual and mask is None and act == "none"  # what passes everywhere needs no writing again
            needs = need_u, need_residual and not passed, need_gamma or need_beta
            args = u, residual, mask, *grads, *needs, *norm, eps, act, scale, zero_point, *rest
            found = once("bn_act", lambda: _backward(*args), *grads, *saved)
            du = found[0] if need_u else None
            if grad_y is not None:
                dr = grad_y if passed else found[1] if need_residual else None
                dgamma, dbeta = found[2] if need_gamma else None, found[3] if need_beta else None
        return du, dr, None, None, None, None, dgamma, dbeta, *[None] * len(others)


def _checked_quant(quant: tuple[Tensor, Tensor, int, int] | None, grad: str, u: Tensor) -> Quant | None:
    if not isinstance(grad, str) or grad not in QUANT_GRADS:
        raise ValueError(
            f"bn_act: quant_grad must be one of {', '.join(QUANT_GRADS)}, got {checks.shown(grad)}; a step that learns "
            "(lsq) needs fake_quant behind bn_act"
        )
    if quant is None:
        return None
    if not isinstance(quant, tuple) or len(quant) != 4:
        got = f"{len(quant)} values" if isinstance(quant, tuple) else type(quant).__name__
        raise TypeError(f"bn_act: quant must be None or a tuple (scale, zero_point, qmin, qmax), got {got}")
    scale, zero_point, qmin, qmax = quant
    checks.code_range("bn_act", qmin, qmax, names=("quant's qmin", "quant's qmax"))
    called = "u", "quant's scale", "quant's zero_point"
    scale, zero_point = checks.grid("bn_act", u, scale, zero_point, 1, u.dtype, called=called)
    return Quant(scale.detach(), zero_point, qmin, qmax, grad == "ste_clip")


def bn_act(
    u: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    act: str = "none",
    quant: tuple[Tensor, Tensor, int, int] | None = None,
    quant_grad: str = "ste_clip",
    stats: str | None = None,
    extremes: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Batch norm in eval mode, a shortcut, an activation, a quantizer; on request the statistics of what entered.

        inv = 1 / sqrt(var + eps),     a = gamma * inv,     b = beta - mean * a
        v = act(a * u + b + residual),     y = quant(v)
        S1 = sum(u - mean),     S2 = sum((u - mean)^2),     lo = min v,     hi = max v

    Computed in float32 (float64 for float64 u), each operation rounded once and in the order written, the result
    rounded once to u's dtype. NaN stays NaN. Every backend gives the same bits of y, but for the exponential of silu,
    which may differ by a few units in the last place; sums are taken in fixed chunks, so a backend repeats its own
    bits, on any number of threads. Sums shifted by the stored mean keep the variance's digits, and add across
    batches: `statistics_of` reads mean and variance off them.

    The gradient, in one pass for any loss on y, S1 and S2, with g the gradient before the activation:

        du = a * g + 2 gS2 (u - mean) + gS1,     dresidual = g,     dbeta = sum g,     dgamma = sum g (u - mean) * inv

    relu and relu6 pass it strictly inside their range. The quantizer's step gets none, none flows through
    lo and hi, and there is no second derivative. What enters the quantizer is rounded to u's dtype, so values and
    gradients have the bits of `fake_quant` behind `bn_act`, and lo and hi, with or without it, those of
    `channel_range(v, axis=1)`: NaN makes both ends of its channel NaN, and a zero is +0.

    Args:
        u: (N, C, ...), any strides; float32, float16, bfloat16, or float64 (on the reference and cpu backends).
        mean, var: the stored statistics, (C,); float32, or float64 where u is. Constants: one that requires a gradient
            is refused where gradients are taken.
        gamma, beta: the affine part, (C,), as mean; None for 1 and for 0.
        eps: added to var, >= 0.
        residual: added before the activation; shape, dtype and device of u.
        act: "none", "relu", "relu6", "silu": v / (1 + exp(-v)), or "hardswish": v * clamp(v + 3, 0, 6) * (1 / 6).
        quant: (scale, zero_point, qmin, qmax) of `fake_quant`; scale and zero_point (1,), or (C,), a grid per channel.
        quant_grad: "ste_clip" passes the gradient where the quantizer does not clip, "ste" everywhere.
        stats: "batch" also returns the sums over each channel, (C,); "sample" over each channel of each sample, (N, C).
        extremes: also returns the ends of each channel's range, (C,), before the quantizer: what one calibrates on.
            u must not be empty then.

    Returns:
        y, with u's shape, dtype and memory format: channels last where u's channels vary fastest, else contiguous. With
        stats, (y, S1, S2); with extremes, (y, lo, hi); with both, (y, S1, S2, lo, hi). All but y in the dtype of mean.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, name or number is not as above.
        NotImplementedError: the forced backend cannot run it; or a second derivative is asked for.

    Example:
        >>> u = torch.tensor([[1.0, -1.0], [3.0, 5.0]])
        >>> mean, var = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 1.0])
        >>> bn_act(u, mean, var, None, None, 0.0, act="relu", stats="batch")
        (tensor([[0., 0.],
                [1., 2.]]), tensor([ 2., -2.]), tensor([ 4., 20.]))
        >>> bn_act(u, mean, var, None, None, 0.0, extremes=True)[1:]
        (tensor([ 0., -4.]), tensor([1., 2.]))
    """
    check_input("bn_act", u)
    checks.one_of("bn_act", "act", act, ACTS)
    if stats is not None:
        checks.one_of("bn_act", "stats", stats, STATS, rule="None or one of")
    check_eps("bn_act", eps)
    if residual is not None:
        of, called = " as u is", "u's shape"
        checks.beside("bn_act", "residual", residual, u.dtype, u.shape, u.device, of=of, called=called)
    if mean is None or var is None:
        raise TypeError(f"bn_act: {'mean' if mean is None else 'var'} must be a tensor, got NoneType")
    mean, var, gamma, beta = check_channels("bn_act", u, mean=mean, var=var, gamma=gamma, beta=beta)
    layer = Layer(Norm(mean, var, gamma, beta, float(eps)), act, _checked_quant(quant, quant_grad, u))
    checks.flag("bn_act", "extremes", extremes)
    if extremes and u.numel() == 0:
        raise ValueError(f"bn_act: u must not be empty where extremes are wanted, got shape {tuple(u.shape)}")
    trained = (t for t in (u, gamma, beta, residual) if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in trained):
        y, s1, s2, ends = _BnAct.apply(u, residual, stats, extremes, *layer.flat)
    else:
        y, s1, s2, _, ends = _forward(u, residual, Outputs(stats, False, extremes), layer)
    if stats is None and not extremes:
        return y
    return y, *(() if stats is None else (s1, s2)), *(ends.unbind() if extremes else ())
