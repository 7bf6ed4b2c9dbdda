"""The parts of a network that reconstruction tunes one after the other, and each as a network of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from zsq_ext.quant.graph import ADDITIONS, BATCH_NORMS, LAYERS, aten, calls, find, is_activation, outputs, readers
from zsq_ext.quant.modules import ActivationQuantizer
from zsq_ext.quant.sites import weights
from zsq_ext.quant.structure import blocks

GRANULARITIES = ("block", "layer")


@dataclass(frozen=True)
class Unit:
    """A part that yields one tensor from those of earlier parts, or from the image.

    ``inputs`` and ``output`` are nodes of the captured network; in the student they mean what their quantizers yield.
    """

    name: str
    inputs: tuple[str, ...]
    output: str


def units(teacher: fx.GraphModule, granularity: str) -> list[Unit]:
    """The whole network as units in execution order.

    Args:
        teacher: a captured network.
        granularity: ``"block"``: residual units and single layers, as ``quant.structure.blocks`` cuts them.
            ``"layer"``: one convolution or linear with the batch norm, addition and activation that follow it alone.

    A unit ends with the last thing that a layer does: pooling and reshaping behind it are done by its reader, so that
    units are compared where there is most to compare. Where several heads are returned joined or reshaped, what joins
    them is a unit without weights, which has only ranges to find.
    """
    returned = outputs(teacher)
    ends = _block_ends(teacher) if granularity == "block" else _layer_ends(teacher)
    if len(returned) == 1:
        ends[-1] = ends[-1][0], *returned.values()
    else:
        known = {end for _, end in ends}
        ends += [(f"output {path}", leaf) for path, leaf in returned.items() if leaf not in known]
    found: list[Unit] = []
    stops = {node for node in teacher.graph.nodes if node.op == "placeholder"}
    for name, end in ends:
        found.append(Unit(name, tuple(node.name for node in _sources(end, stops)), end.name))
        stops.add(end)
    return found


def between(module: fx.GraphModule, inputs: Sequence[str], output: str) -> fx.GraphModule:
    """What a network computes between some of its nodes and another, as a network that shares its parameters.

    Returns:
        A module whose forward takes one tensor per name in ``inputs``, all of one batch, and gives that of ``output``.

    Raises:
        KeyError: there is no such node, or the output needs an input of the network that ``inputs`` does not cover.
    """
    stops = [find(module, name) for name in inputs]
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for stop in stops:
        copied[stop] = graph.placeholder(stop.name)
        copied[stop].meta = dict(stop.meta)
    end = find(module, output)
    needed = _needed(end, set(stops))
    for node in module.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            raise KeyError(f"between: '{output}' reads '{node.name}', which inputs {list(inputs)} do not cover")
        if _is_batch_size(node):
            copied[node] = graph.call_function(aten.sym_size.int, (copied[stops[0]], 0))
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[end])
    graph.lint()
    return fx.GraphModule(module, graph, class_name="Unit")


def quantized(student: fx.GraphModule, name: str) -> str:
    """The node that yields a tensor as its readers get it: that of the quantizer behind it, if there is one."""
    node = find(student, name)
    for user in node.users:
        if user.op == "call_module" and isinstance(student.get_submodule(str(user.target)), ActivationQuantizer):
            return user.name
    return name


def _block_ends(teacher: fx.GraphModule) -> list[tuple[str, fx.Node]]:
    ends = []
    for block in blocks(teacher):
        node = find(teacher, block.output)
        while not (node.target in LAYERS | BATCH_NORMS | ADDITIONS or is_activation(node)):
            if len(node.all_input_nodes) != 1:
                node = find(teacher, block.output)
                break
            node = node.all_input_nodes[0]
        ends.append((block.name, node))
    return ends


def _layer_ends(teacher: fx.GraphModule) -> list[tuple[str, fx.Node]]:
    place = {node: i for i, node in enumerate(teacher.graph.nodes)}
    owner = {user: weight.name for weight in weights(teacher) for user in weight.users}
    ends = []
    for layer in calls(teacher, LAYERS):
        if layer.name not in owner:
            continue
        norm = _follow(layer, lambda user: user.target in BATCH_NORMS)
        end = _follow(norm, lambda user: user.target in ADDITIONS)
        if any(place[source] > place[norm] for source in end.all_input_nodes if end is not norm):
            end = norm  # of two branches the one that is computed last takes the addition
        ends.append((owner[layer.name].removesuffix(".weight"), _follow(end, is_activation)))
    return ends


def _follow(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> fx.Node:
    """The only reader of a node if it is wanted, else the node."""
    users = readers(node)
    return users[0] if len(users) == 1 and wanted(users[0]) else node


def _is_batch_size(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is aten.sym_size.int and node.args[1] == 0


def _needed(end: fx.Node, stops: set[fx.Node]) -> set[fx.Node]:
    """What has to be computed for a node where some others are known; the size of a batch is always known."""
    todo, needed = [end], set()
    while todo:
        node = todo.pop()
        if node not in stops and node not in needed:
            needed.add(node)
            todo += [] if _is_batch_size(node) else node.all_input_nodes
    return needed


def _sources(end: fx.Node, stops: set[fx.Node]) -> list[fx.Node]:
    """The stops that a node is computed from, in execution order."""
    needed = _needed(end, stops)
    read = {source for node in needed if not _is_batch_size(node) for source in node.all_input_nodes}
    return [node for node in end.graph.nodes if node in read & stops]
