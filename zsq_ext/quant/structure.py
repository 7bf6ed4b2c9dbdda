"""The shape of a captured network: residual blocks, the maps inside them, the classifier's tail, the heads."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from zsq_ext.quant.graph import (
    ADDITIONS,
    BATCH_NORMS,
    CONVOLUTIONS,
    LAYERS,
    LINEARS,
    BatchNorm,
    aten,
    batch_norms,
    calls,
    constants,
    find,
    is_activation,
    is_classifier,
    is_relu,
    is_tensor,
    module_of,
    outputs,
    readers,
    through,
    through_quantizer,
    upper_bound,
)
from zsq_ext.quant.regions import regions
from zsq_ext.quant.sites import weights

GLOBAL_POOLS = {aten.adaptive_avg_pool2d.default, aten.mean.dim, aten.avg_pool2d.default}
JOINS = {aten.cat.default, aten.stack.default}
PARTS = {
    operator.getitem,
    aten.chunk.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
}


@dataclass(frozen=True)
class Block:
    """A part of the network with one tensor in and one out, such as a residual unit.

    ``input`` and ``output`` are nodes: each block reads what the one before it yields, or, in a network with several
    outputs, what any earlier node does. A weight that two blocks share is listed by both.
    """

    name: str
    input: str
    output: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class ClassifierTail:
    """conv -> BN -> (+ shortcut) -> ReLU or ReLU6 -> global average pool -> linear, the form of a closed CAM.

    ``features`` is the conv output (the map), ``pre_activation`` the tensor that enters the activation, ``classifier``
    the node that yields the classifier's weight (K, C), in a prepared network the quantized one.
    """

    features: str
    batch_norm: BatchNorm
    pre_activation: str
    activation: Literal["relu", "relu6"]
    classifier: str


def feature_maps(module: fx.GraphModule) -> list[str]:
    """The maps that HAST's feature alignment compares: what a block's body yields before the shortcut is added.

    These are the batch norms without an activation behind them; a projection, which only feeds the shorter branch of an
    addition, is left out. A network without such blocks (VGG) gives every batch norm of an ordinary convolution.
    """
    linear = []
    for node in calls(module, BATCH_NORMS):
        if any(is_activation(user) for user in readers(node)):
            continue
        if all(user.target in ADDITIONS and _shorter_branch(user) is node for user in readers(node)):
            continue
        linear.append(node.name)
    if linear:
        return linear
    return [n.name for n in calls(module, BATCH_NORMS) if _groups(n.args[0]) == 1]


def blocks(module: fx.GraphModule) -> list[Block]:
    """The parts that block reconstruction tunes one after the other.

    Cuts wherever a single tensor carries everything on, so that a residual unit stays whole; pieces without weights
    join the one before. An inverted residual without a shortcut is one chain of convolutions with such a cut behind
    each; it is taken as one block all the same (as BRECQ does), because its output, a linear bottleneck, is where the
    network was designed to carry everything on.

    Behind the last cut of a network with several outputs, such as a detector's pyramid and heads, each residual unit
    and each other layer is a block of its own; what joins the levels (additions, upsampling) belongs to none.
    """
    pieces, rest = _pieces(module)
    owner = {user: weight.name for weight in weights(module) for user in weight.users}
    found, entry = [], next(node for node in module.graph.nodes if node.op == "placeholder")

    def add(entry: fx.Node, nodes: Sequence[fx.Node]) -> None:
        layers = [node for node in nodes if node.name in owner]
        names = dict.fromkeys(owner[node.name] for node in layers)  # once each, in order
        # layers of a model that is one flat module have no module in common
        name = _common_module(layers) or next(n.name for n in reversed(nodes) if n.op == "call_function")
        found.append(Block(name, entry.name, nodes[-1].name, tuple(names)))

    for piece in _linear_bottlenecks(pieces):
        add(entry, piece)
        entry = piece[-1]
    for region in regions(rest):
        add(region.entry, region.nodes)
    return found


def _pieces(module: fx.GraphModule) -> tuple[list[list[fx.Node]], list[fx.Node]]:
    """The operators of the network between its bottlenecks, each piece with at least one layer.

    And those behind the last bottleneck, which only a network with several outputs has.
    """
    fixed = constants(module.graph)
    flow = [n for n in module.graph.nodes if n.op != "get_attr" and n not in fixed and n.op != "output"]
    last_use = {leaf: len(flow) for leaf in outputs(module).values()}
    for i, node in enumerate(flow):
        for source in node.all_input_nodes if node.target is not aten.sym_size.int else ():
            last_use[source] = max(i, last_use.get(source, -1))
    pieces: list[list[fx.Node]] = [[]]
    alive: set[fx.Node] = set()
    for i, node in enumerate(flow):
        if node.op == "placeholder":
            alive.add(node)
            continue
        pieces[-1].append(node)
        alive = {n for n in alive | {node} if last_use.get(n, -1) > i and not _is_size(n)}
        if alive == {node} and is_tensor(node):
            pieces.append([])
    joined: list[list[fx.Node]] = []
    before: list[fx.Node] = []  # what comes before the first layer, such as a normalisation of the image
    for piece in pieces[:-1]:
        if any(n.target in LAYERS for n in piece):
            joined.append(before + piece)
            before = []
        elif joined:
            joined[-1].extend(piece)
        else:
            before = before + piece
    return joined, before + pieces[-1]


def _linear_bottlenecks(pieces: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Joins the chain that a module runs from its start to a batch norm without an activation behind it.

    Such a chain is short: expansion, depthwise convolution with its attention, projection. A whole network that happens
    to end in a batch norm is none.
    """
    joined: list[list[fx.Node]] = []
    whole: set[int] = set()  # pieces of `joined` that end in a bottleneck: nothing joins across it
    for at, piece in enumerate(pieces):
        joined.append(piece)
        if _ends_linear(piece):
            module = _common_module([n for n in piece if n.target in LAYERS | BATCH_NORMS])
            while module:
                inside = [i for i, p in enumerate(joined) if _inside(p, module)]
                after = at + 1 < len(pieces) and _inside(pieces[at + 1], module)
                if after or whole & set(inside):
                    break  # this module holds more than one such chain, and so do the modules around it
                if 1 < len(inside) <= 3:
                    joined[inside[0] :] = [[n for p in joined[inside[0] :] for n in p]]
                    break
                module = module.rpartition(".")[0]
            whole.add(len(joined) - 1)
    return joined


def _inside(piece: list[fx.Node], module: str) -> bool:
    return all(f"{module_of(n)}.".startswith(f"{module}.") for n in piece if n.target in LAYERS)


def _ends_linear(piece: list[fx.Node]) -> bool:
    """True if the last thing done to the values, apart from pooling, is a batch norm."""
    for node in reversed(piece):
        if node.target in BATCH_NORMS:
            return True
        if node.op == "call_function" and (node.target in LAYERS | ADDITIONS or is_activation(node)):
            return False
    return False


def classifier_tail(module: fx.GraphModule) -> ClassifierTail | None:
    """The tail that admits the closed-form CAM, or None if the network ends otherwise."""
    if not is_classifier(module):
        return None
    head = through_quantizer(module.graph.output_node().args[0])
    if head.target not in LINEARS:
        return None
    pool = through(head.args[0])
    if pool.target not in GLOBAL_POOLS or not _is_global(pool):
        return None
    node = through_quantizer(pool.args[0])
    if not is_relu(node) or upper_bound(node) not in (None, 6.0):
        return None
    activation: Literal["relu", "relu6"] = "relu" if upper_bound(node) is None else "relu6"
    node = through_quantizer(node.args[0])
    pre_activation = node
    if node.target in ADDITIONS:
        if node.kwargs.get("alpha", 1) != 1:  # a scaled branch scales its gradient too
            return None
        shorter = _shorter_branch(node)
        operands = [through_quantizer(arg) for arg in node.args if isinstance(arg, fx.Node)]
        if shorter is None or len(operands) != 2:
            return None
        node = operands[0] if operands[1] is shorter else operands[1]
    norms = {tap.node: tap for tap in batch_norms(module)}
    if node.name not in norms or norms[node.name].weight is None:
        return None
    conv = find(module, norms[node.name].input)
    if conv.target not in CONVOLUTIONS:
        return None
    return ClassifierTail(conv.name, norms[node.name], pre_activation.name, activation, head.args[1].name)


def cam_layer(module: fx.GraphModule) -> str | None:
    """The last convolution whose map is larger than 1 x 1, or None."""
    for node in reversed(list(calls(module, CONVOLUTIONS))):
        shape = node.meta["val"].shape
        if len(shape) == 4 and int(shape[2]) * int(shape[3]) > 1:
            return node.name
    return None


def _is_global(pool: fx.Node) -> bool:
    shape = pool.args[0].meta["val"].shape
    if pool.target is aten.adaptive_avg_pool2d.default:
        size = pool.args[1]
        return all(int(n) == 1 for n in (size if isinstance(size, (list, tuple)) else (size,)))
    if pool.target is aten.avg_pool2d.default:
        return [int(n) for n in shape[2:]] == [int(n) for n in pool.args[1]]
    return sorted(int(d) % len(shape) for d in pool.args[1]) == [2, 3]


def _groups(conv: fx.Node) -> int:
    if not isinstance(conv, fx.Node) or conv.target not in CONVOLUTIONS:
        return 1
    return int(conv.args[6]) if len(conv.args) > 6 else 1


def _shorter_branch(addition: fx.Node) -> fx.Node | None:
    """The operand of a residual addition with fewer layers behind it up to the fork: the shortcut; None for a tie."""
    operands = [through_quantizer(arg) for arg in addition.args[:2] if isinstance(arg, fx.Node)]
    if len(operands) != 2:
        return None
    depth = [_depths(arg) for arg in operands]
    common = set(depth[0]) & set(depth[1])
    if not common:
        return None
    lengths = [min(d[n] for n in common) for d in depth]
    if lengths[0] == lengths[1]:
        return None
    return operands[0] if lengths[0] < lengths[1] else operands[1]


def _depths(node: fx.Node) -> dict[fx.Node, int]:
    """Every ancestor with the least number of convolutions on the way to it, the node itself with 0."""
    best = {node: 0}
    fixed = constants(node.graph)
    for current in reversed(list(node.graph.nodes)):  # nodes are in execution order: users come before sources here
        if current not in best:
            continue
        step = 1 if current.op == "call_function" and current.target in CONVOLUTIONS else 0
        for source in current.all_input_nodes:
            if source not in fixed:
                best[source] = min(best.get(source, best[current] + step), best[current] + step)
    return best


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and not is_tensor(node) and not isinstance(node.meta.get("val"), (list, tuple))


def _common_module(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that holds all the nodes."""
    paths = [module_of(n).split(".") for n in nodes]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def heads(module: fx.GraphModule) -> list[str]:
    """The layers whose outputs are the network's outputs, back over what only arranges values, joins or quantizes them.

    Args:
        module: a captured or prepared network with one output, or any nesting of several.

    Returns:
        Node names in execution order, each once: the classifier's, or those of a detector's every head.

    Raises:
        ValueError: an output is computed by something else, naming it.
    """
    found = set()
    for output in module.graph.output_node().all_input_nodes:
        waiting = [output]
        while waiting:
            node = through(waiting.pop())
            if node.op == "call_function" and node.target in LAYERS:
                found.add(node.name)
            elif node.op == "call_function" and node.target in JOINS:
                waiting += node.args[0]
            elif node.op == "call_function" and node.target in PARTS:
                waiting.append(node.args[0])
            else:
                raise ValueError(
                    "heads: every output must come from a linear layer or a convolution, with nothing in between but "
                    f"reshapes and concatenations, got '{output.name}' from '{node.name}' ({node.op} {node.target})"
                )
    return [node.name for node in module.graph.nodes if node.name in found]
