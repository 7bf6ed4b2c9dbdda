"""Data-Free Quantization Through Weight Equalization and Bias Correction. Nagel et al., ICCV 2019, arXiv 1906.04721.

Neither images nor training: the network is rewritten so that it quantizes well, and its batch norms say what its
activations look like.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.graph import (
    LAYERS,
    RESHAPES,
    TRANSPOSED,
    BatchNorm,
    aten,
    attribute,
    batch_norms,
    calls,
    find,
    is_relu,
    readers,
    through_quantizer,
    upper_bound,
)
from zsq_ext.quant.modules import ActivationQuantizer, calibrating
from zsq_ext.quant.prepare import plan, prepare
from zsq_ext.quant.sites import AVERAGES
from zsq_ext.tune.moments import MAX_POOLS, Moments, expected, moments


@dataclass(frozen=True)
class DfqConfig:
    """The paper's constants, and how long equalisation goes on."""

    sigmas: float = 6.0  # section 5: activation ranges are beta +- 6 gamma
    absorbed: float = 3.0  # section 4.1.3: c = max(0, beta - 3 gamma)
    tolerance: float = 1e-4  # equalisation ends when no factor is further from 1 (ours: "until convergence")
    sweeps: int = 1000  # or after so many
    correct: bool = True  # section 4.2: bias correction

    def __post_init__(self) -> None:
        for name in ("sigmas", "tolerance"):
            require("DfqConfig", name, getattr(self, name), getattr(self, name) > 0, "be positive")
        for name in ("absorbed", "sweeps"):
            require("DfqConfig", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear with its folded batch norm.

    ``shift`` (O,) is what is added behind the weight: the batch norm's beta, or else the layer's own bias, or None.
    """

    node: fx.Node
    weight: Tensor
    norm: BatchNorm | None
    shift: Tensor | None

    @property
    def end(self) -> str:
        """The node that yields the layer's output."""
        return self.node.name if self.norm is None else self.norm.node


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing between them but what commutes with positive factors per channel.

    ``plain``: that is one ReLU and no padding, so that constants can move through too.
    """

    first: Layer
    second: Layer
    plain: bool


Normals = dict[str, tuple[Tensor, Tensor]]
"""Mean and standard deviation of what batch norms yield, by node."""


class Rewritten(NamedTuple):
    """A float network that quantizes well, its layers, and what its batch norms yield."""

    network: fx.GraphModule
    layers: list[Layer]
    normals: Normals


@torch.no_grad()
def rewrite(teacher: fx.GraphModule, config: DfqConfig) -> Rewritten:
    """A copy of the teacher, folded, equalised and with its high biases absorbed: the same function, but for those."""
    network = copy.deepcopy(teacher)
    layers, normals = fold(network)
    joined = pairs(network, layers)
    equalise(joined, normals, config)
    absorb(joined, normals, config)
    return Rewritten(network, layers, normals)


def dfq(
    teacher: fx.GraphModule,
    qconfig: QConfig,
    config: DfqConfig | None = None,
    *,
    images: Sequence[Tensor] = (),
    image_range: tuple[float, float] | None = None,
    rewritten: Rewritten | None = None,
) -> fx.GraphModule:
    """Folds, equalises, absorbs high biases, quantizes and corrects biases.

    ReLU6 is no multiple of itself, and replacing it by ReLU (as the paper does) would be another network than the one
    a saved state is loaded into; so what lies on its two sides is not equalised.

    Args:
        teacher: the captured float network; not changed.
        qconfig: bits and placement.
        config: the paper's constants by default.
        images: batches (N, C, H, W) for the activation ranges; without them the batch norms say them.
        image_range: the least and largest value of an image, in the network's normalised space, where it is quantized
            and there are no ``images``.
        rewritten: what ``rewrite`` gave, for a caller who wants the float network too.

    Returns:
        A prepared network with ranges. Its float weights are the rewritten ones: batch norms behind a convolution have
        mean 0, variance 1 - eps and gamma 1, so that its state has the teacher's names and shapes.

    Raises:
        ValueError: no batch norm tells the range of an activation, naming it.
    """
    config = config or DfqConfig()
    if len(images) == 0:
        check_ranges(teacher, qconfig)
    network, layers, normals = rewritten or rewrite(teacher, config)
    with torch.no_grad():
        student = prepare(network, qconfig)
        known = moments(network, normals, config.sigmas, image_range)
        if config.correct:
            correct_biases(student, layers, known)
        if len(images) > 0:
            with calibrating(student):
                for batch in images:
                    student(batch)
        else:
            set_ranges(student, known)
    return student


@torch.no_grad()
def fold(network: fx.GraphModule) -> tuple[list[Layer], Normals]:
    """Moves every batch norm behind a layer into the layer's weight, in place: the same function.

        W' = a W,   beta' = beta + a (b - mean),   a = gamma / sqrt(var + eps)

    A batch norm without an affine part has nowhere to keep its shift, and stays.

    Returns:
        All layers with a weight of their own, in execution order, and what the batch norms yield.
    """
    norms = {norm.input: norm for norm in batch_norms(network) if norm.mean is not None}
    normals = {norm.node: _normal(network, norm) for norm in norms.values()}
    found = calls(network, LAYERS - TRANSPOSED)
    used = [str(node.args[1].target) for node in found]
    layers = []
    for node in found:
        if node.args[1].op != "get_attr" or used.count(str(node.args[1].target)) > 1:
            continue
        weight, norm = attribute(network, str(node.args[1].target)), norms.get(node.name)
        bias = node.args[2] if len(node.args) > 2 else None
        shift = attribute(network, str(bias.target)) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
        if norm is not None and norm.weight and norm.bias and len(readers(node)) == 1:
            mean, var, gamma, beta = (attribute(network, str(n)) for n in (norm.mean, norm.var, norm.weight, norm.bias))
            a = gamma / (var + norm.eps).sqrt()
            beta.add_(a * ((0 if shift is None else shift) - mean))
            weight.mul_(_rows(a, weight))
            if shift is not None:
                shift.zero_()
            mean.zero_()
            var.fill_(1 - norm.eps)
            gamma.fill_(1)
            layers.append(Layer(node, weight, norm, beta))
        else:
            layers.append(Layer(node, weight, None, shift))
    return layers, normals


def pairs(network: fx.GraphModule, layers: list[Layer]) -> list[Pair]:
    """The neighbours that can be equalised, in execution order."""
    by_node = {layer.node: layer for layer in layers}
    found = []
    for first in layers:
        node, passed = find(network, first.end), []
        while True:
            users = readers(node)
            if len(users) != 1 or not _homogeneous(users[0]):
                break
            node = users[0]
            passed.append(node)
        second = by_node.get(users[0]) if len(users) == 1 else None
        if second is not None and users[0].args[0] is node:
            plain = len(passed) == 1 and is_relu(passed[0]) and not _pads(second.node)
            found.append(Pair(first, second, plain and first.shift is not None and second.shift is not None))
    return found


@torch.no_grad()
def equalise(joined: list[Pair], normals: Normals, config: DfqConfig) -> None:
    """Cross-layer equalisation, in place: the same function, with both sides of each channel equally wide.

        s_i = sqrt(r1_i r2_i) / r2_i,   W1 <- W1 / s,   b1 <- b1 / s,   W2 <- W2 s

    with r the largest absolute weight of output channel i of the first layer and of input channel i of the second
    (equations 8 to 12), sweep by sweep until no factor moves.
    """
    for _ in range(config.sweeps):
        furthest = 0.0
        for pair in joined:
            first, second = pair.first, pair.second
            r1 = first.weight.flatten(1).abs().amax(1)
            r2 = _widths_of_inputs(second.weight, len(r1))
            s = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1)  # a dead channel has no width to share
            first.weight.div_(_rows(s, first.weight))
            if first.shift is not None:
                first.shift.div_(s)
            if first.end in normals:
                mean, std = normals[first.end]
                normals[first.end] = mean / s, std / s
            second.weight.mul_(_per_input(s, second.weight))
            furthest = max(furthest, float((s - 1).abs().max()))
        if furthest <= config.tolerance:
            return


@torch.no_grad()
def absorb(joined: list[Pair], normals: Normals, config: DfqConfig) -> None:
    """High biases move through a ReLU into the next layer, in place.

        c = max(0, beta - 3 gamma),   b1 <- b1 - c,   b2 <- b2 + W2 c

    Exact where the activation stays above c, which under the normal it does but for one in 741. Where the next layer
    pads with zeros, c would be missing at the borders: such pairs are left alone.
    """
    for pair in joined:
        first, second = pair.first, pair.second
        if not pair.plain or first.end not in normals or first.shift is None or second.shift is None:
            continue
        mean, std = normals[first.end]
        c = (mean - config.absorbed * std).clamp_min(0)
        first.shift.sub_(c)
        second.shift.add_(expected(second.weight, c))
        normals[first.end] = mean - c, std


@torch.no_grad()
def correct_biases(student: fx.GraphModule, layers: list[Layer], known: dict[str, Moments]) -> None:
    """Takes out what rounding the weights adds to the mean of a layer's output.

        b <- b - (Q(W) - W) E[x]

    with E[x] the mean of the layer's input, from the batch norms before it (equation 17). The padding's zeros are not
    counted, as in the paper.
    """
    for layer in layers:
        source = known.get(through_quantizer(layer.node.args[0]).name)
        if source is None or layer.shift is None:
            continue
        node = find(student, layer.node.name)
        weight = attribute(student, str(layer.node.args[1].target))
        rounded = student.get_submodule(str(node.args[1].target))(weight)
        bias = str(node.args[2].target) if layer.norm is None else str(layer.norm.bias)
        attribute(student, bias).sub_(expected(rounded - weight, source.mean))


def check_ranges(teacher: fx.GraphModule, qconfig: QConfig) -> None:
    """Refuses a network with an activation of which its batch norms tell nothing.

    Raises:
        ValueError: there is one, naming it.
    """
    normals = {norm.node: _normal(teacher, norm) for norm in batch_norms(teacher) if norm.mean is not None}
    known = moments(teacher, normals, DfqConfig.sigmas)
    for site in plan(teacher, qconfig):
        if site.kind == "activation" and site.node not in known:
            raise ValueError(
                f"dfq: images must be given where no batch norm tells an activation's range, got none for {site.name!r}"
            )


def set_ranges(student: fx.GraphModule, known: dict[str, Moments]) -> None:
    """Every activation's range from the widest of its channels."""
    for node in student.graph.nodes:
        quantizer = student.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(quantizer, ActivationQuantizer):
            continue
        seen = known[node.args[0].name]
        lo, hi = min(float(seen.lo.min()), 0.0), max(float(seen.hi.max()), 0.0)
        quantizer.set_range(lo, hi if hi > lo else lo + 1e-8)


def _normal(network: fx.GraphModule, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """beta and |gamma| of a batch norm."""
    like = attribute(network, str(norm.mean))
    beta = attribute(network, norm.bias).detach().clone() if norm.bias else torch.zeros_like(like)
    gamma = attribute(network, norm.weight).detach().abs() if norm.weight else torch.ones_like(like)
    return beta, gamma


def _rows(per_output: Tensor, weight: Tensor) -> Tensor:
    return per_output.view(-1, *[1] * (weight.ndim - 1))


def _widths_of_inputs(weight: Tensor, inputs: int) -> Tensor:
    """The largest absolute weight of every input channel, (inputs,), of a layer (O, I / groups, ...)."""
    groups = inputs // weight.shape[1]
    widest = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    return widest.reshape(groups, -1, weight.shape[1]).amax(1).flatten()


def _per_input(factors: Tensor, weight: Tensor) -> Tensor:
    """A factor per input channel, shaped to broadcast over a layer's weight."""
    groups, (outputs, inputs, *places) = len(factors) // weight.shape[1], weight.shape
    spread = factors.view(groups, 1, inputs).expand(groups, outputs // groups, inputs)
    return spread.reshape(outputs, inputs, *[1] * len(places))


def _homogeneous(node: fx.Node) -> bool:
    """True if the operator treats every channel alone and commutes with positive factors."""
    if node.op != "call_function":
        return False
    if is_relu(node):
        return upper_bound(node) is None
    if node.target in RESHAPES | AVERAGES | MAX_POOLS:
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
        return len(after) >= 2 and bool(before[1] == after[1])
    return node.target is aten.leaky_relu.default


def _pads(node: fx.Node) -> bool:
    if node.target is aten.linear.default:
        return False
    padding = node.args[4] if len(node.args) > 4 else 0
    if isinstance(padding, str):
        return padding != "valid"
    return any(int(p) for p in (padding if isinstance(padding, (list, tuple)) else (padding,)))
