"""What synthetic images are asked to satisfy: one function per published loss term, each returning a 0-d tensor.

Shapes: N samples, C channels, K classes, L batch-norm layers. A layer's statistics are those of its BN
*input*: the per-channel mean and biased variance over every axis but the channel's. They are fp32 (fp64 for
fp64 inputs) whatever the images are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RELEASED_LBNS_BATCH = 256
"""SynQ's released code divides the layered BN loss by the number of layers times this."""


def widen(x: Tensor) -> Tensor:
    """x in fp32 if it is fp16 or bf16, else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Batch-norm statistics losses


class Statistics(NamedTuple):
    """Per-channel mean and biased variance of what enters every batch norm, all layers one behind the other.

    One tensor for all layers makes a loss a handful of operations, however deep the network is.

    Args:
        mean, variance: (sum of C_l,).
        channels: C_l of every layer.
    """

    mean: Tensor
    variance: Tensor
    channels: tuple[int, ...]

    @classmethod
    def of(cls, means: Sequence[Tensor], variances: Sequence[Tensor]) -> Statistics:
        """From one (C_l,) each per layer, at least one layer."""
        return cls(torch.cat(list(means)), torch.cat(list(variances)), tuple(len(mean) for mean in means))


def bn_statistics_loss(
    found: Statistics,
    target: Statistics,
    *,
    form: str = "mean_var",
    weights: Sequence[float] | None = None,
    std_eps: float = 1e-6,
) -> Tensor:
    """Distance of the images' BN-input statistics from the ones the teacher stored.

        mean_var:  (1/L) sum_l w_l [ mean_c (m - mu)^2 + mean_c (v - var)^2 ]
        mean_std:  (1/L) sum_l w_l [ sum_c (m - mu)^2 + sum_c (sqrt(v + e) - sqrt(var + e))^2 ]

    Args:
        found: the images' statistics.
        target: the teacher's running statistics.
        form: "mean_var" (released code of SynQ, HAST and GDFQ) or "mean_std" (SynQ's equation 1).
        weights: w_l per layer; None means 1.
        std_eps: e, which keeps the gradient of the square root finite in a constant channel.

    Returns:
        The loss. For "mean_var" its gradient at an input with n values per channel is a_c + b_c u, with
        k = 2 w_l / (L C n), b = 2 k (v - var), a = k [(m - mu) - 2 (v - var) m].

    Raises:
        ValueError: unknown form, or other layers in one than in the other.

    Source: SynQ (arXiv 2603.18423), eq. 1, and its released code.
    """
    layers = check_layers("bn_statistics_loss", found, target)
    if form not in ("mean_var", "mean_std"):
        raise ValueError(f'bn_statistics_loss: form must be "mean_var" or "mean_std", got {form!r}')
    if weights is None:
        weights = [1.0] * layers
    elif len(weights) != layers:
        raise ValueError(f"bn_statistics_loss: weights must have one value per layer ({layers}), got {len(weights)}")
    if form == "mean_var":
        shares = tuple(w / (layers * c) for w, c in zip(weights, found.channels, strict=True))
        gap = found.variance - target.variance
    else:
        shares = tuple(w / layers for w in weights)
        gap = (found.variance + std_eps).sqrt() - (target.variance + std_eps).sqrt()
    return weighted(found, target, gap, shares)


def split_index(layers: int) -> int:
    """The first of the deep batch-norm layers: (L + 2) // 2 - 2.

    Args:
        layers: L, the number of BN layers, at least 2.

    Returns:
        The index; 9 for ResNet-20 and ResNet-18, 25 for ResNet-50 and MobileNetV2.

    Raises:
        ValueError: fewer than 2 layers.
    """
    if layers < 2:
        raise ValueError(f"split_index: layers must be at least 2, got {layers}")
    return (layers + 2) // 2 - 2


def layered_bn_statistics_loss(found: Statistics, centres: Statistics, *, divide_by: str = "layers") -> Tensor:
    """Distance of the deep layers' statistics from those of the calibration centres (L-BNS).

        sum over n >= split_index(L) of [ mean_c (m - m_centre)^2 + mean_c (v - v_centre)^2 ], divided

    Args:
        found: the images' statistics, all L layers.
        centres: those of all calibration centres together.
        divide_by: "layers" divides by L; "released" by L * 256, which with the published weight of 0.02 makes the term
            vanish.

    Returns:
        The loss.

    Raises:
        ValueError: unknown divide_by, other layers in one than in the other, or fewer than 2.

    Source: SynQ's released code, after TexQ.
    """
    layers = check_layers("layered_bn_statistics_loss", found, centres)
    divisors = {"layers": layers, "released": layers * RELEASED_LBNS_BATCH}
    if divide_by not in divisors:
        raise ValueError(f'layered_bn_statistics_loss: divide_by must be "layers" or "released", got {divide_by!r}')
    split, divisor = split_index(layers), divisors[divide_by]
    shares = tuple(0.0 if n < split else 1 / (c * divisor) for n, c in enumerate(found.channels))
    return weighted(found, centres, found.variance - centres.variance, shares)


def calibration_centre_weights(layers: int, shallow: float = 0.2, deep: float = 1.1) -> list[float]:
    """Layer weights of the calibration centres' BN loss: relaxed shallow layers, tightened deep ones.

    Args:
        layers: L, the number of BN layers, at least 2.
        shallow: weight below `split_index`.
        deep: weight from there on.

    Returns:
        L weights, for `bn_statistics_loss`.
    """
    split = split_index(layers)
    return [shallow] * split + [deep] * (layers - split)


def calibration_centre_loss(found: Statistics, target: Statistics) -> Tensor:
    """The BN term of the calibration centres, `bn_statistics_loss` with `calibration_centre_weights`.

        (1/L) sum_l w_l [ mean_c (m - mu)^2 + mean_c (v - var)^2 ],     w_l = 0.2 shallow, 1.1 deep

    The published total adds 5 * `cross_entropy`.

    Args and Raises:
        As for `bn_statistics_loss`.

    Returns:
        The loss.

    Source: SynQ's released code, after TexQ.
    """
    return bn_statistics_loss(found, target, weights=calibration_centre_weights(len(found.channels)))


def weighted(found: Statistics, target: Statistics, gap: Tensor, shares: tuple[float, ...]) -> Tensor:
    """The squared gaps of mean and spread, summed with one weight per layer (and over rows, if there are any)."""
    mean = found.mean
    each = (mean - target.mean).square() + gap.square()
    return (_by_channel(shares, found.channels, mean.dtype, mean.device) * each).sum()


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _by_channel(
    values: tuple[float, ...], channels: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One value per layer, repeated for its channels. Kept, because a copy from the host at every step would be one
    that a CUDA graph cannot hold."""
    repeated = torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(channels))
    return repeated.to(device, dtype)


# Inception losses: the images must belong to their label


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the teacher's logits with the assigned labels, in fp32 or wider.

    Args:
        logits: (N, K).
        labels: (N,) int64, or (N, K) soft labels.

    Returns:
        The loss.
    """
    return F.cross_entropy(widen(logits), labels)


def wrong_over_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds against the label, from which every function of its probability p can be had without cancellation.

        a = logsumexp over k != y of x_k  -  x_y,     -log p = softplus(a),     1 - p = sigmoid(a)

    Args:
        logits: (N, K), K >= 2.
        labels: (N,) int64.

    Returns:
        a, (N,), in fp32 or wider.

    Raises:
        ValueError: shapes that do not match, or a single class.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "wrong_over_right: logits must be (N, K) with K >= 2 and labels (N,), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    logits, index = widen(logits), labels[:, None]
    return logits.scatter(1, index, -math.inf).logsumexp(1) - logits.gather(1, index)[:, 0]


def focal_ce(
    logits: Tensor, labels: Tensor, *, beta: float = 1.0, gamma: float = 2.0, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy weighted towards samples that are still hard (HAST's hard-sample inception loss).

        beta * mean_i (1 - p_i)^gamma * (-log p_i),     p_i = softmax(logits_i)[label_i]

    The gradient flows through both factors. Computed from the log-odds: the plain form has an infinite slope at p = 1
    for gamma < 1 and returns NaN as soon as fp32 rounds p to 1, at a logit gap of about 16.5 + ln(K - 1).

    Args:
        logits: teacher logits (N, K), K >= 2.
        labels: (N,) int64.
        beta: weight; published pairs (beta, gamma) are (10, 2) for CIFAR and (0.1, 0.5) for ImageNet.
        gamma: focus, >= 0; 0 is the plain cross-entropy.
        reduction: "mean", or "none" for one value per sample.

    Returns:
        The loss, 0-d (or (N,)).

    Raises:
        ValueError: gamma negative, unknown reduction, or shapes as in `wrong_over_right`.

    Example:
        >>> focal_ce(torch.zeros(1, 2), torch.tensor([0]), gamma=2.0)  # ln 2 / 4
        tensor(0.1733)

    Source: HAST, released code; SynQ (arXiv 2603.18423), appendix D.
    """
    if gamma < 0:
        raise ValueError(f"focal_ce: gamma must be at least 0, got {gamma}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'focal_ce: reduction must be "mean" or "none", got {reduction!r}')
    against = wrong_over_right(logits, labels)
    # logsigmoid(a) is log(1 - p)
    each = beta * torch.exp(gamma * F.logsigmoid(against)) * F.softplus(against)
    return each.mean() if reduction == "mean" else each


def check_layers(function: str, found: Statistics, target: Statistics) -> int:
    """How many layers there are, if both have the same."""
    if found.channels != target.channels:
        raise ValueError(
            f"{function}: statistics and targets must have the same layers, "
            f"got channels {found.channels} and {target.channels}"
        )
    return len(found.channels)
