"""Who runs an op.

A backend is a module of plain functions with the names and argument order of `reference`, plus two that say
what it cannot do: `missing()`, why it is not on this machine, and `refuses(device, dtype)`, why it does not take
such tensors. Each op is registered with torch once, here, and asks at run time who runs it.
"""

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from zsq_ext.ops.layout import head

NAMES = ("reference", "cpu", "cuda", "triton")

# What `auto` tries on a device, fastest first. A device that is not listed gets the reference.
_AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# op name -> its schema, in the order of definition
OPS: dict[str, str] = {}

_library = torch.library.Library("zsq", "FRAGMENT")


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source}: name must be one of auto, {', '.join(NAMES)}, got {name!r}")
    return name


_choice = _checked(os.environ.get("ZSQ_BACKEND") or "auto", "ZSQ_BACKEND")


def choice() -> str:
    """The backend in force: "auto" or a forced one."""
    return _choice


def decomposes() -> bool:
    """Whether a pointwise forward is to be its reference, under a compiler."""
    # A compiler fuses plain PyTorch with its neighbours, which no op of ours can. A forced backend stays
    # opaque, and so does an exported graph, where one node that says fake_quant is worth more.
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and choice() == "auto"


class backend:
    """Within the block every op runs on the backend called `name`, or raises NotImplementedError.

    `"auto"` takes the fastest one that can and may fall back. The environment variable ZSQ_BACKEND sets what
    holds outside any block. The choice is the process's, not the thread's, so that it also reaches the threads
    autograd runs backward in; a backward that should use it must be called within the block.

    Raises:
        ValueError: no backend has that name.

    Example:
        >>> import torch, zsq_ext
        >>> x, scale, zero_point = torch.tensor([0.3]), torch.ones(1), torch.zeros(1, dtype=torch.int32)
        >>> with zsq_ext.backend("reference"):
        ...     zsq_ext.ops.fake_quant(x, scale, zero_point, 0, 7)
        tensor([0.])
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "backend")

    def __enter__(self) -> None:
        global _choice
        self._before, _choice = _choice, self._name

    def __exit__(self, *error: object) -> None:
        global _choice
        _choice = self._before


def module(name: str) -> ModuleType:
    """The backend's functions."""
    return importlib.import_module(f"zsq_ext.ops.{name}")


@functools.cache
def missing(name: str) -> str | None:
    """Why a backend is not on this machine, or None where it is. Asked once per process."""
    return module(name).missing()


def backends() -> dict[str, str | None]:
    """What is available here: each backend's name, with None or the reason it is missing."""
    return {name: missing(name) for name in NAMES}


def refusal(device: str, dtype: torch.dtype) -> str | None:
    """Why the backend in force, if one is forced, runs nothing on such tensors here; None where it does."""
    return None if _choice == "auto" else missing(_choice) or module(_choice).refuses(device, dtype)


def reason_against(name: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` does not run `op` on such tensors, or None where it does."""
    reason = missing(name)
    if reason is None and not hasattr(module(name), op):
        reason = f"has no {op}"
    return reason or module(name).refuses(device, dtype)


@functools.cache
def find(op: str, device: torch.device | str, dtype: torch.dtype, chosen: str) -> Callable[..., Any]:
    """The function that runs `op` on such tensors under a choice.

    Raises:
        NotImplementedError: the chosen backend cannot; says why.
    """
    device = torch.device(device).type
    candidates = _AUTO.get(device, ("reference",)) if chosen == "auto" else (chosen,)
    reasons = []
    for name in candidates:
        reason = reason_against(name, op, device, dtype)
        if reason is None:
            return getattr(module(name), op)
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(
        f"{op}: no backend for {str(dtype).removeprefix('torch.')} on {device} under {chosen!r} ({'; '.join(reasons)})"
    )


# What an argument may be that torch's dispatcher hands on as it is; of a tensor see `_is_direct`.
_VALUES = frozenset((int, float, bool, str, type(None), torch.dtype))

# By names of their own, because every call asks them all.
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_is_tracing, _modes, _is_mode = _C._is_tracing, _C._len_torch_dispatch_stack, _C._is_torch_function_mode_enabled
_transform, _is_profiling = _C._functorch.peek_interpreter_stack, _C._autograd._profiler_enabled


def _is_direct(args: Sequence[Any]) -> bool:
    """Whether torch's dispatcher would do nothing but call the op's function, so that a call can go past it.

    It takes 3 us, of 11 for a call on a few elements. It is needed where something looks on or takes part: a compiler,
    a tracer, a mode, a transform of functions, forward-mode AD, a profiler; for a tensor that is not simply memory, or
    that autograd follows; and for lists, of which it makes its own.
    """
    if (
        _is_compiling()
        or forward_ad._current_level >= 0
        or _is_tracing()
        or _modes()
        or _is_mode()
        or _transform() is not None
        or _is_profiling()
    ):
        return False
    followed = _is_grad_enabled()
    for value in args:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.is_neg() or value._is_zerotensor() or (followed and value.requires_grad):
                return False
        elif kind not in _VALUES:
            return False
    return True


def refuse_tangents(op: str, args: Sequence[Any]) -> None:
    """Those of forward-mode AD: torch knows no rule for an op's, and would take the op for a constant.

    Raises:
        NotImplementedError: a tensor among the arguments, or in a list there, has one.
    """
    if forward_ad._current_level < 0:
        return
    for value in args:
        if isinstance(value, (list, tuple)):
            refuse_tangents(op, value)
        elif isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{op}: a gradient must be taken backward, got a tangent of forward-mode AD")


def _kind_of(first: Tensor | Sequence[Tensor], *rest: Any) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of the first tensor, which may be the first of a list."""
    t = head(first)
    return t.device, t.dtype


def define(
    schema: str,
    fake: Callable[..., Any],
    kind: Callable[..., tuple[torch.device, torch.dtype]] = _kind_of,
    gathered: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Registers an op with torch, once for all devices, and returns it.

    Args:
        schema: `name(Tensor x, ...) -> Tensor`, or of a list that is never empty. An argument that is written to is
            the last one, and marked `(a!)`.
        fake: same arguments, returns empty tensors like the result; what compile and export trace with.
        kind: same arguments, returns the device and dtype that decide who may run it.
        gathered: same arguments, returns them as backends take them, several in one value; None where they take these.
    """
    name = schema.partition("(")[0]
    OPS[name] = schema

    def run(*args: Any) -> Any:
        function = find(name, *kind(*args), _choice)
        return function(*args) if gathered is None else function(*gathered(*args))

    def run_and_count(*args: Any) -> Any:
        result = run(*args)
        # Autograd then notices if it had saved what was written to; who writes through a pointer has to say so.
        torch.autograd.graph.increment_version(args[-1])
        return result

    direct = run_and_count if "(a!)" in schema else run
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, direct, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zsq::{name}", fake, lib=_library)
    dispatched = getattr(torch.ops.zsq, name).default

    def call(*args: Any) -> Any:
        if _is_direct(args):
            return direct(*args)
        refuse_tangents(name, args)
        return dispatched(*args)

    return call
