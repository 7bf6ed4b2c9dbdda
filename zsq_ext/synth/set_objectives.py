"""What a whole image set is asked to satisfy, rather than each batch of it: DGH's two loss terms.

Shapes: B images of a batch, C channels, W the channels of all layers one behind the other. Layer 0 is the network's
input image itself, layers 1 to L what enters the batch norms; so there are L + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zsq_ext.synth.objectives import Statistics, check_layers, weighted, widen


def set_statistics_loss(
    found: Statistics, target: Statistics, *, std_factor: float = 10.0, image_weight: float = 1.0, std_eps: float = 1e-6
) -> Tensor:
    """Distance of an image set's statistics from the stored ones, in mean and standard deviation.

        (1/(L+1)) sum_l (1/C_l) [ ||M_l - mu_l||^2 + k ||sqrt(V_l + e) - sqrt(var_l + e)||^2 ]

    The normalisation is part of the method: learning rate and eps of its optimiser are made for it.

    Args:
        found: mean M and biased variance V of the set, (W,); or one row per image, (B, W), whose losses are averaged.
        target: mu and var: the running statistics, and of layer 0 mean 0 and variance 1 in normalised space.
        std_factor: k. A channel that never varied needs no exception: e keeps its slope finite.
        image_weight: of layer 0 beside the others.
        std_eps: e.

    Returns:
        The loss. Its gradient at an input x that adds n of a channel's N n values to the set (N batches of n) is

            2 w_l / (C_l N n) [ (M - mu) + k (Std - sg) / Std (x - M) ],     Std = sqrt(V + e), sg = sqrt(var + e)

        with w_l = 1 / (L + 1): a constant plus a constant times x.

    Raises:
        ValueError: other layers in one than in the other.

    Source: DGH (arXiv 2410.22110), released code.
    """
    layers = check_layers("set_statistics_loss", found, target)
    gap = (found.variance + std_eps).sqrt() - (target.variance + std_eps).sqrt()
    weights = (image_weight, *[1.0] * (layers - 1))
    shares = tuple(w / (layers * c) for w, c in zip(weights, found.channels, strict=True))
    each = weighted(found, target, std_factor**0.5 * gap, shares)
    return each if found.mean.dim() == 1 else each / len(found.mean)


def stretching_loss(
    heads: Sequence[Tensor], last: Statistics, target: Statistics, *, margin: float | None = 0.5, std_eps: float = 1e-6
) -> Tensor:
    """Widens the range of every head's output, while two hinges keep what enters the last batch norm plausible.

        sum_h mean_i [ -(max z - min z) + hinge(||m - mu||^2 / C) + hinge(||d - sg||^2 / C) ]

    hinge(x) is max(0, x - margin). z is all of head h's output for image i; m and d are the mean and standard deviation
    of what enters the last batch norm, over the places of image i. The hinges do not depend on the head and are counted
    once for each.

    Args:
        heads: outputs of the layers that feed the network's outputs, (B, ...) each, at least one.
        last: m and the unbiased variance, (B, C).
        target: mu and var of that batch norm, (C,); sg = sqrt(var + e).
        margin: how far an image may be off before its hinge pulls; None leaves the hinges out.
        std_eps: e, under d's root too, where it keeps the slope of a constant channel finite.

    Returns:
        The loss. The gradient of the range is +-1/B at the largest and the smallest value alone.

    Raises:
        ValueError: there is no head.

    Example:
        >>> logits, none = torch.tensor([[0.0, 3.0, 1.0]]), Statistics(torch.zeros(1, 2), torch.ones(1, 2), (2,))
        >>> stretching_loss([logits], none, Statistics(torch.zeros(2), torch.ones(2), (2,)))
        tensor(-3.)

    Source: DGH (arXiv 2410.22110), released code.
    """
    if not heads:
        raise ValueError("stretching_loss: heads must hold at least one output, got none")
    flat = [widen(head).flatten(1) for head in heads]
    # not amax and amin, which share the gradient among equal values
    ranges = torch.stack([(z.max(1).values - z.min(1).values).mean() for z in flat])
    if margin is None:
        return -ranges.sum()
    gap = (last.variance + std_eps).sqrt() - (target.variance + std_eps).sqrt()
    off = torch.stack([(last.mean - target.mean).square().mean(1), gap.square().mean(1)])
    return len(heads) * (off - margin).clamp_min(0).sum(0).mean() - ranges.sum()
