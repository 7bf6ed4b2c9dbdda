"""One capture serves everything: a network becomes a single functional graph with its own parameter names.

Batch-norm taps (``graph.py``), sites (``sites.py``), blocks and the classifier tail (``structure.py``) are read off
this graph; quantizers are inserted into it (``prepare.py``). Nothing else ever looks at the caller's modules.
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from zsq_ext.quant.frozen import thaw
from zsq_ext.quant.functional import functional, op_name, owner
from zsq_ext.quant.graph import CONVOLUTIONS, LINEARS, attribute, batch_norms, leaves, through

aten = torch.ops.aten

# what a model or the tracer can raise for reasons that lie in the model
_MODEL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)

# products that only a parameter makes a layer
_PRODUCTS = {
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
}


def capture(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Captures ``model`` in eval mode as a functional graph over torch's ATen operators.

    The graph has a dynamic batch, keeps the model's parameter and buffer names, and has no in-place operator, no
    dropout and no training-mode switch left, so ``train()`` and ``eval()`` on it are harmless. It owns copies: the
    caller's model is not touched. Its forward hooks run once, on a copy; a hook that only looks is left out of the
    graph, one that changes the output is part of it. A frozen batch norm, which detectors have, is captured as the
    batch norm that it equals.

    Args:
        model: a network with one image batch in and logits (N, num_classes) out, or heads: dicts, lists and tuples,
            nested as they like, of floating-point tensors whose first dimension is the batch. The graph returns the
            same; of a dict's or tuple's subclass it keeps what it holds.
        example: an input batch (N >= 2, C, H, W), floating point, on the device to work on; its values do not matter.

    Returns:
        A ``torch.fx.GraphModule``; ``module_of(node)`` names the module of the caller's model behind a node.

    Raises:
        TypeError: the model is not a module, or the example not a floating-point tensor.
        ValueError: the model has no parameters, cannot be copied, rejects the example, or does not return tensors of
            its batch.
        NotImplementedError: the model cannot be one graph (control flow that depends on the data, a fixed batch size,
            a tensor changed behind a view), computes a layer's weight while it runs, or has batch norms that it never
            runs or that keep no running statistics. The message names the module.
    """
    own = _own(model, example)
    with torch.no_grad(), _where_it_failed(own) as where:
        try:
            expected = own(example.clone())  # a clone, because a model may change its input in place
        except _MODEL_ERRORS as error:
            shape = tuple(example.shape)
            raise ValueError(
                f"capture: the model rejects an input of shape {shape} in {where()}: {_first_line(error)}"
            ) from error
        _check_output(expected, example)
        own = _without_looking_hooks(own, example, expected)
        try:
            # a named dimension, because Dim.DYNAMIC lets a branch on the batch size narrow the sizes it holds for
            with _quiet_if_it_fails():
                program = export(own, (example.clone(),), dynamic_shapes=({0: Dim("batch")},), strict=False)
        except _MODEL_ERRORS as error:
            raise NotImplementedError(_why_not(error, where())) from error
    module = functional(program.module(check_guards=False), program.call_spec.out_spec)
    _check_weights(own, module)
    _check_batch_norms(own, module)
    _check_values(own, module, example)
    return module


def _own(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the model to trace: in eval mode, without gradients, on the example's device."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise NotImplementedError(
            "capture: a TorchScript module cannot be captured; pass the torch.nn.Module it came from"
        )
    if not isinstance(example, Tensor) or not example.is_floating_point():
        got = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"capture: example must be a floating-point tensor, got {got}")
    if example.ndim < 2 or example.shape[0] < 2:
        raise ValueError(f"capture: example must be a batch of two or more, got shape {tuple(example.shape)}")
    if next(model.parameters(), None) is None:
        raise ValueError("capture: model must have parameters to quantize, got none")
    for wrapper in ("_orig_mod", "module"):  # torch.compile; DataParallel and DistributedDataParallel
        inner = model._modules.get(wrapper)
        if inner is not None and (wrapper == "_orig_mod" or isinstance(model, _PARALLEL)):
            model = inner
    try:
        own = copy.deepcopy(model)
    except _MODEL_ERRORS as error:
        raise ValueError(f"capture: the model cannot be copied: {_first_line(error)}") from error
    return thaw(own.to(example.device).eval()).requires_grad_(False)


_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def _without_looking_hooks(own: nn.Module, example: Tensor, expected: object) -> nn.Module:
    """Removes all forward hooks if the output does not depend on them.

    A hook that records would otherwise be handed the tracer's tensors, and one that prints a value would end the trace.
    """
    hooks = [d for layer in own.modules() for d in (layer._forward_hooks, layer._forward_pre_hooks) if d]
    if not hooks:
        return own
    kept = [dict(d) for d in hooks]
    for d in hooks:
        d.clear()
    try:
        again, before = leaves(own(example.clone())), leaves(expected)
        same = again.keys() == before.keys() and all(map(torch.equal, again.values(), before.values()))
    except _MODEL_ERRORS:
        same = False
    if not same:
        for d, entries in zip(hooks, kept, strict=True):
            d.update(entries)
    return own


def _check_output(output: object, example: Tensor) -> None:
    found = leaves(output)
    for path, leaf in found.items():
        where = f" at '{path}'" if path else ""
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                "capture: the model must return logits, or dicts, lists and tuples of floating-point tensors, "
                f"got {got}{where}"
            )
        if leaf.ndim < 2 or leaf.shape[0] != example.shape[0]:
            raise ValueError(
                f"capture: the model must return tensors whose first dimension is the batch ({example.shape[0]}), such "
                f"as logits (N, num_classes), got {tuple(leaf.shape)}{where}"
            )
    if not found:
        raise ValueError("capture: the model must return at least one tensor, got none")


def _check_weights(own: nn.Module, module: fx.GraphModule) -> None:
    """A layer whose weight is computed would stay float without a word; one that depends on the image always will."""
    stored = {name for name, _ in (*own.named_parameters(), *own.named_buffers())}
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in CONVOLUTIONS | LINEARS and not _is_stored(node.args[1], stored):
            raise NotImplementedError(
                f"capture: {owner(node)} computes the weight of its {op_name(node)} while it runs; bake it into a "
                "parameter first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm)"
            )
        if node.target in _PRODUCTS and any(_is_matrix(source) for source in node.all_input_nodes):
            raise NotImplementedError(
                f"capture: {owner(node)} multiplies by a parameter with {op_name(node)}, which would stay float; write "
                "it as torch.nn.Linear or torch.nn.functional.linear"
            )


def _is_stored(weight: fx.Node, stored: set[str]) -> bool:
    """True for a parameter or buffer of the model; weight_norm keeps a plain tensor that it computes from others."""
    return weight.op == "get_attr" and str(weight.target) in stored


def _is_matrix(node: fx.Node) -> bool:
    """True for a parameter, or a view of one, that a layer could hold as its weight."""
    node = through(node)
    return node.op == "get_attr" and node.meta["val"].ndim >= 2


def _check_batch_norms(model: nn.Module, module: fx.GraphModule) -> None:
    """Every batch norm of the model must be in the graph, in eval mode, with running statistics."""
    taps = batch_norms(module)
    for tap in taps:
        if tap.training:
            raise NotImplementedError(
                f"capture: batch norm '{tap.name}' normalises by batch statistics (track_running_stats=False), "
                "so the network stores nothing to match"
            )
    run = {id(attribute(module, tap.mean)) for tap in taps if tap.mean is not None}
    for name, layer in model.named_modules():
        # by its buffer: a batch norm that stands under two names runs under one of them
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and id(layer.running_mean) not in run:
            raise NotImplementedError(f"capture: batch norm '{name}' is never run by the model's forward")


def _check_values(model: nn.Module, module: fx.GraphModule, example: Tensor) -> None:
    """The graph computes what the model computes, at another batch size too."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, *example.shape[1:], generator=generator).to(example)
    try:
        with torch.no_grad():
            expected, got = model(probe.clone()), module(probe.clone())
    except _MODEL_ERRORS as error:
        raise NotImplementedError(
            f"capture: the captured graph does not run at batch size 3: {_first_line(error)}"
        ) from error
    for one, other in zip(leaves(expected).values(), leaves(got).values(), strict=True):
        # not bitwise: a GPU may choose another convolution algorithm; half of the digits must agree
        level = one.nan_to_num(0, 0, 0).abs().amax() * torch.finfo(one.dtype).eps ** 0.5
        if other.dtype != one.dtype or not torch.allclose(other, one, rtol=0, atol=level.item(), equal_nan=True):
            raise NotImplementedError(
                "capture: the captured graph does not compute what the model computes; a model that draws random "
                "numbers in eval mode, or remembers earlier calls, cannot be captured"
            )


@contextmanager
def _where_it_failed(model: nn.Module) -> Iterator[Callable[[], str]]:
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


def _why_not(error: BaseException, where: str) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    if any(line.startswith("Constraints violated") for line in lines):
        rule = next((line.removeprefix("- ").rstrip(".") for line in lines if line.startswith("- ")), lines[0])
        return (
            "capture: the model must work alike at every batch size; a shape in its forward is written as a number "
            f"(use x.size(0) or -1 there), or a branch asks for the batch size: {rule[:300]}"
        )
    return (
        f"capture: {where} cannot be captured as one graph{_line_of_the_model(error)}; control flow must not depend on "
        f"values: {_first_line(error)}"
    )


def _line_of_the_model(error: BaseException) -> str:
    """Where the model's own code stood, as ", at file:line (code)", if it stood anywhere outside torch."""
    libraries = (str(Path(torch.__file__).parent), __file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*libraries, "<")):
            return f", at {frame.filename}:{frame.lineno} ({frame.line})"
    return ""


@contextmanager
def _quiet_if_it_fails() -> Iterator[None]:
    """Keeps back what torch prints about a failed export, a whole graph: our message says what matters of it."""
    printed = io.StringIO()
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(printed):
            yield
    except BaseException:
        printed = io.StringIO()
        raise
    finally:
        log.setLevel(level)
        sys.stderr.write(printed.getvalue())


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
