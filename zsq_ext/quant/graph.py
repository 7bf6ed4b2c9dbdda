"""Reading a captured graph: batch-norm taps, quantization sites, blocks, feature maps and the classifier tail.

Every function is a pure reading of the graph and can be asked again after quantizers were inserted; nodes keep their
names, so a node name of the teacher is also the node of the student.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
LINEARS = {aten.linear.default}
LAYERS = CONVOLUTIONS | LINEARS
BATCH_NORMS = {aten.batch_norm.default}
# relu and its clipped relatives: zero below, so that an unsigned grid fits
RELUS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default}
OTHER_ACTIVATIONS = {
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.elu.default,
    aten.selu.default,
    aten.celu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.mish.default,
    aten.softplus.default,
    aten.tanh.default,
}
GATES = {aten.sigmoid.default, aten.hardsigmoid.default}
ADDITIONS = {aten.add.Tensor}
# operators that only arrange values
RESHAPES = {
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
}
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
GLOBAL_POOLS = {aten.adaptive_avg_pool2d.default, aten.mean.dim, aten.avg_pool2d.default}


@dataclass(frozen=True)
class BatchNorm:
    """One batch norm in execution order.

    ``input`` is the node whose output it normalises, ``node`` the batch norm itself; ``mean`` and ``var`` are the
    buffer names of its running statistics, ``weight`` and ``bias`` of its affine part (None without one).
    """

    name: str
    node: str
    input: str
    mean: str | None
    var: str | None
    weight: str | None
    bias: str | None
    eps: float
    training: bool


@dataclass(frozen=True)
class Weight:
    """One weight to quantize: the parameter, its output-channel axis, and the convolutions or linears that use it."""

    name: str
    node: str
    axis: int
    users: tuple[str, ...]


@dataclass(frozen=True)
class Activation:
    """One tensor to quantize: the node behind which the quantizer goes, and whether it can be negative."""

    name: str
    node: str
    role: Literal["input", "activation", "output"]


@dataclass(frozen=True)
class Block:
    """A part of the network with one tensor in and one out, such as a residual unit.

    ``input`` and ``output`` are nodes: each block reads what the one before it yields. A weight that two blocks share
    is listed by both.
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


def module_of(node: fx.Node) -> str:
    """The dotted name of the module of the captured model that made this node ('' for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of that dotted name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def find(module: fx.GraphModule, name: str) -> fx.Node:
    """The node of that name."""
    for node in module.graph.nodes:
        if node.name == name:
            return node
    raise KeyError(f"find: the graph has no node '{name}'")


def batch_norms(module: fx.GraphModule) -> list[BatchNorm]:
    """All batch norms in execution order."""
    found = []
    for node in _calls(module, BATCH_NORMS):
        source, weight, bias, mean, var, training, _, eps, *_ = node.args
        name = (_attr(mean) or _attr(weight) or node.name).rpartition(".")[0] or module_of(node)
        source = _through_quantizer(source)
        found.append(
            BatchNorm(name, node.name, source.name, _attr(mean), _attr(var), _attr(weight), _attr(bias), eps, training)
        )
    return found


def weights(module: fx.GraphModule) -> list[Weight]:
    """The weights of all convolutions and linears, in order of first use; a shared weight appears once."""
    users: dict[fx.Node, list[fx.Node]] = {}
    for node in _calls(module, LAYERS):
        source = _through_quantizer(node.args[1])
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


def is_relu(node: fx.Node) -> bool:
    """ReLU, ReLU6 or a clamp that is one of them."""
    if node.op != "call_function" or node.target not in RELUS:
        return False
    if node.target in (aten.relu.default, aten.relu6.default):
        return True
    return len(node.args) > 1 and node.args[1] == 0


def is_activation(node: fx.Node) -> bool:
    """An activation function, or the product x * sigmoid(x) that some networks write for SiLU."""
    if node.op != "call_function":
        return False
    return is_relu(node) or node.target in OTHER_ACTIVATIONS or _swish_gate(node) is not None


def _swish_gate(node: fx.Node) -> fx.Node | None:
    """The sigmoid of a product x * sigmoid(x)."""
    if node.target is not aten.mul.Tensor:
        return None
    operands = [_through_quantizer(arg) for arg in node.args if isinstance(arg, fx.Node)]
    for value, gate in (operands, operands[::-1]) if len(operands) == 2 else ():
        if gate.op == "call_function" and gate.target in GATES and _through_quantizer(gate.args[0]) is value:
            return gate
    return None


def upper_bound(node: fx.Node) -> float | None:
    """Where a ReLU saturates: 6 for ReLU6, None for ReLU."""
    if node.target is aten.relu6.default:
        return 6.0
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        high = node.args[2] if len(node.args) > 2 else None
        return None if high is None else float(high)
    return None


def activations_after_relu(module: fx.GraphModule) -> list[Activation]:
    """The SynQ and GDFQ placement: behind every activation function and nowhere else.

    The gates of attention (sigmoid, softmax) are not activation functions here.
    """
    return [Activation(_site_name(n), n.name, "activation") for n in module.graph.nodes if is_activation(n)]


def activations_all_layers(module: fx.GraphModule) -> list[Activation]:
    """The hardware-friendly placement: the image, what leaves every layer and every addition, and the logits.

    A layer is a convolution or linear with the batch norm and activation that follow it alone; an addition takes the
    activation that follows it alone. Pooling that averages and concatenation make new values and get their own site;
    what only passes values on (max-pooling, reshaping, splitting, padding) keeps the grid it reads.
    """
    sites = []
    last = _through(module.graph.output_node().args[0])
    constants = _constants(module.graph)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            sites.append(Activation("input", node.name, "input"))
        elif node not in constants and _makes_values(node) and not _continues(node):
            role: Literal["activation", "output"] = "output" if node is last else "activation"
            sites.append(Activation("output" if node is last else _site_name(node), node.name, role))
    return sites


def _makes_values(node: fx.Node) -> bool:
    if node.op != "call_function" or not _is_tensor(node) or node.target in PASS_THROUGH:
        return False
    return node.meta["val"].is_floating_point() and node.meta["val"].ndim >= 2


def _continues(node: fx.Node) -> bool:
    """True if the next operator alone consumes this node and belongs to the same fused layer."""
    users = _users(node)
    swish = next((user for user in users if _swish_gate(user) is not None), None)
    if swish is not None and set(users) <= {swish, _swish_gate(swish)}:
        return node.target in GATES | LAYERS | BATCH_NORMS | ADDITIONS
    if len(users) != 1:
        return False
    (user,) = users
    if user.op != "call_function":
        return False
    if user.target in BATCH_NORMS:
        return node.target in LAYERS
    return is_activation(user) and node.target in LAYERS | BATCH_NORMS | ADDITIONS


def _users(node: fx.Node) -> list[fx.Node]:
    """Who reads the values of this node, behind its quantizer if it has one; asking for a size is not reading."""
    users: list[fx.Node] = []
    for user in node.users:
        if user.op == "call_module":
            users += _users(user)
        elif user.target is not aten.sym_size.int:
            users.append(user)
    return users


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def feature_maps(module: fx.GraphModule) -> list[str]:
    """The maps that HAST's feature alignment compares: what a block's body yields before the shortcut is added.

    These are the batch norms without an activation behind them; a projection, which only feeds the shorter branch of an
    addition, is left out. A network without such blocks (VGG) gives every batch norm of an ordinary convolution.
    """
    linear = []
    for node in _calls(module, BATCH_NORMS):
        if any(is_activation(user) for user in _users(node)):
            continue
        if all(user.target in ADDITIONS and _shorter_branch(user) is node for user in _users(node)):
            continue
        linear.append(node.name)
    if linear:
        return linear
    return [n.name for n in _calls(module, BATCH_NORMS) if _groups(n.args[0]) == 1]


def blocks(module: fx.GraphModule) -> list[Block]:
    """The parts that block reconstruction tunes one after the other.

    Cuts wherever a single tensor carries everything on, so that a residual unit stays whole; pieces without weights
    join the one before. An inverted residual without a shortcut is one chain of convolutions with such a cut behind
    each; it is taken as one block all the same (as BRECQ does), because its output, a linear bottleneck, is where the
    network was designed to carry everything on.
    """
    pieces = _linear_bottlenecks(_pieces(module))
    owner = {user: weight.name for weight in weights(module) for user in weight.users}
    found, entry = [], next(node for node in module.graph.nodes if node.op == "placeholder")
    for piece in pieces:
        layers = [node for node in piece if node.name in owner]
        names = dict.fromkeys(owner[node.name] for node in layers)  # once each, in order
        # layers of a model that is one flat module have no module in common
        name = _common_module(layers) or next(n.name for n in reversed(piece) if n.op == "call_function")
        found.append(Block(name, entry.name, piece[-1].name, tuple(names)))
        entry = piece[-1]
    return found


def _pieces(module: fx.GraphModule) -> list[list[fx.Node]]:
    """The operators of the network between its bottlenecks, each piece with at least one layer."""
    constants = _constants(module.graph)
    flow = [n for n in module.graph.nodes if n.op != "get_attr" and n not in constants and n.op != "output"]
    last_use: dict[fx.Node, int] = {module.graph.output_node().args[0]: len(flow)}
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
        if alive == {node} and _is_tensor(node):
            pieces.append([])
    joined: list[list[fx.Node]] = []
    before: list[fx.Node] = []  # what comes before the first layer, such as a normalisation of the image
    for piece in pieces:
        if any(n.target in LAYERS for n in piece):
            joined.append(before + piece)
            before = []
        elif joined:
            joined[-1].extend(piece)
        else:
            before = before + piece
    return joined


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
    head = _through_quantizer(module.graph.output_node().args[0])
    if head.target not in LINEARS:
        return None
    pool = _through(head.args[0])
    if pool.target not in GLOBAL_POOLS or not _is_global(pool):
        return None
    node = _through_quantizer(pool.args[0])
    if not is_relu(node) or upper_bound(node) not in (None, 6.0):
        return None
    activation: Literal["relu", "relu6"] = "relu" if upper_bound(node) is None else "relu6"
    node = _through_quantizer(node.args[0])
    pre_activation = node
    if node.target in ADDITIONS:
        shorter = _shorter_branch(node)
        operands = [_through_quantizer(arg) for arg in node.args if isinstance(arg, fx.Node)]
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
    for node in reversed(list(_calls(module, CONVOLUTIONS))):
        shape = node.meta["val"].shape
        if len(shape) == 4 and int(shape[2]) * int(shape[3]) > 1:
            return node.name
    return None


def with_taps(module: fx.GraphModule, names: list[str] | tuple[str, ...]) -> fx.GraphModule:
    """The same network, parameters shared, that also returns intermediate tensors.

    Returns:
        A module whose forward gives ``(output, (tensor, ...))``, one tensor per name, inside the autograd graph.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, copied)
    by_name = {node.name: new for node, new in copied.items()}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise KeyError(f"with_taps: the graph has no node {missing[0]!r}")
    graph.output((result, tuple(by_name[name] for name in names)))
    return fx.GraphModule(module, graph, class_name="Tapped")


def _calls(module: fx.GraphModule, targets: set) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "call_function" and n.target in targets]


def _attr(node: object) -> str | None:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _site_name(node: fx.Node) -> str:
    return f"{module_of(node) or 'model'}:{node.name}"


def _through_quantizer(node: fx.Node) -> fx.Node:
    while node.op == "call_module":
        node = node.args[0]
    return node


def _through(node: fx.Node) -> fx.Node:
    """Back over quantizers and reshapes."""
    while node.op == "call_module" or node.target in RESHAPES:
        node = node.args[0]
    return node


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
    operands = [_through_quantizer(arg) for arg in addition.args[:2] if isinstance(arg, fx.Node)]
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
    constants = _constants(node.graph)
    for current in reversed(list(node.graph.nodes)):  # nodes are in execution order: users come before sources here
        if current not in best:
            continue
        step = 1 if current.op == "call_function" and current.target in CONVOLUTIONS else 0
        for source in current.all_input_nodes:
            if source not in constants:
                best[source] = min(best.get(source, best[current] + step), best[current] + step)
    return best


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Parameters, buffers, and what does not depend on the image, such as a quantized weight."""
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and constants.issuperset(node.all_input_nodes):
            constants.add(node)
    return constants


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and not _is_tensor(node) and not isinstance(node.meta.get("val"), (list, tuple))


def _common_module(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that holds all the nodes."""
    paths = [module_of(n).split(".") for n in nodes]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
