"""Losses of a generator that see both networks: where do teacher and student still agree, and where no longer?

Shapes: B samples, K classes. f are the teacher's logits, q the student's, (B, K) each. Everything is computed in fp32
(fp64 for fp64 logits). Nothing is detached here but what a docstring says: images reach these losses through both
networks, and the caller decides whose gradient it takes.

AGM's paper (Luo et al., IEEE TCSVT 2024, 10.1109/TCSVT.2024.3399311) was available to us as an abstract alone, so its
"adversarial Gaussian-margin loss" is *derived* here, not quoted: it is adversarial (descending it raises the
discrepancy), stronger where the discrepancy is small, and fades once that is clearly large.

It is eager PyTorch and no fused op: on one CPU core, forward and backward took 0.3, 0.5 and 0.3 ms at B x K = 32 x 40,
200 x 100 and 16 x 1000, of a generator's step of 1.7, 10 and 40 s (ResNet-20 twice, ResNet-18 at 224 px; student and
teacher included): 2 in 10 000 at most. In calls it is 86 beside that step's 441 (550 at 224 px), so a GPU that waits
for launches would notice; a CUDA graph takes that away too, and no GPU has been asked yet.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.synth.objectives import widen

MARGIN_FORMS = ("smooth_hinge", "gauss", "erfc")
"""Readings of "Gaussian margin", see `gaussian_margin`."""
DISCREPANCIES = ("normalized", "mse")
"""Distances of two networks' logits, see `discrepancy`."""

SMALLEST_DISCREPANCY = 1e-6
"""Added in squares, so that the gradient of a distance is finite where it is zero."""
SMALLEST_SCALE = 1e-8
"""Added to the mean square of the teacher's logits before its root."""
SMALLEST_INFORMATION = 1e-8
"""Nats by which a batch must fall short of full entropy before its samples are told apart."""


# AdaSG and AdaDFQ: an entropy band


def normalised_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """How evenly the two networks' difference spreads over the classes, against the least even sample of the batch.

        H'_i = (H_i - min_j H_j) / (log K - min_j H_j),     H_i = entropy of softmax(f_i - q_i)

    1 is full agreement, 0 the sample that the networks disagree on most: so a batch of one is 0, wherever it stands.
    Computed as 1 - I_i / max_j I_j with I = log K - H summed without cancellation, so that it means something where the
    networks hardly differ. As released, the minimum carries a gradient. Where all agree, up to
    ``SMALLEST_INFORMATION``, H' is 1 for all (released: 0 / 0).

    Args:
        student, teacher: logits (B, K), B >= 1.

    Returns:
        H', (B,), in [0, 1].

    Raises:
        ValueError: shapes other than these.

    Source: AdaSG and AdaDFQ, released code.
    """
    _check("normalised_entropy", student, teacher)
    r = (widen(teacher) - widen(student)).log_softmax(1) + math.log(teacher.shape[1])
    # the sum of p r with p = e^r / K: p r - p + 1 / K adds up to the same, and no term of it is negative
    information = (r.exp() * r - torch.expm1(r)).clamp_min(0).mean(1)
    return 1 - information / information.max().clamp_min(SMALLEST_INFORMATION)


def entropy_band(student: Tensor, teacher: Tensor, low: float, high: float) -> Tensor:
    """Keeps samples between those that both networks agree on already and those that nobody could learn from.

        mean_i max(0, low - H'_i) + mean_i max(0, H'_i - high),     H' of `normalised_entropy`

    Args:
        student, teacher: logits (B, K), B >= 1.
        low, high: the band, 0 <= low <= high <= 1; published 0.3 and 0.8 (AdaSG), 0.1 and 0.8 (AdaDFQ).

    Returns:
        The loss, 0-d.

    Raises:
        ValueError: other shapes, or no such band.

    Example:
        >>> f = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> entropy_band(torch.zeros(2, 2), f, 0.1, 0.8)  # H' is 0 and 1: half of 0.1 and half of 0.2
        tensor(0.1500)

    Source: AdaSG and AdaDFQ, released code, for any batch size (released: 16).
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"entropy_band: low and high must be 0 <= low <= high <= 1, got {low} and {high}")
    entropy = normalised_entropy(student, teacher)
    return (low - entropy).clamp_min(0).mean() + (entropy - high).clamp_min(0).mean()


def disagreement(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """CE(f - q, y): what the teacher knows of the label and the student does not.

    Args:
        student, teacher: logits (B, K).
        labels: (B,) int64.

    Returns:
        The loss, 0-d.

    Source: AdaSG and AdaDFQ, released code (weights 0.1 and 0.2).
    """
    _check("disagreement", student, teacher)
    return F.cross_entropy(widen(teacher) - widen(student), labels)


def agreement(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """CE(f + q, y): what both know of the label.

    Args and Returns:
        As for `disagreement`.

    Source: AdaSG and AdaDFQ, released code (weight 0.1).
    """
    _check("agreement", student, teacher)
    return F.cross_entropy(widen(teacher) + widen(student), labels)


# AGM: a Gaussian margin on the discrepancy


def discrepancy(student: Tensor, teacher: Tensor, kind: str = "normalized") -> Tensor:
    """How far apart the networks' logits are, sample by sample.

        normalized:  d_i = ||c(f_i) - c(q_i)|| / S,     S^2 = mean_j ||c(f_j)||^2 + 1e-8,     c(u) = u - mean_k u
        mse:         d_i = ||f_i - q_i|| / sqrt(K)

    The first ignores a shift of a sample's logits, as softmax does, and a common scale of all; S carries no gradient,
    so a generator is pushed to widen the gap itself, not to shrink the teacher's logits.
    A root's argument has 1e-12 added, so that d is at least 1e-6 and, where the networks agree, its gradient is zero.
    For a loss mean_i l(d_i) of the first kind

        dL/dq_i = (1/B) l'(d_i) (c(q_i) - c(f_i)) / (d_i S^2),     dL/df_i = -dL/dq_i

    Args:
        student, teacher: logits (B, K).
        kind: a name from ``DISCREPANCIES``.

    Returns:
        d, (B,).

    Raises:
        ValueError: other shapes, or no such kind.

    Source: ours; "mse" is the distance that KMDFQ's released code distils with.
    """
    _check("discrepancy", student, teacher)
    if kind not in DISCREPANCIES:
        raise ValueError(f"discrepancy: kind must be one of {', '.join(DISCREPANCIES)}, got {kind!r}")
    gap = widen(teacher) - widen(student)
    if kind == "mse":
        squared = gap.square().mean(1)
    else:
        scale = _centred(widen(teacher.detach())).square().sum(1).mean() + SMALLEST_SCALE
        squared = _centred(gap).square().sum(1) / scale
    return (squared + SMALLEST_DISCREPANCY**2).sqrt()


def gaussian_margin(d: Tensor, margin: Tensor | float, sigma: Tensor | float, form: str = "smooth_hinge") -> Tensor:
    """A loss that falls with the discrepancy, most steeply where that is small, and no further once it is large.

    With u = (m - d) / s, and Phi and phi the normal distribution and density:

    | form         | loss                                | slope -dL/dd                | m = 1, s = 1/2; d = 0, 1, 2 |
    |--------------|-------------------------------------|-----------------------------|-----------------------------|
    | smooth_hinge | (m - d) Phi(u) + s phi(u)           | Phi(u)                      | 0.98, 0.50, 0.02            |
    | gauss        | exp(-d^2 / (2 s^2))                 | d / s^2 exp(-d^2 / (2 s^2)) | 0, 0.54, 0.003              |
    | erfc         | s sqrt(pi / 2) erfc(d / (s sqrt 2)) | exp(-d^2 / (2 s^2))         | 1, 0.14, 0.0003             |

    The first is E[max(0, M - d)] for a margin M ~ N(m, s^2), a hinge as s goes to 0. The second pushes hardest at d = s
    and not at all at 0; only the other two push the more the smaller d is.

    Args:
        d: discrepancies (B,) >= 0, as of `discrepancy`.
        margin, sigma: m and s > 0, numbers or 0-d on the same device; "gauss" and "erfc" have no m.
        form: a name from ``MARGIN_FORMS``.

    Returns:
        One loss per sample, (B,).

    Raises:
        ValueError: no such form.

    Example:
        >>> gaussian_margin(torch.tensor([0.8]), 1.0, 0.5)
        tensor([0.3152])

    Source: ours; the published formula was not available.
    """
    if form not in MARGIN_FORMS:
        raise ValueError(f"gaussian_margin: form must be one of {', '.join(MARGIN_FORMS)}, got {form!r}")
    if form == "gauss":
        return torch.exp(-0.5 * (d / sigma).square())
    if form == "erfc":
        return math.sqrt(math.pi / 2) * sigma * torch.erfc(d / sigma / math.sqrt(2))
    u = (margin - d) / sigma
    below = 0.5 * torch.erfc(-u / math.sqrt(2))  # not ndtr, which loses the lower tail's digits
    return sigma * (u * below + torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi))


class Margin(NamedTuple):
    """What `adversarial_margin` found: the loss, and the median discrepancy, detached; 0-d both."""

    loss: Tensor
    median: Tensor


def adversarial_margin(
    student: Tensor,
    teacher: Tensor,
    margin: Tensor | float,
    sigma: Tensor | float,
    *,
    form: str = "smooth_hinge",
    kind: str = "normalized",
) -> Margin:
    """AGM's loss of a batch, unweighted: the mean of `gaussian_margin` over its `discrepancy`.

    A batch whose logits, or the sum of their squares, are not finite is passed over: its loss and its gradient are
    zero, its median is NaN.

    Args:
        student, teacher: logits (B, K).
        margin, sigma, form: as for `gaussian_margin`.
        kind: as for `discrepancy`.

    Returns:
        (loss, median).
    """
    with torch.no_grad():  # twice the squares of both bound the square of any gap between them
        usable = (2 * (widen(student).square() + widen(teacher).square()).sum()).isfinite()
    # chosen before anything is computed: a zero that meets a NaN on its way back is a NaN
    d = discrepancy(torch.where(usable, student, 0.0), torch.where(usable, teacher, 0.0), kind)
    loss = torch.where(usable, gaussian_margin(d, margin, sigma, form).mean(), 0.0)
    return Margin(loss, torch.where(usable, d.detach().median(), math.nan))


def limited(base: Tensor, extra: Tensor, right: Tensor, below: float = 0.5) -> Tensor:
    """A second gradient, no longer than the first where the teacher loses sight of the labels.

        extra min(1, ||base|| / ||extra||)  if right < below,  else extra itself

    Args:
        base: the gradient of the generator's own loss on the images, any shape.
        extra: what is added to it, same shape.
        right: the share of the images that the teacher finds their label in, 0-d on the device.
        below: where the limit sets in.

    Returns:
        The extra gradient, to be added.
    """
    ratio = base.norm() / extra.norm().clamp_min(torch.finfo(extra.dtype).tiny)
    return extra * torch.where(right < below, ratio.clamp_max(1), 1.0)


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def _check(function: str, student: Tensor, teacher: Tensor) -> None:
    if teacher.dim() != 2 or teacher.shape[0] < 1 or teacher.shape[1] < 2 or student.shape != teacher.shape:
        raise ValueError(
            f"{function}: student and teacher must have one shape (B, K) with B >= 1 and K >= 2, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
