"""From what the exporter gives to a bare graph: no in-place operator, no dropout, no guard, the model's own output."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from zsq_ext.quant.graph import aten, module_of

_DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}


def functional(program: fx.GraphModule, returned: pytree.TreeSpec) -> fx.GraphModule:
    """Replaces in-place operators by their functional twins, drops no-ops, and returns what the model returns."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.op == "call_function":
            _check_operator(node)
            if node.target in _DROPOUTS:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
    _remove_mutation(graph)
    for node in graph.nodes:
        if node.target is aten.view.default:  # which only some strides admit, and not channels_last
            node.target = aten.reshape.default
    output = graph.output_node()
    output.args = (_plain(pytree.tree_unflatten(list(output.args[0]), returned)),)
    graph.set_codegen(fx.graph.CodeGen())  # plain forward(x) instead of export's pytrees
    for node in reversed(list(graph.nodes)):
        # guards, counters, and assertions on dtype and device that a later .to() would break
        idle = node.op in ("call_module", "get_attr") or op_name(node).startswith(("_assert", "sym_constrain"))
        if idle and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    module = fx.GraphModule(program, graph, class_name="Captured")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def _plain(value: Any) -> Any:
    """Dicts, lists and tuples themselves: the graph's code can write no others."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain(item) for item in value)
    return value


def _check_operator(node: fx.Node) -> None:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise NotImplementedError(
            f"capture: {owner(node)} runs a part of itself under {op_name(node)} (an autocast or enable_grad region, "
            "or a branch that depends on values), which a plain graph cannot hold"
        )
    if node.target in _DROPOUTS and node.args[2]:
        raise NotImplementedError(f"capture: {owner(node)} applies dropout in eval mode, so its output is random")


def _remove_mutation(graph: fx.Graph) -> None:
    """Gives every in-place operator its functional twin.

    The tracer hands whoever reads the tensor later the operator's result, so the twin's value reaches them. It does not
    see that views of the tensor changed too: where one is read later, the change is refused.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # node -> the node that allocated what it looks at
    for node in graph.nodes:
        source = _looks_into(node)
        memory[node] = memory[source] if source is not None else node

    for node in list(graph.nodes):
        if not _mutates(node):
            continue
        changed = node.args[0] if node.args else None
        twin = _twin(node.target)
        if twin is None or not isinstance(changed, fx.Node):
            raise NotImplementedError(
                f"capture: {owner(node)} changes a tensor by {op_name(node)}, which has no functional twin"
            )
        names = [n for n in order if memory[n] is memory[changed] and order[n] < order[node]]
        if any(_reads(user) and order[user] > order[node] for name in names for user in name.users):
            raise NotImplementedError(
                f"capture: {owner(node)} changes a tensor in place by {op_name(node)} and reads it later through "
                "another view; write it without the in-place operator"
            )
        node.target = twin


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _twin(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    name = target._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


def _looks_into(node: fx.Node) -> fx.Node | None:
    """The node whose memory this one may share: what a view shows, a list holds, or an in-place operator changed."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is operator.getitem:
        return node.args[0]
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return node.args[0] if shares else None


def _reads(node: fx.Node) -> bool:
    """True unless it asks for a size only."""
    return node.target is not aten.sym_size.int


def owner(node: fx.Node) -> str:
    """The module that made a node, as a message says it."""
    name = module_of(node)
    return f"module '{name}'" if name else "the model"


def op_name(node: fx.Node) -> str:
    """The operator of a node, as a message says it."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else str(node.target)
