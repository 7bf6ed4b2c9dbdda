"""What synthetic images are asked to satisfy: one function per published loss term, each returning a 0-d tensor.

Shapes: N samples, C channels, K classes, L batch-norm layers. A layer's statistics are those of its BN
*input*: the per-channel mean and biased variance over every axis but the channel's. They are fp32 (fp64 for
fp64 inputs) whatever the images are.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RELEASED_LBNS_BATCH = 256
"""SynQ's released code divides the layered BN loss by the number of layers times this."""


def widen(x: Tensor) -> Tensor:
    """x in fp32 if it is fp16 or bf16, else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Statistics of a BN input


def channel_sums(u: Tensor, centre: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Shifted sums per channel; they add across batches and processes.

        S1 = sum (u - centre),     S2 = sum (u - centre)^2

    Args:
        u: (N, C) or (N, C, ...), floating point.
        centre: (C,), the BN's running mean. A centre near the true mean keeps the variance's digits, which
            the textbook E[u^2] - E[u]^2 loses. None means 0.

    Returns:
        S1 and S2, (C,), and the count of values per channel.

    Raises:
        ValueError: u without a channel axis, or without values.
    """
    if u.ndim < 2 or u.numel() == 0:
        raise ValueError(f"channel_sums: u must be a non-empty (N, C, ...), got shape {tuple(u.shape)}")
    u = widen(u)
    if centre is not None:
        u = u - centre.to(u.dtype).view(1, -1, *[1] * (u.ndim - 2))
    axes = [0, *range(2, u.ndim)]
    return u.sum(axes), u.square().sum(axes), u.numel() // u.shape[1]


def statistics_of_sums(s1: Tensor, s2: Tensor, count: int, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from the sums of `channel_sums`.

        mean = centre + S1 / n,     variance = S2 / n - (S1 / n)^2, never below zero

    Args:
        s1, s2: shifted sums (C,).
        count: n, values per channel behind the sums.
        centre: the shift they were taken with; None means 0.

    Returns:
        (mean, variance), (C,) each.
    """
    shift = s1 / count
    variance = (s2 / count - shift.square()).clamp_min(0)
    return (shift if centre is None else centre.to(shift.dtype) + shift), variance


def channel_statistics(u: Tensor, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per-channel mean and biased variance of a BN input.

    Args:
        u: (N, C) or (N, C, ...), floating point.
        centre: (C,), the BN's running mean, for accuracy only; see `channel_sums`.

    Returns:
        (mean, variance), (C,) each, differentiable.

    Raises:
        ValueError: u without a channel axis, or without values.

    Example:
        >>> channel_statistics(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        (tensor([2., 5.]), tensor([1., 0.]))
    """
    return statistics_of_sums(*channel_sums(u, centre), centre)


def merge_statistics(
    means: Sequence[Tensor], variances: Sequence[Tensor], counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the concatenation of several batches (law of total variance).

        mean = sum_b n_b m_b / n,     variance = sum_b n_b (v_b + (m_b - mean)^2) / n

    Args:
        means, variances: one (C,) each per batch, biased variances.
        counts: batch sizes n_b in any common unit (images, or values per channel), > 0.

    Returns:
        (mean, variance), (C,) each.

    Raises:
        ValueError: no batches, differing numbers of them, or a count that is not positive.
    """
    if not means or not len(means) == len(variances) == len(counts):
        raise ValueError(
            "merge_statistics: means, variances and counts must have the same length, at least one, "
            f"got {len(means)}, {len(variances)}, {len(counts)}"
        )
    if min(counts) <= 0:
        raise ValueError(f"merge_statistics: counts must be positive, got {min(counts)}")
    shares = [n / sum(counts) for n in counts]
    mean = torch.stack([m * share for m, share in zip(means, shares, strict=True)]).sum(0)
    parts = zip(means, variances, shares, strict=True)
    return mean, torch.stack([(v + (m - mean).square()) * share for m, v, share in parts]).sum(0)


# Batch-norm statistics losses


def bn_statistics_loss(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    target_means: Sequence[Tensor],
    target_variances: Sequence[Tensor],
    *,
    form: str = "mean_var",
    weights: Sequence[float] | None = None,
    std_eps: float = 1e-6,
) -> Tensor:
    """Distance of the images' BN-input statistics from the ones the teacher stored.

        mean_var:  (1/L) sum_l w_l [ mean_c (m - mu)^2 + mean_c (v - var)^2 ]
        mean_std:  (1/L) sum_l w_l [ sum_c (m - mu)^2 + sum_c (sqrt(v + e) - sqrt(var + e))^2 ]

    Args:
        means, variances: the images', one (C_l,) per layer, from `channel_statistics`.
        target_means, target_variances: the teacher's running statistics, same shapes.
        form: "mean_var" (released code of SynQ, HAST and GDFQ) or "mean_std" (SynQ's equation 1).
        weights: w_l per layer; None means 1.
        std_eps: e, which keeps the gradient of the square root finite in a constant channel.

    Returns:
        The loss. For "mean_var" its gradient at an input with n values per channel is a_c + b_c u, with
        k = 2 w_l / (L C n), b = 2 k (v - var), a = k [(m - mu) - 2 (v - var) m].

    Raises:
        ValueError: unknown form, differing numbers of layers, or none.

    Source: SynQ (arXiv 2603.18423), eq. 1, and its released code.
    """
    layers = _check_layers("bn_statistics_loss", means, variances, target_means, target_variances)
    if form not in ("mean_var", "mean_std"):
        raise ValueError(f'bn_statistics_loss: form must be "mean_var" or "mean_std", got {form!r}')
    if weights is None:
        weights = [1.0] * layers
    elif len(weights) != layers:
        raise ValueError(f"bn_statistics_loss: weights must have one value per layer ({layers}), got {len(weights)}")
    distances = []
    for w, m, v, mu, var in zip(weights, means, variances, target_means, target_variances, strict=True):
        if form == "mean_var":
            distances.append(w * (F.mse_loss(m, mu) + F.mse_loss(v, var)))
        else:
            gap = (v + std_eps).sqrt() - (var + std_eps).sqrt()
            distances.append(w * ((m - mu).square().sum() + gap.square().sum()))
    return torch.stack(distances).mean()


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


def layered_bn_statistics_loss(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    centre_means: Sequence[Tensor],
    centre_variances: Sequence[Tensor],
    *,
    divide_by: str = "layers",
) -> Tensor:
    """Distance of the deep layers' statistics from those of the calibration centres (L-BNS).

        sum over n >= split_index(L) of [ mean_c (m - m_centre)^2 + mean_c (v - v_centre)^2 ], divided

    Args:
        means, variances: the images', one (C_l,) per layer, all L layers.
        centre_means, centre_variances: the centres' over all of them, from `merge_statistics`.
        divide_by: "layers" divides by L; "released" by L * 256, which with the published weight of 0.02 makes the term
            vanish.

    Returns:
        The loss.

    Raises:
        ValueError: unknown divide_by, differing numbers of layers, or fewer than 2.

    Source: SynQ's released code, after TexQ.
    """
    layers = _check_layers("layered_bn_statistics_loss", means, variances, centre_means, centre_variances)
    divisors = {"layers": layers, "released": layers * RELEASED_LBNS_BATCH}
    if divide_by not in divisors:
        raise ValueError(f'layered_bn_statistics_loss: divide_by must be "layers" or "released", got {divide_by!r}')
    deep = slice(split_index(layers), None)
    pairs = zip(means[deep], variances[deep], centre_means[deep], centre_variances[deep], strict=True)
    distances = [F.mse_loss(m, mu) + F.mse_loss(v, var) for m, v, mu, var in pairs]
    return torch.stack(distances).sum() / divisors[divide_by]


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


def calibration_centre_loss(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    target_means: Sequence[Tensor],
    target_variances: Sequence[Tensor],
) -> Tensor:
    """The BN term of the calibration centres, `bn_statistics_loss` with `calibration_centre_weights`.

        (1/L) sum_l w_l [ mean_c (m - mu)^2 + mean_c (v - var)^2 ],     w_l = 0.2 shallow, 1.1 deep

    The published total adds 5 * `cross_entropy`.

    Args and Raises:
        As for `bn_statistics_loss`.

    Returns:
        The loss.

    Source: SynQ's released code, after TexQ.
    """
    weights = calibration_centre_weights(len(means))
    return bn_statistics_loss(means, variances, target_means, target_variances, weights=weights)


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


def _check_layers(function: str, *lists: Sequence[Tensor]) -> int:
    lengths = {len(values) for values in lists}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"{function}: statistics and targets must have the same number of layers, at least one, "
            f"got {', '.join(str(len(values)) for values in lists)}"
        )
    return lengths.pop()
