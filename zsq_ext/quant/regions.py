"""The parts of a network whose end has several outputs: residual units and single layers, each one tensor in, one out.

Behind the point where a feature pyramid takes its first map, several tensors are alive at every place, so no cut leaves
one of them. What is found here instead are the closed regions of the graph: nothing enters one but the values of one
node, nothing but the values of one leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from zsq_ext.quant.graph import ADDITIONS, BATCH_NORMS, LAYERS, aten, constants, is_activation, is_tensor, readers

_JOINS = ADDITIONS | {aten.cat.default}


@dataclass(frozen=True)
class Region:
    """A closed region: it reads ``entry`` and is read by others at ``exit`` alone; ``nodes`` in execution order."""

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]


def regions(piece: list[fx.Node]) -> list[Region]:
    """Residual units, and single layers where there is none; both with the batch norm and activation that follow.

    A unit ends in an addition (or concatenation) and begins where its branches part; it holds no other unit, so what
    joins a pyramid's levels is none. Operators without weights may belong to no unit.

    Args:
        piece: the nodes of a part of a graph that reads one tensor from before it, in execution order.
    """
    if not piece:
        return []
    fixed = constants(piece[0].graph)
    fixed |= {node for node in piece if not _sources(node, fixed)}  # sizes, and what is made of them alone
    order = {node: i for i, node in enumerate(piece)}
    origin = _origins(piece, fixed)
    found: list[Region] = []
    taken: set[fx.Node] = set()
    for node in piece:
        if node.target in _JOINS and len(set(_sources(node, fixed))) > 1:
            nodes = _between(origin[node], node, fixed)
            if nodes and taken.isdisjoint(nodes) and _closed(nodes, node) and _layers(nodes):
                nodes |= _with_what_follows(node)
                taken |= nodes
                found.append(_region(origin[node], nodes, order))
    for node in piece:
        if node.op == "call_function" and node.target in LAYERS and node not in taken:
            found.append(_region(node.args[0], _with_what_follows(node), order))
    return sorted(found, key=lambda unit: order[unit.exit])


def _region(entry: fx.Node, nodes: set[fx.Node], order: dict[fx.Node, int]) -> Region:
    inside = tuple(sorted(nodes, key=order.__getitem__))
    return Region(entry, inside[-1], inside)


def _sources(node: fx.Node, fixed: set[fx.Node]) -> list[fx.Node]:
    """Whose values a node reads; parameters and sizes are none."""
    if node.target is aten.sym_size.int:
        return []
    return [n for n in node.all_input_nodes if n not in fixed and (is_tensor(n) or _is_list(n))]


def _is_list(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))


def _origins(piece: list[fx.Node], fixed: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The last node that all ways to a node lead through: its immediate dominator (Cooper, Harvey and Kennedy 2001)."""
    origin: dict[fx.Node, fx.Node] = {}
    depth: dict[fx.Node, int] = {}
    for node in piece:
        if node in fixed:
            continue
        common, *others = _sources(node, fixed)
        for source in (common, *others):
            depth.setdefault(source, 0)  # the tensor from before the piece
        for other in others:
            while common is not other:
                if depth[common] >= depth[other]:
                    common = origin[common]
                else:
                    other = origin[other]
        origin[node], depth[node] = common, depth[common] + 1
    return origin


def _between(first: fx.Node, last: fx.Node, fixed: set[fx.Node]) -> set[fx.Node]:
    """The nodes on all ways from ``first`` to ``last``, ``last`` included."""
    found, todo = {last}, [last]
    while todo:
        fresh = [n for n in _sources(todo.pop(), fixed) if n is not first and n not in found]
        found.update(fresh)
        todo += fresh
    return found


def _closed(nodes: set[fx.Node], last: fx.Node) -> bool:
    """True if nobody else reads what is inside; asking for a size is not reading."""
    inside = nodes - {last}
    return all(user in nodes or user.target is aten.sym_size.int for node in inside for user in node.users)


def _layers(nodes: set[fx.Node]) -> bool:
    return any(node.op == "call_function" and node.target in LAYERS for node in nodes)


def _with_what_follows(node: fx.Node) -> set[fx.Node]:
    """A node and the batch norm and activation that alone read it, with the quantizers behind each."""
    chain = _with_quantizer(node)
    while len(users := readers(node)) == 1 and (users[0].target in BATCH_NORMS or is_activation(users[0])):
        (node,) = users
        chain |= _with_quantizer(node)
        if is_activation(node):
            break
    return chain


def _with_quantizer(node: fx.Node) -> set[fx.Node]:
    return {node, *(user for user in node.users if user.op == "call_module")}
