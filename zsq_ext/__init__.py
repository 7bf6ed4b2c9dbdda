"""Data-free quantization of vision networks, and the ops underneath it.

Everything here loads on first use: `import zsq_ext` and `zsq_ext.ops` need only torch and numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsq_ext import ops
    from zsq_ext.api import InputSpec, Result, evaluate, load, quantize, synthesize
    from zsq_ext.ops.backend import backend, backends

__version__ = "0.1.0"

# public name -> the module it comes from
_HOME = {
    "InputSpec": "zsq_ext.api",
    "Result": "zsq_ext.api",
    "evaluate": "zsq_ext.api",
    "load": "zsq_ext.api",
    "quantize": "zsq_ext.api",
    "synthesize": "zsq_ext.api",
    "backend": "zsq_ext.ops.backend",
    "backends": "zsq_ext.ops.backend",
}

__all__ = [
    "InputSpec",
    "Result",
    "backend",
    "backends",
    "evaluate",
    "load",
    "ops",
    "quantize",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("zsq_ext.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'zsq_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
