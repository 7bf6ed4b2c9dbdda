"""The inputs every backend meets: one table per op, read by the parity, opcheck and error tests and the benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _strided(x: Tensor) -> Tensor:
    """Every second element along each dimension of a larger tensor."""
    big = x.new_empty([2 * n for n in x.shape])
    view = big[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def _misaligned(x: Tensor) -> Tensor:
    """Contiguous, but one element off any wider boundary."""
    view = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    # dense, but in an order that has no name: the last dimension varies slowest
    "permuted": lambda x: x.permute(-1, *range(x.dim() - 1)).contiguous().permute(*range(1, x.dim()), 0),
    "strided": _strided,
    "expanded": lambda x: x[:1].expand_as(x),
    "misaligned": _misaligned,
}


@dataclass(frozen=True)
class ErrorCase:
    """Arguments that differ from a good call's, and what must be said about them."""

    name: str
    error: type[Exception]
    message: str
    change: dict[str, Any] = field(default_factory=dict)
