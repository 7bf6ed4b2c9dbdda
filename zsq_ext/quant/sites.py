"""Where quantizers go: the weights of a captured network, and its activations under each placement."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from zsq_ext.quant.graph import (
    ADDITIONS,
    BATCH_NORMS,
    GATES,
    LAYERS,
    RESHAPES,
    TRANSPOSED,
    aten,
    before_a_layer,
    calls,
    constants,
    is_activation,
    is_tensor,
    module_of,
    outputs,
    readers,
    swish_gate,
    through,
    through_quantizer,
)

# operators that pass values on, so that a grid before them is a grid after them; zero is on every grid
PASS_THROUGH = RESHAPES | {
    operator.getitem,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.amax.default,
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.channel_shuffle.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.upsample_nearest2d.vec,
    aten.flip.default,
    aten.roll.default,
}

# operators whose values are means of others
AVERAGES = {
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.mean.default,
    aten.mean.dim,
}


@dataclass(frozen=True)
class Weight:
    """One weight to quantize: the parameter, its output-channel axis, and the convolutions or linears that use it."""

    name: str
    node: str
    axis: int
    users: tuple[str, ...]


@dataclass(frozen=True)
class Activation:
    """One tensor to quantize: the node behind which the quantizer goes, and whether it is the image, what the last
    layers give (logits, boxes), or something between."""

    name: str
    node: str
    role: Literal["input", "activation", "output"]


def weights(module: fx.GraphModule) -> list[Weight]:
    """The weights of all convolutions and linears, in order of first use; a shared weight appears once."""
    users: dict[fx.Node, list[fx.Node]] = {}
    for node in calls(module, LAYERS):
        source = through_quantizer(node.args[1])
        if source.op == "get_attr":
            users.setdefault(source, []).append(node)
    return [
        Weight(
            name=str(source.target),
            node=source.name,
            axis=1 if layers[0].target in TRANSPOSED else 0,
            users=tuple(layer.name for layer in layers),
        )
        for source, layers in users.items()
    ]


def activations_after_relu(module: fx.GraphModule) -> list[Activation]:
    """The SynQ and GDFQ placement: behind every activation function and nowhere else.

    The gates of attention (sigmoid, softmax) are not activation functions here.
    """
    return [Activation(_site_name(n), n.name, "activation") for n in module.graph.nodes if is_activation(n)]


def activations_all_layers(module: fx.GraphModule) -> list[Activation]:
    """The hardware-friendly placement: the image, what leaves every layer and every addition, and the outputs.

    A layer is a convolution or linear with the batch norm and activation that follow it alone; an addition takes the
    activation that follows it alone. Pooling that averages and concatenation make new values and get their own site;
    what only passes values on (max-pooling, reshaping, splitting, padding) keeps the grid it reads.

    What the network returns is called ``output``, or ``output:<path>`` if it returns several tensors, such as
    ``output:boxes.0``. The role is "output" wherever no layer follows, so also for what a concatenation of heads joins,
    and not for a feature map that is returned on its way.
    """
    sites = []
    names: dict[fx.Node, str] = {}
    for path, leaf in outputs(module).items():
        names.setdefault(through(leaf), f"output:{path}" if path else "output")
    early = before_a_layer(module)
    fixed = constants(module.graph)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            sites.append(Activation("input", node.name, "input"))
        elif node not in fixed and _makes_values(node) and not _continues(node):
            role: Literal["activation", "output"] = "activation" if node in early else "output"
            sites.append(Activation(names.get(node) or _site_name(node), node.name, role))
    return sites


def activations_academic(module: fx.GraphModule) -> list[Activation]:
    """The placement of BRECQ's and Genie's tables: what leaves a layer or an addition and enters another layer.

    As ``activations_all_layers``, without the image, the logits, averaged values (what is averaged is on a grid) and
    what a branch hands to an addition alone, be it a block's last layer or the projection beside it: the sum is
    quantized, once, behind its activation.
    """
    by_name = {node.name: node for node in module.graph.nodes}
    return [
        site
        for site in activations_all_layers(module)
        if site.role == "activation"
        and by_name[site.node].target not in AVERAGES
        and not (
            by_name[site.node].target in LAYERS | BATCH_NORMS
            and all(user.target in ADDITIONS for user in readers(by_name[site.node]))
        )
    ]


def _makes_values(node: fx.Node) -> bool:
    if node.op != "call_function" or not is_tensor(node) or node.target in PASS_THROUGH:
        return False
    return node.meta["val"].is_floating_point() and node.meta["val"].ndim >= 2


def _continues(node: fx.Node) -> bool:
    """True if the next operator alone consumes this node and belongs to the same fused layer."""
    users = readers(node)
    swish = next((user for user in users if swish_gate(user) is not None), None)
    if swish is not None and set(users) <= {swish, swish_gate(swish)}:
        return node.target in GATES | LAYERS | BATCH_NORMS | ADDITIONS
    if len(users) != 1:
        return False
    (user,) = users
    if user.op != "call_function":
        return False
    if user.target in BATCH_NORMS:
        return node.target in LAYERS
    return is_activation(user) and node.target in LAYERS | BATCH_NORMS | ADDITIONS


def _site_name(node: fx.Node) -> str:
    return f"{module_of(node) or 'model'}:{node.name}"
