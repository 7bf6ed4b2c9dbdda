"""The optimisation of one unit: Adam on rounding variables and steps, on minibatches of what the unit reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq_ext.core.steps import Stage, State, Terms, run_steps, sum_terms
from zsq_ext.ops import qdrop
from zsq_ext.tune.reconstruct_config import ReconstructConfig
from zsq_ext.tune.rows import Rows
from zsq_ext.tune.soft import SoftUnit

ADVICE = "Try lower learning rates (lr_rounding, lr_weight_step, lr_activation_step) or more bits."


class Data(NamedTuple):
    """What a unit reads behind the quantized prefix and in the teacher, one per input, and what it should yield."""

    rounded: list[Rows]
    exact: list[Rows]
    target: Rows


class Group(NamedTuple):
    """Tensors that learn at one rate, constant or falling as a cosine to 0; ``floor`` keeps steps positive."""

    tensors: list[Tensor]
    lr: float
    cosine: bool = False
    floor: Sequence[Tensor] = ()


def distance(y: Tensor, target: Tensor) -> Tensor:
    """Squared error (B, C, ...): summed over channels, averaged over images and places."""
    return (y - target).square().sum(1).mean()


def betas(config: ReconstructConfig, count: int, like: Tensor) -> tuple[int, Tensor]:
    """The step at which the regulariser sets in, and its exponent for every step, (count,)."""
    begin = math.ceil(config.warmup * count)
    first, last = config.beta
    way = (torch.arange(count, dtype=torch.float64) - begin).clamp_min(0) / max(count - 1 - begin, 1)
    return begin, (first + (last - first) * way).to(like)


def learn(
    stage: Stage, unit: SoftUnit, data: Data, config: ReconstructConfig, count: int, *, rounding: bool, steps: bool
) -> list[dict[str, Any]]:
    """Minimises a unit's error over its roundings, its steps or both.

    Args:
        stage: checkpoints and random streams.
        unit: what is tuned, in place.
        data: rows of all images.
        config: rates, batch, regulariser.
        count: number of iterations.
        rounding: learn the weights' rounding, and their steps where those have a rate; else they are rounded already.
        steps: learn the activations' steps; else nothing is rounded there, unless ``rounding`` is off too.

    Returns:
        The history of the loss terms; empty where there is nothing to learn.

    Raises:
        Diverged: a loss term or what is learned was not finite.
    """
    groups = _groups(unit, config, rounding, steps)
    if not groups or count == 0:
        return []
    for quantizer in unit.steps:
        quantizer.on = steps
    device = groups[0].tensors[0].device
    begin, exponents = betas(config, count, unit.weights.scale[0]) if rounding and unit.weights.v else (count, None)
    fixed = None if rounding else unit.weights.hard()
    falling = torch.cos(torch.linspace(0, math.pi, count + 1, dtype=torch.float64))[:-1].add(1).div(2)
    tables = [
        (group.lr * (falling if group.cosine else torch.ones_like(falling))).float().to(device) for group in groups
    ]
    rates = [table[0].clone() for table in tables]
    optimizer = torch.optim.Adam(
        [{"params": group.tensors, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        lr=rates[0],
        capturable=device.type == "cuda",
    )
    learned = [tensor for group in groups for tensor in group.tensors]
    batch = min(config.batch, len(data.target))

    def read(chosen: Tensor) -> list[Tensor]:
        rounded = [rows[chosen] for rows in data.rounded]
        if config.qdrop == 0:
            return rounded
        keys = unit.keys[len(unit.steps) :]
        places = zip(data.exact, data.rounded, rounded, keys, strict=True)
        return [x if e is r else qdrop(e[chosen], x, config.qdrop, key) for e, r, x, key in places]

    def step(n: int) -> Terms:
        for rate, table in zip(rates, tables, strict=True):
            rate.copy_(table[n])
        chosen = torch.randperm(len(data.target), generator=stage.stream("batch", n))[:batch]
        weights, regulariser = fixed, None
        if weights is None:
            weights, regulariser = unit.weights.soft(exponents[n] if exponents is not None and n >= begin else None)
        terms = {"mse": distance(unit(read(chosen), weights), data.target[chosen])}
        if regulariser is not None:
            terms["rounding"] = config.rounding * regulariser
        gradients = torch.autograd.grad(sum_terms(terms), learned, allow_unused=True)
        for tensor, gradient in zip(learned, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        with torch.no_grad():
            unit.keys[:, 1] += 1  # fresh draws, now that the backward has repeated these
            for group in groups:
                for tensor, floor in zip(group.tensors, group.floor, strict=False):
                    torch.maximum(tensor, floor, out=tensor)
        return terms

    state = State({"keys": unit.keys, **{str(i): tensor for i, tensor in enumerate(learned)}}, {"adam": optimizer})
    history = run_steps(stage, count, step, state, advice=ADVICE)
    for tensor in learned:
        tensor.grad = None
    return history


def _groups(unit: SoftUnit, config: ReconstructConfig, rounding: bool, steps: bool) -> list[Group]:
    weights = unit.weights
    groups = []
    if rounding:
        groups.append(Group(weights.v, config.lr_rounding))
        groups.append(Group(weights.scale, config.lr_weight_step, True, weights.floor))
    if steps:
        scales: list[Tensor] = [step.scale for step in unit.steps]
        groups.append(Group(scales, config.lr_activation_step, True, [step.floor for step in unit.steps]))
    return [group for group in groups if group.lr > 0 and group.tensors]
