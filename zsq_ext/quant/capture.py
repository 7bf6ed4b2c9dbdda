"""One capture serves everything: a network becomes a single functional graph with its own parameter names.

Sites, batch-norm taps, blocks and the classifier tail are read off this graph (``graph.py``); quantizers are inserted
into it (``prepare.py``). Nothing else ever looks at the caller's modules.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.export import Dim, export
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from zsq_ext.quant.graph import batch_norms, module_of

# what a model or the tracer can raise for reasons that lie in the model
_MODEL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


def capture(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """Captures ``model`` in eval mode as a functional graph over torch's ATen operators.

    The graph has a dynamic batch, keeps the model's parameter and buffer names, and has no in-place operator, no
    dropout and no training-mode switch left, so ``train()`` and ``eval()`` on it are harmless. It owns copies: the
    caller's model is not touched.

    Args:
        model: a network with one image batch in and one tensor (N, num_classes) out.
        example: an input batch (N >= 2, C, H, W) on the model's device; its values do not matter.

    Returns:
        A ``torch.fx.GraphModule``; ``module_of(node)`` names the module of the caller's model behind a node.

    Raises:
        ValueError: the model rejects the example, or does not return one (N, K) tensor.
        NotImplementedError: the model cannot be one graph (control flow that depends on the data, a fixed batch size)
            or has batch norms that the graph never runs or that have no running statistics.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture: model must be a torch.nn.Module, got {type(model).__name__}")
    # a hook is Python that may do anything and a graph is not: copies of hooks do not survive tracing either way
    own = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad(), _where_it_failed(own) as where:
        try:
            expected = own(example)
        except _MODEL_ERRORS as error:
            shape = tuple(example.shape)
            raise ValueError(
                f"capture: the model rejects an input of shape {shape} in {where()}: {_first_line(error)}"
            ) from error
        _check_output(expected, example)
        try:
            program = export(own, (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
        except _MODEL_ERRORS as error:
            raise NotImplementedError(
                f"capture: {where()} cannot be captured as one graph with a dynamic batch; control flow must not "
                f"depend on values and the batch size must stay free: {_first_line(error)}"
            ) from error
    module = _functional(program.module(check_guards=False))
    _check_batch_norms(own, module)
    with torch.no_grad():
        got = module(example)
    # not bitwise: a graph may pick another convolution algorithm than the eager model did
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise NotImplementedError("capture: the captured graph does not compute what the model computes")
    return module


def _check_output(output: object, example: torch.Tensor) -> None:
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"capture: the model must return one tensor of logits, got {type(output).__name__}")
    if output.ndim != 2 or output.shape[0] != example.shape[0]:
        raise ValueError(
            f"capture: the model must return logits of shape ({example.shape[0]}, num_classes), "
            f"got {tuple(output.shape)}"
        )


def _check_batch_norms(model: nn.Module, module: fx.GraphModule) -> None:
    """Every batch norm of the model must be in the graph, in eval mode, with running statistics."""
    taps = batch_norms(module)
    for tap in taps:
        if tap.training:
            raise NotImplementedError(
                f"capture: batch norm '{tap.name}' normalises by batch statistics (track_running_stats=False), "
                "so the network stores nothing to match"
            )
    run = {tap.name for tap in taps}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and name not in run:
            # a batch norm applied twice appears under its own name; one that never runs appears nowhere
            raise NotImplementedError(f"capture: batch norm '{name}' is never run by the model's forward")


@contextmanager
def _where_it_failed(model: nn.Module) -> Iterator:
    """Tracks the module being run; yields a function that says which one it was."""
    names = {id(layer): name for name, layer in model.named_modules()}
    running: list[str] = []

    def enter(layer: nn.Module, args: object) -> None:
        if id(layer) in names:
            running.append(f"module '{names[id(layer)]}' ({type(layer).__name__})" if names[id(layer)] else "the model")

    def leave(layer: nn.Module, args: object, output: object) -> None:
        if id(layer) in names and running:
            running.pop()

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield lambda: running[-1] if running else "the model"
    finally:
        for handle in handles:
            handle.remove()


def _functional(program: fx.GraphModule) -> fx.GraphModule:
    """Replaces in-place operators by their functional twins, drops no-ops, and returns the bare output."""
    graph = program.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _mutates(node):
            _make_functional(node, order)
        if node.target in (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    output = graph.output_node()
    (value,) = output.args[0]
    output.args = (value,)
    graph.set_codegen(fx.graph.CodeGen())  # plain forward(x) -> tensor instead of export's pytrees
    for node in list(graph.nodes):
        if node.op == "call_module" or (node.op == "get_attr" and not node.users):
            graph.erase_node(node)  # guards and counters
    graph.eliminate_dead_code()
    module = fx.GraphModule(program, graph, class_name="Captured")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _make_functional(node: fx.Node, order: dict[fx.Node, int]) -> None:
    target = node.target
    packet, name = target.overloadpacket, target._schema.name.split("::")[1]
    twin = getattr(torch.ops.aten, name.removesuffix("_"), None)
    changed = node.args[0] if node.args else None
    if not name.endswith("_") or twin is None or packet is twin or not isinstance(changed, fx.Node):
        raise NotImplementedError(f"capture: {_describe(node)} changes a tensor in place in a way that has no twin")
    # a view of the changed tensor that is read later would see the change in the model but not in the graph
    base = changed
    while _is_view(base) and isinstance(base.args[0], fx.Node):
        base = base.args[0]
        late = [u for u in base.users if order.get(u, 0) > order[node]]
        if late:
            raise NotImplementedError(f"capture: {_describe(node)} changes a view of a tensor that is read afterwards")
    for view in changed.users:
        if _is_view(view) and any(order.get(u, 0) > order[node] for u in view.users):
            raise NotImplementedError(
                f"capture: {_describe(node)} changes a tensor behind a view that is read afterwards"
            )
    node.target = getattr(twin, target._overloadname)
    for user in list(changed.users):
        if user is not node and order.get(user, 0) > order[node]:
            user.replace_input_with(changed, node)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return (
        node.op == "call_function"
        and schema is not None
        and not schema.is_mutable
        and any(r.alias_info is not None for r in schema.returns)
    )


def _describe(node: fx.Node) -> str:
    return f"operator {node.target} in module '{module_of(node)}'"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
