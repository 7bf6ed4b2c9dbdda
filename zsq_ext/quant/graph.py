"""Reading a captured graph: its operators, its batch norms, and what lies behind a reshape or a quantizer.

Every function here, in ``sites.py`` and in ``structure.py`` is a pure reading of the graph and can be asked again after
quantizers were inserted; nodes keep their names, so a node name of the teacher is also the node of the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
RELUS = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clip.default,
    aten.threshold.default,
}
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


def calls(module: fx.GraphModule, targets: set) -> list[fx.Node]:
    """All calls of these operators, in execution order."""
    return [n for n in module.graph.nodes if n.op == "call_function" and n.target in targets]


def batch_norms(module: fx.GraphModule) -> list[BatchNorm]:
    """All batch norms in execution order."""
    found = []
    for node in calls(module, BATCH_NORMS):
        source, weight, bias, mean, var, training, _, eps, *_ = node.args
        name = (_attr(mean) or _attr(weight) or node.name).rpartition(".")[0] or module_of(node)
        source = through_quantizer(source)
        found.append(
            BatchNorm(name, node.name, source.name, _attr(mean), _attr(var), _attr(weight), _attr(bias), eps, training)
        )
    return found


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """What dicts, lists and tuples hold, by its path: ``{"boxes": [a, b]}`` gives ``boxes.0`` and ``boxes.1``.

    What is none of them has the empty path.

    Raises:
        ValueError: two paths are the same, as those of ``{"a": [x], "a.0": y}``.
    """
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in items:
        for name, leaf in leaves(item, f"{path}.{key}" if path else key).items():
            if name in found:
                raise ValueError(f"leaves: keys must give every tensor a path of its own, got {name!r} twice")
            found[name] = leaf
    return found


def outputs(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes whose tensors the network returns, by their path: ``""`` alone where it returns one tensor."""
    return leaves(module.graph.output_node().args[0])


def is_classifier(module: fx.GraphModule) -> bool:
    """True if the network returns logits: one tensor (N, K). Every other network is seen as heads without classes."""
    output = module.graph.output_node().args[0]
    return isinstance(output, fx.Node) and output.meta["val"].ndim == 2


def is_relu(node: fx.Node) -> bool:
    """ReLU, ReLU6 or a clamp that is one of them."""
    if node.op != "call_function" or node.target not in RELUS:
        return False
    if node.target in (aten.relu.default, aten.relu6.default):
        return True
    if node.target is aten.threshold.default:
        return node.args[1] == 0 and node.args[2] == 0
    return len(node.args) > 1 and node.args[1] == 0


def is_activation(node: fx.Node) -> bool:
    """An activation function, or the product x * sigmoid(x) that some networks write for SiLU."""
    if node.op != "call_function":
        return False
    return is_relu(node) or node.target in OTHER_ACTIVATIONS or swish_gate(node) is not None


def swish_gate(node: fx.Node) -> fx.Node | None:
    """The sigmoid of a product x * sigmoid(x)."""
    if node.target is not aten.mul.Tensor:
        return None
    operands = [through_quantizer(arg) for arg in node.args if isinstance(arg, fx.Node)]
    for value, gate in (operands, operands[::-1]) if len(operands) == 2 else ():
        if gate.op == "call_function" and gate.target in GATES and through_quantizer(gate.args[0]) is value:
            return gate
    return None


def upper_bound(node: fx.Node) -> float | None:
    """Where a ReLU saturates: 6 for ReLU6, None for ReLU."""
    if node.target is aten.relu6.default:
        return 6.0
    if node.target in (aten.hardtanh.default, aten.clamp.default, aten.clip.default):
        high = node.args[2] if len(node.args) > 2 else None
        return None if high is None else float(high)
    return None


def is_tensor(node: fx.Node) -> bool:
    """False for a size, and for a list of tensors."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the values of this node, behind its quantizer if it has one; asking for a size is not reading."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.op == "call_module":
            found += readers(user)
        elif user.target is not aten.sym_size.int:
            found.append(user)
    return found


def before_a_layer(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values a convolution or linear reads, at once or later; the other layers are the last ones."""
    found: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        users = [user for user in node.users if user.target is not aten.sym_size.int]
        if any(user in found or (user.op == "call_function" and user.target in LAYERS) for user in users):
            found.add(node)
    return found


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Parameters, buffers, and what does not depend on the image, such as a quantized weight."""
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
    return fixed


def through_quantizer(node: fx.Node) -> fx.Node:
    """Back over a quantizer, if the node is one."""
    while node.op == "call_module":
        node = node.args[0]
    return node


def through(node: fx.Node) -> fx.Node:
    """Back over quantizers and reshapes."""
    while node.op == "call_module" or node.target in RESHAPES:
        node = node.args[0]
    return node


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


def _attr(node: object) -> str | None:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None
