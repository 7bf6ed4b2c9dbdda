"""What a network's tensors look like, read off its batch norms alone: mean, variance and bounds of every channel.

A batch norm's output is taken as normal with the mean beta and the standard deviation gamma that its affine part names;
behind a ReLU that normal is clipped. Channels and branches count as independent, places of an image as alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx

from zsq_ext.quant.graph import (
    ADDITIONS,
    RESHAPES,
    aten,
    is_relu,
    is_tensor,
    upper_bound,
)
from zsq_ext.quant.sites import AVERAGES

MAX_POOLS = {aten.max_pool2d.default, aten.adaptive_max_pool2d.default}


class Moments(NamedTuple):
    """Mean, variance and bounds per channel, (C,) each."""

    mean: Tensor
    var: Tensor
    lo: Tensor
    hi: Tensor


def clipped_normal(mean: Tensor, std: Tensor, lo: float, hi: float | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of a normal variable clipped to [lo, hi].

        a = (lo - mean) / std,  b = (hi - mean) / std,  P = Phi(b) - Phi(a)
        E x  = lo Phi(a) + hi (1 - Phi(b)) + mean P + std (phi(a) - phi(b))
        E x2 = lo^2 Phi(a) + hi^2 (1 - Phi(b)) + (mean^2 + std^2) P
               + 2 mean std (phi(a) - phi(b)) + std^2 (a phi(a) - b phi(b))

    Args:
        mean, std: any one shape, std >= 0.
        lo, hi: the bounds; None for no upper one.

    Returns:
        The mean and the variance, of that shape.

    Source: M. Nagel et al. (arXiv 1906.04721), equation 19 and appendix C.
    """
    wide, sigma = mean.double(), std.double().clamp_min(1e-30)
    a = (lo - wide) / sigma
    below, at_a = _cdf(a), _pdf(a)
    top = 0.0 if hi is None else hi
    b = torch.full_like(a, 40.0) if hi is None else (hi - wide) / sigma  # beyond 40 sigma there is nothing in fp64
    above, at_b = _cdf(-b), _pdf(b)
    inside = 1 - below - above
    first = lo * below + top * above + wide * inside + sigma * (at_a - at_b)
    second = lo**2 * below + top**2 * above + (wide**2 + sigma**2) * inside
    second = second + 2 * wide * sigma * (at_a - at_b) + sigma**2 * (a * at_a - b * at_b)
    return first.to(mean.dtype), (second - first**2).clamp_min(0).to(mean.dtype)


def moments(
    module: fx.GraphModule,
    normals: Mapping[str, tuple[Tensor, Tensor]],
    sigmas: float,
    image_range: tuple[float, float] | None = None,
) -> dict[str, Moments]:
    """Moments of every node that they can be told of.

    Args:
        module: a captured network.
        normals: mean and standard deviation of what batch norms yield, by the batch norm's node.
        sigmas: bounds are so many standard deviations from the mean.
        image_range: bounds of the image's values; of its channels the mean is taken as 0 and the variance as 1.

    Returns:
        Moments by node name. What no batch norm tells of is missing: what leaves a layer without one (the logits: their
        largest values belong to the classes, not to a normal), a product, a concatenation or another activation, up to
        the next batch norm. A pool counts as leaving them as they are.
    """
    found: dict[fx.Node, Moments] = {}
    for node in module.graph.nodes:
        value = None
        if node.op == "placeholder":
            mean = next(module.parameters()).detach().new_zeros(node.meta["val"].shape[1])
            value = _bounded(mean, mean + 1, sigmas)
            if image_range is not None:
                lo, hi = (torch.full_like(value.mean, end) for end in image_range)
                value = value._replace(lo=lo, hi=hi)
        elif node.name in normals:
            mean, std = normals[node.name]
            value = _bounded(mean, std.square(), sigmas)
        elif node.op == "call_function" and node.all_input_nodes and is_tensor(node):
            sources = [found.get(arg) for arg in node.args if isinstance(arg, fx.Node)]
            value = _behind(node, sources, sigmas)
        if value is not None:
            found[node] = value
    return {node.name: value for node, value in found.items()}


def _behind(node: fx.Node, sources: list[Moments | None], sigmas: float) -> Moments | None:
    first = sources[0]
    if first is None:
        return None
    if is_relu(node):
        high = upper_bound(node)
        lo, hi = first.lo.clamp(0, high), first.hi.clamp(0, high)
        return Moments(*clipped_normal(first.mean, first.var.sqrt(), 0.0, high), lo, hi)
    if node.target in ADDITIONS and len(sources) == 2:
        other = sources[1]
        if other is None or other.mean.shape != first.mean.shape:
            return None
        total = _bounded(first.mean + other.mean, first.var + other.var, sigmas)
        lo, hi = torch.maximum(total.lo, first.lo + other.lo), torch.minimum(total.hi, first.hi + other.hi)
        return total._replace(lo=lo, hi=hi)
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    # one value per channel stays one, or a pool of each channel's own
    kept = len(after) >= 2 and before[1] == after[1]
    if kept and node.target in RESHAPES | AVERAGES | MAX_POOLS | {aten.dropout.default}:
        return first
    return None


def expected(weight: Tensor, x: Tensor) -> Tensor:
    """What a layer (O, I / groups, ...) yields, (O,), where every place of input channel c holds x[c], (I,)."""
    groups = len(x) // weight.shape[1]
    rows = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    return torch.einsum("goi,gi->go", rows.reshape(groups, -1, weight.shape[1]), x.view(groups, -1)).reshape(-1)


def _bounded(mean: Tensor, var: Tensor, sigmas: float) -> Moments:
    reach = sigmas * var.sqrt()
    return Moments(mean, var, mean - reach, mean + reach)


def _cdf(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


def _pdf(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
