"""What every family of Triton kernels is launched with. Nothing in this folder imports triton before it is needed."""

import contextlib
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def kernels(family: str) -> ModuleType:
    """The launchers of a family, from kernels/<family>.py."""
    return importlib.import_module(f"zsq_ext.kernels.{family}")


def on_device_of(t: Tensor) -> Any:
    """A context in which t's GPU is the current one."""
    return torch.cuda.device_of(t) if t.is_cuda else contextlib.nullcontext()
