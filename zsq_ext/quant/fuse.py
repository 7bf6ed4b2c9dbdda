"""Batch norms and what follows them as one op each: the same network in fewer passes over its activations.

A chain is a batch norm, the addition that alone reads it, the activation that alone reads that, and the quantizer of
its values; what somebody else reads stays a node of its own. So taps come first: ``fuse(with_taps(module, names))``.
A tap of which only the channel energies are wanted is no reader: they come from the sums over the batch norm's input.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from zsq_ext.ops import bn_act, channel_energy
from zsq_ext.quant.graph import ADDITIONS, BATCH_NORMS, aten, is_relu, upper_bound
from zsq_ext.quant.modules import ActivationQuantizer

_ACTS = {aten.silu.default: "silu", aten.hardswish.default: "hardswish"}


@dataclass(frozen=True)
class _Chain:
    """What becomes one op: its nodes from the batch norm on, the shortcut, the activation's name, the quantizer."""

    nodes: tuple[fx.Node, ...]
    residual: fx.Node | None
    act: str
    quantizer: fx.Node | None


def bn_act_quantized(quantizer: ActivationQuantizer, u: Tensor, *norm: Any, **how: Any) -> Any:
    """``bn_act`` and the quantizer of its values: one op while the range stands still, two while it is moved.

    What it is moved by comes from the first one's read.
    """
    if not quantizer.observing:
        return bn_act(u, *norm, **how, quant=quantizer.params(u.dtype), quant_grad="ste")
    y, *sums, lo, hi = bn_act(u, *norm, **how, extremes=True)
    y = quantizer(y, (lo, hi))
    return (y, *sums) if sums else y


def fuse(module: fx.GraphModule, energies: int = 0) -> fx.GraphModule:
    """The same network with ``bn_act`` in the place of every batch norm and what follows it alone.

    Parameters and quantizers are shared; a quantizer inside an op is still calibrated by ``calibrating``.

    Values differ from the module's in the last bits: torch rounds a batch norm's products and sums in another order,
    each of the two a few times, so every normalised value moves by a few units in the last place of its largest term.

    Args:
        module: a captured, prepared or tapped network.
        energies: so many of the first taps, all of them batch norms, are given as their channel energies (N, C): the
            mean squares over the places, read off the batch norm's input, so that these taps are no readers.
    """
    return _fused(module, None, energies)[0]


def fuse_with_statistics(module: fx.GraphModule, per_image: Collection[str] = ()) -> fx.GraphModule:
    """As ``fuse``, and shows the statistics of every batch norm's input on the way.

    Args:
        module: a captured, prepared or tapped network.
        per_image: the batch norms (node names) whose sums are those of each image.

    Returns:
        A module whose forward gives ``(output, (S1, ...), (S2, ...))``: the sums of ``bn_act``, shifted by the stored
        means, one (C_l,) each per batch norm in execution order; (N, C_l) of those in ``per_image``.
    """
    fused, sums = _fused(module, "batch", per_image=per_image)
    output = fused.graph.output_node()
    output.args = ((output.args[0], tuple(s1 for s1, _ in sums), tuple(s2 for _, s2 in sums)),)
    fused.graph.lint()
    fused.recompile()
    return fused


def _fused(
    module: fx.GraphModule, stats: str | None, energies: int = 0, per_image: Collection[str] = ()
) -> tuple[fx.GraphModule, list[tuple[fx.Node, fx.Node]]]:
    graph = fx.Graph()
    output = graph.output(graph.graph_copy(module.graph, {}))
    tapped: tuple[fx.Node, ...] = ()
    if energies:
        result, taps = output.args[0]
        tapped = taps[:energies]
        output.args = ((result, taps[energies:]),)
    sums, energy = [], {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in BATCH_NORMS:
            continue
        chain = _chain(module, node)
        u, gamma, beta, mean, var, _, _, eps, *_ = node.args
        last = chain.nodes[-1]
        with graph.inserting_before(last):
            each = node in tapped or node.name in per_image
            how = {"residual": chain.residual, "act": chain.act, "stats": "sample" if each else stats}
            norm_args: tuple[Any, ...] = u, mean, var, gamma, beta, eps
            if chain.quantizer is None:
                new = graph.call_function(bn_act, norm_args, how)
            else:
                quantizer = graph.get_attr(str(chain.quantizer.target))
                new = graph.call_function(bn_act_quantized, (quantizer, *norm_args), how)
            y = new
            if how["stats"] is not None:
                y, s1, s2 = (graph.call_function(operator.getitem, (new, i)) for i in range(3))
                sums.append((s1, s2))
            if node in tapped:
                places = math.prod(int(n) for n in node.meta["val"].shape[2:])
                energy[node] = graph.call_function(channel_energy, (s1, s2, places, var, gamma, beta, eps))
        y.meta = last.meta
        last.replace_all_uses_with(y)
        for old in reversed(chain.nodes):
            graph.erase_node(old)
    if energies:
        result, taps = output.args[0]
        output.args = ((result, (*(energy[node] for node in tapped), *taps)),)
    graph.lint()
    return fx.GraphModule(module, graph, class_name="Fused"), sums


def _chain(module: fx.GraphModule, norm: fx.Node) -> _Chain:
    nodes, residual = [norm], None
    addition = _only_reader(norm)
    if addition is not None and addition.target in ADDITIONS:
        other = _shortcut(addition, norm)
        if other is not None:
            nodes.append(addition)
            residual = other
    activation = _only_reader(nodes[-1])
    act = "none" if activation is None else _act(activation)
    if activation is not None and act != "none":
        nodes.append(activation)
    quantizer = _only_reader(nodes[-1])
    if quantizer is not None and _is_quantizer(module, quantizer):
        nodes.append(quantizer)
    else:
        quantizer = None
    return _Chain(tuple(nodes), residual, act, quantizer)


def _is_quantizer(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), ActivationQuantizer)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shortcut(addition: fx.Node, norm: fx.Node) -> fx.Node | None:
    """What is added to the batch norm, if it is a tensor of the same shape and type, added as it is."""
    if len(addition.args) != 2 or addition.kwargs.get("alpha", 1) != 1:
        return None
    other = addition.args[1] if addition.args[0] is norm else addition.args[0]
    if not isinstance(other, fx.Node) or other is norm:
        return None
    mine, theirs = norm.meta["val"], other.meta.get("val")
    if theirs is None or mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return None
    return other


def _act(node: fx.Node) -> str:
    """The activation's name in ``bn_act``, "none" for what it does not have."""
    if is_relu(node):
        return {None: "relu", 6.0: "relu6"}.get(upper_bound(node), "none")
    return _ACTS.get(node.target, "none") if node.op == "call_function" else "none"
