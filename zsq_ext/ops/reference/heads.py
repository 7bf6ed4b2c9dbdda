"""distill_head, cam_map, count_active and their gradients, computed in float64 and rounded once at the end.

Shapes: B samples, K classes or channels. Logits are [B, K]; labels and easy are [B]; rows is [B, 8], what the backward
needs of each sample; an activation is [B, K, H, W], a map [B, H, W].
"""

import math

import torch
from torch import Tensor

from zsq_ext.ops.heads_spec import Grads, Kept, Needs, Terms, Trust
from zsq_ext.ops.layout import COMPUTE, arranged, channels_last

# As small as a probability gets: its inverse is still a float32, and all of them together are as good as nothing.
LOG_FLOOR = -80.0

# What the forward leaves of a sample, for the sums over samples and for the backward: kernels/heads.h has the same.
# The divergence's value and its two normalisers, the cross-entropy, log-sum-exp, 1 - softmax[label], right, agree.
ROW = 8


def kd_weight(kd: str, alpha: float, temperature: float, samples: int, classes: int) -> float:
    """What the sum over all samples and classes is multiplied by. NaN for the mean over no samples."""
    count = samples * (classes if kd in ("mse", "kl_mean") else 1)
    return math.nan if samples == 0 else alpha / count if kd == "mse" else alpha * temperature**2 / count


def _ratio(s: Tensor, t: Tensor, base: Tensor, shift: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log p, r): the teacher's log-probabilities, and the student's minus the teacher's, which LOG_FLOOR bounds."""
    log_p = t / temperature - base
    bounded = s / temperature - (base + shift) - LOG_FLOOR
    return log_p, torch.where(log_p < LOG_FLOOR, bounded, (s - t) / temperature - shift)


def _divergence(s: Tensor, t: Tensor, kd: str, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(value, base, shift), [B]: the sum over classes, and the normalisers that it took."""
    none = s.new_zeros(s.size(0))
    if kd == "mse":
        return (s - t).square().sum(1), none, none
    if kd == "entropy":
        u = (s - t) / temperature
        base = u.logsumexp(1)
        log_p = u - base[:, None]
        return (log_p.exp() * log_p).sum(1), base, none
    base = (t / temperature).logsumexp(1)
    shift = (s / temperature).logsumexp(1) - base
    log_p, r = _ratio(s, t, base[:, None], shift[:, None], temperature)
    # e^r - 1 - r instead of -r: the same sum, because both distributions sum to one, without what cancels in it.
    return (log_p.clamp_min(LOG_FLOOR).exp() * (torch.expm1(r) - r)).sum(1), base, shift


def _against(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds against the label, [B]; NaN where there is no such class."""
    index = labels.clamp(0, logits.size(1) - 1)[:, None]
    odds = logits.scatter(1, index, -math.inf).logsumexp(1) - logits.gather(1, index)[:, 0]
    return torch.where((labels >= 0) & (labels < logits.size(1)), odds, math.nan)


def distill_head(
    student: Tensor, teacher: Tensor, trust: Trust, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(kd, ce, easy, counts, rows). Without tau, and without easy, every label is trusted."""
    (labels, easy, tau, strict), (kd, alpha, temperature, ce) = trust, terms
    compute, (samples, classes) = COMPUTE[student.dtype], student.shape
    s, t = student.double(), teacher.double()
    value, base, shift = _divergence(s, t, kd, temperature)
    predicted, right = student.argmax(1), torch.zeros(samples, dtype=torch.bool, device=s.device)
    each = lse = wrong = torch.zeros_like(value)
    if labels is None:
        easy = right
    else:
        odds, right = _against(s, labels), predicted == labels
        if easy is None:
            delta = torch.sigmoid(_against(t, labels)).to(compute)
            easy = torch.ones_like(right) if tau is None else delta < tau if strict else delta <= tau
        lse, wrong = torch.where(odds.isnan(), math.nan, s.logsumexp(1)), torch.sigmoid(odds)
        each = torch.logaddexp(odds, torch.zeros_like(odds))
        outside = (labels < 0) | (labels >= classes)
        each = torch.where(easy | outside, each, 0)
    agree = predicted == teacher.argmax(1)
    rows = torch.stack([value, base, shift, each, lse, wrong, right.double(), agree.double()], 1)
    mean = ce / samples if samples else math.nan
    return (
        (kd_weight(kd, alpha, temperature, samples, classes) * value.sum()).to(compute),
        (mean * each.sum()).to(compute),
        easy.clone(),
        torch.stack([right.sum(), agree.sum(), easy.sum()]),
        rows.to(compute),
    )


def distill_head_backward(
    student: Tensor, teacher: Tensor, kept: Kept, grads: Grads, terms: Terms, needs: Needs
) -> tuple[Tensor, Tensor]:
    """(dstudent, dteacher), each empty where it is not needed."""
    (labels, easy, rows), (grad_kd, grad_ce), (kd, alpha, temperature, ce) = kept, grads, terms
    samples, classes = student.shape
    s, t = student.double(), teacher.double()
    value, base, shift, _, lse, wrong, _, _ = rows.double()[:, :, None].unbind(1)
    ds, dt = torch.zeros_like(s), torch.zeros_like(t)
    if grad_kd is not None:
        weight = grad_kd.double() * kd_weight(kd, alpha, temperature, samples, classes)
        if kd == "mse":
            ds = weight * 2 * (s - t)
            dt = -ds
        elif kd == "entropy":
            log_p = (s - t) / temperature - base
            ds = weight / temperature * log_p.exp() * (log_p - value)
            dt = -ds
        else:
            log_p, r = _ratio(s, t, base, shift, temperature)
            p = weight / temperature * log_p.clamp_min(LOG_FLOOR).exp()
            ds, dt = p * torch.expm1(r), torch.where(log_p < LOG_FLOOR, 0, p * (-r - value))
    if grad_ce is not None and labels is not None and samples:
        index = labels.clamp(0, classes - 1)[:, None]
        ds = ds + grad_ce.double() * (ce / samples) * easy[:, None] * (s - lse).exp().scatter(1, index, -wrong)
    nothing = student.new_empty(0)
    return ds.to(student.dtype) if needs.student else nothing, dt.to(teacher.dtype) if needs.teacher else nothing


def _floored(alpha: Tensor, floor: float | None) -> Tensor:
    return (alpha if floor is None else alpha.clamp_min(floor))[:, :, None, None]


def cam_map(activation: Tensor, alpha: Tensor, floor: float | None) -> Tensor:
    s = (_floored(alpha, floor).double() * activation.double()).sum(1).to(alpha.dtype)
    return torch.where(s < 0, 0, s)


def cam_map_backward(activation: Tensor, alpha: Tensor, maps: Tensor, grad: Tensor, floor: float | None) -> Tensor:
    """Of the activation only shape, dtype and memory format are read."""
    da = _floored(alpha, floor) * torch.where(maps <= 0, 0, grad)[:, None]
    return arranged(da.to(activation.dtype), channels_last(activation))


def count_active(x: Tensor, upper: float | None) -> Tensor:
    v = x.to(COMPUTE[x.dtype])
    active = v > 0 if upper is None else (v > 0) & (v < upper)
    return active.sum((2, 3), dtype=torch.int32)
