"""A unit while it is tuned: weights between two codes of their grids, and steps of activations that learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq_ext.ops import adaround_many, adaround_start, fake_quant, qdrop
from zsq_ext.quant.fuse import fuse
from zsq_ext.quant.graph import attribute
from zsq_ext.quant.modules import ActivationQuantizer, WeightQuantizer
from zsq_ext.tune.units import between

SMALLEST_STEP = 0.01
"""A learned step does not fall below this part of where it began, so that it stays a step."""


class LearnedStep(nn.Module):
    """An activation's quantizer while its step is learned; the zero-point stands still.

        y = qdrop(x, fake_quant(x))

    Args:
        quantizer: the calibrated quantizer it stands for.
        dtype: of the activation.
        drop: the probability of leaving an element as it is.
        key: (2,) int64, where the draws come from.

    Attributes:
        on: False lets everything pass.
    """

    def __init__(self, quantizer: ActivationQuantizer, dtype: torch.dtype, drop: float, key: Tensor) -> None:
        super().__init__()
        self.quantizer, self.drop, self.key, self.on = (quantizer,), drop, key, True  # in a tuple: no part of this one
        scale, self.zero_point, self.qmin, self.qmax = quantizer.params(dtype)
        self.scale, self.floor = nn.Parameter(scale.clone()), SMALLEST_STEP * scale

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return x
        x_hat = fake_quant(x, self.scale, self.zero_point, self.qmin, self.qmax, grad="lsq")
        return qdrop(x, x_hat, self.drop, self.key) if self.drop > 0 else x_hat

    def bake(self) -> None:
        """Hands the step to the quantizer."""
        self.quantizer[0].set_step(self.scale.detach())


class SoftWeights:
    """All weights of a unit between two codes of their grids.

    Args:
        weights: the parameters.
        quantizers: their quantizers, with frozen ranges.

    Attributes:
        v: rounding variables, as ``ops.adaround`` has them, the output channels first.
        scale, floor: steps, (C,) each, and what they do not fall below.
    """

    def __init__(self, weights: list[Tensor], quantizers: list[WeightQuantizer]) -> None:
        self._weights, self._quantizers = weights, quantizers
        self.v: list[Tensor] = []
        self.scale: list[Tensor] = []
        self.floor: list[Tensor] = []
        self._base: list[Tensor] = []
        self._grid: list[tuple[Tensor, int, int]] = []
        for weight, quantizer in zip(weights, quantizers, strict=True):
            scale, zero_point, qmin, qmax = quantizer.params(weight)
            rows = weight.detach().movedim(quantizer.axis, 0)
            base, v = adaround_start(rows, scale, zero_point, qmin, qmax)
            self.v.append(v.requires_grad_())
            self.scale.append(scale.clone().requires_grad_())
            self.floor.append(SMALLEST_STEP * scale)
            self._base.append(base)
            self._grid.append((zero_point, qmin, qmax))

    def soft(self, beta: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """The weights as they stand, differentiable in ``v`` and ``scale``, and the regulariser for an exponent."""
        if not self.v:
            return [], None
        found = self._call(self.scale, beta=beta)
        rows, regulariser = (found, None) if beta is None else found
        return self._placed(rows), regulariser

    @torch.no_grad()
    def hard(self) -> list[Tensor]:
        """The weights as they are rounded in the end."""
        return self._placed(self._call(self.scale, hard=True)) if self.v else []

    @torch.no_grad()
    def bake(self) -> None:
        """Rounds the parameters themselves, to grids that their quantizers reproduce to the last bit."""
        if not self.v:
            return
        for quantizer, weight, scale in zip(self._quantizers, self._weights, self.scale, strict=True):
            if not torch.equal(scale, quantizer.params(weight)[0]):  # what stands still stays as it is, to the last bit
                quantizer.set_step(scale)
        grids = [q.params(w)[0] for q, w in zip(self._quantizers, self._weights, strict=True)]
        for weight, value in zip(self._weights, self._placed(self._call(grids, hard=True)), strict=True):
            weight.copy_(value)

    def _call(self, scale: list[Tensor], **how: Any) -> Any:
        zero_points, lows, highs = zip(*self._grid, strict=True)
        return adaround_many(self.v, self._base, scale, zero_points, lows, highs, **how)

    def _placed(self, rows: list[Tensor]) -> list[Tensor]:
        return [value.movedim(0, q.axis) for value, q in zip(rows, self._quantizers, strict=True)]


class SoftUnit:
    """One unit of a student, cut out, with soft weights and learned steps in the place of the quantizers it owns.

    Args:
        student: a prepared network; the unit's activation ranges are calibrated.
        inputs, output: the nodes it lies between.
        weights: nodes of the weights' quantizers that it owns.
        activations: nodes of the activations' quantizers that it owns.
        drop: QDrop's probability inside the activations' quantizers.
        keys: (activations + inputs, 2) int64, where the draws come from: of the activations first, then of the inputs.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        inputs: list[str],
        output: str,
        weights: list[fx.Node],
        activations: list[fx.Node],
        drop: float,
        keys: Tensor,
    ) -> None:
        parameters = [attribute(student, str(node.args[0].target)) for node in weights]
        self.keys = keys
        self.weights = SoftWeights(parameters, [student.get_submodule(str(node.target)) for node in weights])
        net = between(student, [*inputs, *(node.name for node in weights)], output)
        self.steps = []
        dtype = next(student.parameters()).dtype
        for key, node in zip(keys, activations, strict=False):
            quantizer = student.get_submodule(str(node.target))
            step = LearnedStep(quantizer, dtype, drop, key)
            net.set_submodule(str(node.target), step)
            self.steps.append(step)
        self._net = fuse(net)

    def __call__(self, inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
        return self._net(*inputs, *weights)

    def bake(self) -> None:
        """Writes what was learned into the student."""
        self.weights.bake()
        for step in self.steps:
            step.bake()
