"""Reading a captured graph: batch-norm taps, quantization sites, blocks, feature maps and the classifier tail.

Every function is a pure reading of the graph and can be asked again after quantizers were inserted; nodes keep their
names, so a node name of the teacher is also the node of the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv_transpose2d.input,
}
LINEARS = {aten.linear.default}
BATCH_NORMS = {aten.batch_norm.default}
# relu and its clipped relatives: zero below, so that an unsigned grid fits
RELUS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default}
SMOOTH_ACTIVATIONS = {
    aten.leaky_relu.default,
    aten.elu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.mish.default,
}
ADDITIONS = {aten.add.Tensor}
# operators that pass values on, so that a grid before them is a grid after them
PASS_THROUGH = {
    aten.max_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.permute.default,
    aten.contiguous.default,
    aten.to.dtype,
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
    """A part of the network with one tensor in and one out, such as a residual unit."""

    name: str
    input: str
    output: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class ClassifierTail:
    """conv -> BN -> (+ shortcut) -> activation -> global average pool -> linear, the form of a closed CAM.

    ``features`` is the conv output (the map), ``pre_activation`` the tensor that enters the activation, ``activation``
    ``"relu"``, ``"relu6"`` or None, ``classifier`` the node that yields the classifier's weight (K, C).
    """

    features: str
    batch_norm: BatchNorm
    pre_activation: str
    activation: Literal["relu", "relu6"] | None
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
        found.append(
            BatchNorm(name, node.name, source.name, _attr(mean), _attr(var), _attr(weight), _attr(bias), eps, training)
        )
    return found


def weights(module: fx.GraphModule) -> list[Weight]:
    """The weights of all convolutions and linears, in order of first use; a shared weight appears once."""
    users: dict[fx.Node, list[fx.Node]] = {}
    for node in _calls(module, CONVOLUTIONS | LINEARS):
        source = node.args[1]
        if isinstance(source, fx.Node) and source.op == "call_module":
            source = source.args[0]  # behind the quantizer that stands there already
        if isinstance(source, fx.Node) and source.op == "get_attr":
            users.setdefault(source, []).append(node)
    return [
        Weight(
            name=str(source.target),
            node=source.name,
            axis=1 if layers[0].target is aten.conv_transpose2d.input else 0,
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
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", node.kwargs.get("min_val"))
    return low == 0


def is_activation(node: fx.Node) -> bool:
    return is_relu(node) or (node.op == "call_function" and node.target in SMOOTH_ACTIVATIONS)


def upper_bound(node: fx.Node) -> float | None:
    """Where a ReLU saturates: 6 for ReLU6, None for ReLU."""
    if node.target is aten.relu6.default:
        return 6.0
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max", node.kwargs.get("max_val"))
        return None if high is None else float(high)
    return None


def activations_after_relu(module: fx.GraphModule) -> list[Activation]:
    """The SynQ and GDFQ placement: behind every activation function and nowhere else."""
    return [Activation(_site_name(n), n.name, "activation") for n in module.graph.nodes if is_activation(n)]


def activations_all_layers(module: fx.GraphModule) -> list[Activation]:
    """The hardware-friendly placement: the image, what leaves every layer and every addition, and the logits.

    A layer is a convolution or linear with the batch norm and activation that follow it alone; an addition takes the
    activation that follows it alone. Pooling that averages and concatenation make new values and get their own site.
    """
    sites = []
    last = _last_value(module)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            sites.append(Activation("input", node.name, "input"))
        elif _makes_values(node) and not _continues(node):
            role: Literal["activation", "output"] = "output" if node is last else "activation"
            sites.append(Activation("output" if node is last else _site_name(node), node.name, role))
    return sites


def _makes_values(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in PASS_THROUGH and _is_float(node)


def _continues(node: fx.Node) -> bool:
    """True if the next operator alone consumes this node and belongs to the same fused layer."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    if user.op != "call_function":
        return False
    if user.target in BATCH_NORMS:
        return node.target in CONVOLUTIONS | LINEARS
    if is_activation(user):
        return node.target in CONVOLUTIONS | LINEARS | BATCH_NORMS | ADDITIONS
    return False


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_float(node: fx.Node) -> bool:
    return _is_tensor(node) and node.meta["val"].is_floating_point() and node.meta["val"].ndim >= 2


def feature_maps(module: fx.GraphModule) -> list[str]:
    """The maps that HAST's feature alignment compares: what a block's body yields before the shortcut is added.

    These are the batch norms without an activation behind them; a projection, which only feeds the shorter branch of an
    addition, is left out. A network without such blocks (VGG) gives every batch norm of an ordinary convolution.
    """
    linear = []
    for node in _calls(module, BATCH_NORMS):
        if any(is_activation(user) for user in node.users):
            continue
        if all(user.target in ADDITIONS and _shorter_branch(user) is node for user in node.users):
            continue
        linear.append(node.name)
    if linear:
        return linear
    return [n.name for n in _calls(module, BATCH_NORMS) if _groups(n.args[0]) == 1]


def blocks(module: fx.GraphModule) -> list[Block]:
    """Cuts the network wherever a single tensor carries everything on; pieces without weights join the one before."""
    last_use: dict[fx.Node, int] = {}
    compute = [n for n in module.graph.nodes if n.op in ("placeholder", "call_function", "call_module", "output")]
    flows = [n for n in compute if not _only_attributes(n)]
    for i, node in enumerate(flows):
        for source in node.all_input_nodes:
            last_use[source] = i
    pieces: list[list[fx.Node]] = [[]]
    alive: set[fx.Node] = set()
    for i, node in enumerate(flows):
        if node.op == "output":
            break
        alive = {n for n in alive if last_use.get(n, -1) > i}
        if _is_tensor(node):  # a batch size is alive too, but carries nothing
            alive.add(node)
        pieces[-1].append(node)
        if alive == {node}:
            pieces.append([])
    entry = pieces[0][-1]
    found: list[tuple[fx.Node, list[fx.Node]]] = []
    for piece in (p for p in pieces[1:] if p):
        if found and not any(n.target in CONVOLUTIONS | LINEARS for n in piece):
            found[-1][1].extend(piece)
        else:
            found.append((entry, list(piece)))
        entry = piece[-1]
    owner = {user: weight.name for weight in weights(module) for user in weight.users}
    return [
        Block(
            name=_common_module([n for n in nodes if n.name in owner]) or nodes[-1].name,
            input=source.name,
            output=nodes[-1].name,
            weights=tuple(owner[n.name] for n in nodes if n.name in owner),
        )
        for source, nodes in found
    ]


def classifier_tail(module: fx.GraphModule) -> ClassifierTail | None:
    """The tail that admits the closed-form CAM, or None if the network ends otherwise."""
    head = _last_value(module)
    if head.target not in LINEARS:
        return None
    pool = _through(head.args[0])
    if pool.target not in GLOBAL_POOLS or not _is_global(pool):
        return None
    node = _through_quantizer(pool.args[0])
    activation: Literal["relu", "relu6"] | None = None
    if is_relu(node):
        bound = upper_bound(node)
        if bound not in (None, 6.0):
            return None
        activation, node = ("relu" if bound is None else "relu6"), _through_quantizer(node.args[0])
    pre_activation = node
    if node.target in ADDITIONS:
        shorter = _shorter_branch(node)
        node = next(arg for arg in node.args if arg is not shorter)
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


def _last_value(module: fx.GraphModule) -> fx.Node:
    return _through_quantizer(module.graph.output_node().args[0])


def _through_quantizer(node: fx.Node) -> fx.Node:
    while node.op == "call_module":
        node = node.args[0]
    return node


def _through(node: fx.Node) -> fx.Node:
    """Back over quantizers and reshapes."""
    while node.op == "call_module" or node.target in PASS_THROUGH:
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
    """The operand of a residual addition with fewer layers behind it up to the fork: the shortcut."""
    operands = [arg for arg in addition.args[:2] if isinstance(arg, fx.Node)]
    if len(operands) != 2:
        return None
    depth = [_depths(arg) for arg in operands]
    common = set(depth[0]) & set(depth[1])
    if not common:
        return None
    lengths = [min(d[n] for n in common) for d in depth]
    return operands[0] if lengths[0] <= lengths[1] else operands[1]


def _depths(node: fx.Node) -> dict[fx.Node, int]:
    """Every ancestor with the least number of convolutions on the way to it, the node itself with 0."""
    best = {node: 0}
    for current in reversed(list(node.graph.nodes)):  # nodes are in execution order: users come before sources here
        if current not in best:
            continue
        step = 1 if current.op == "call_function" and current.target in CONVOLUTIONS else 0
        for source in current.all_input_nodes:
            if source.op != "get_attr":
                best[source] = min(best.get(source, best[current] + step), best[current] + step)
    return best


def _only_attributes(node: fx.Node) -> bool:
    """A weight's quantizer: it depends on parameters alone."""
    sources = node.all_input_nodes
    return node.op == "call_module" and bool(sources) and all(n.op == "get_attr" for n in sources)


def _common_module(nodes: list[fx.Node]) -> str:
    """The innermost module that holds all the nodes."""
    paths = [module_of(n).split(".") for n in nodes]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
