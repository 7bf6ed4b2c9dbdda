"""From a captured network and a configuration to the fake-quantized network."""

from __future__ import annotations

import copy
import difflib
import operator
from dataclasses import dataclass

from torch import fx

from zsq_ext.ops import fake_quant_minmax
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.graph import LAYERS, attribute, before_a_layer, calls, find
from zsq_ext.quant.modules import ActivationQuantizer, WeightQuantizer, weight_range
from zsq_ext.quant.sites import (
    Activation,
    Weight,
    activations_academic,
    activations_after_relu,
    activations_all_layers,
    weights,
)

PLACED = {
    "after_relu": activations_after_relu,
    "all_layers": activations_all_layers,
    "academic": activations_academic,
}

IMAGE_BITS = 8
"""An image comes as bytes, whatever the network makes of it: at 3 bits it is another image."""


@dataclass(frozen=True)
class Site:
    """One quantizer of a prepared network: what it quantizes, at which node, to how many bits."""

    name: str
    kind: str  # "weight" or "activation"
    node: str
    bits: int
    axis: int | None


def plan(module: fx.GraphModule, config: QConfig) -> list[Site]:
    """All sites of a captured network under a configuration, in execution order, weights first.

    Raises:
        ValueError: ``config.sites`` names a site that does not exist, or the network has nothing to quantize.
    """
    found = weights(module)
    if not found:
        raise ValueError("plan: the network has no convolution or linear layer with a parameter to quantize")
    sites = []
    early = before_a_layer(module)
    last = [layer for layer in calls(module, LAYERS) if layer not in early]
    ends = {layer.name for layer in last}
    for weight in found:
        edge = weight is found[0] or not ends.isdisjoint(weight.users)
        bits = config.edge_bits if edge and config.edge_bits is not None else config.w_bits
        sites.append(Site(weight.name, "weight", weight.node, config.sites.get(weight.name, bits), weight.axis))
    if config.a_bits is not None:
        activations = PLACED[config.placement](module)
        if not activations:
            raise ValueError(f"plan: the network has no activation to quantize under placement {config.placement!r}")
        at_edge = _read_by(last, activations)
        if config.placement == "academic":
            at_edge |= _behind(module, found[0], activations)
        for site in activations:
            edge = site.role == "output" or site.node in at_edge
            bits = config.edge_bits if edge and config.edge_bits is not None else config.a_bits
            if site.role == "input":
                bits = IMAGE_BITS
            sites.append(Site(site.name, "activation", site.node, config.sites.get(site.name, bits), None))
    names = {site.name for site in sites}
    for name in config.sites:
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), 3)
            hint = f"close to it: {', '.join(near)}" if near else f"they are {_some([site.name for site in sites])}"
            raise ValueError(f"plan: sites must name sites of the network, got {name!r}; {hint}")
    return sites


def _some(names: list[str]) -> str:
    """The names, or the first few of many."""
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])}, ... {names[-1]} ({len(names)} in all)"


def prepare(module: fx.GraphModule, config: QConfig) -> fx.GraphModule:
    """A fake-quantized copy of a captured network; its parameters are latent float weights that can be trained.

    Activation ranges are empty until the network has run under ``calibrating``. Parameter names stay, quantizers are
    found under ``quantizers.<node>``.

    Args:
        module: what ``capture`` returned. It is not changed.
        config: bits, placement and range rules.

    Returns:
        A ``torch.fx.GraphModule`` that survives deepcopy, ``state_dict``, ``torch.compile`` and DDP.

    Raises:
        ValueError: see ``plan``.
    """
    sites = plan(module, config)
    student = copy.deepcopy(module)
    device = next(student.parameters()).device
    for site in sites:
        node = find(student, site.node)
        quantizer: WeightQuantizer | ActivationQuantizer
        if site.axis is None:
            quantizer = ActivationQuantizer(site.name, site.bits, config.a_range, config.beta)
        else:
            weight = attribute(student, site.name)
            frozen = weight_range(weight, site.axis, site.bits, config.w_range)
            quantizer = WeightQuantizer(site.name, site.bits, site.axis, frozen)
        _insert_behind(student, node, f"quantizers.{site.node}", quantizer.to(device))
    student.graph.lint()
    student.recompile()
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    return student


def weights_together(student: fx.GraphModule) -> fx.GraphModule:
    """The same network, parameters and quantizers shared, that quantizes all its live weights by one call per forward.

    For training loops: the same bits and gradients in less time. Nodes keep their names; the quantizers of these
    weights are modules no more. Weights whose ranges are frozen keep theirs.

    Args:
        student: what ``prepare`` returned.
    """
    live: dict[object, list[tuple[fx.Node, WeightQuantizer]]] = {}
    for node in student.graph.nodes:
        quantizer = student.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, WeightQuantizer) and quantizer.lo is None:
            weight = attribute(student, str(node.args[0].target))
            live.setdefault((weight.dtype, weight.device), []).append((node, quantizer))
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for found in live.values():
        for node, _ in found:
            copied[node.args[0]] = graph.node_copy(node.args[0])
        sources = [copied[node.args[0]] for node, _ in found]
        bits, axes = [quantizer.bits for _, quantizer in found], [quantizer.axis for _, quantizer in found]
        together = graph.call_function(fake_quant_minmax, (sources, bits, axes))
        for i, (node, _) in enumerate(found):
            copied[node] = graph.create_node("call_function", operator.getitem, (together, i), name=node.name)
    graph.output(graph.graph_copy(student.graph, copied))
    graph.lint()
    return fx.GraphModule(student, graph, class_name="Together")


def _read_by(layers: list[fx.Node], activations: list[Activation]) -> set[str]:
    """The nodes of the activations whose values reach one of the layers with no other layer between."""
    nodes = {site.node for site in activations}
    todo, found = [layer.args[0] for layer in layers], set()
    while todo:
        node = todo.pop()
        if node.name in nodes:
            found.add(node.name)
        elif node.target not in LAYERS:
            todo += node.all_input_nodes
    return found


def _behind(module: fx.GraphModule, weight: Weight, activations: list[Activation]) -> set[str]:
    """The nodes of the activations that the layer of that weight yields, with no other layer between."""
    nodes = {site.node for site in activations}
    todo, found = [find(module, weight.users[0])], set()
    while todo:
        node = todo.pop()
        if node.name in nodes:
            found.add(node.name)
        else:
            todo += [user for user in node.users if user.target not in LAYERS]
    return found


def _insert_behind(
    student: fx.GraphModule, node: fx.Node, path: str, quantizer: WeightQuantizer | ActivationQuantizer
) -> None:
    """Every reader of ``node`` reads ``quantizer(node)`` from now on."""
    student.add_submodule(path, quantizer)
    with student.graph.inserting_after(node):
        new = student.graph.call_module(path, (node,))
    new.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
