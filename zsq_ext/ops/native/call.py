"""What a family's file knows of the backend that it serves."""

from typing import Any, Protocol

from torch import Tensor


class Call(Protocol):
    """Runs an op of the native module: `call(op, *fields)`, the fields of its struct in order."""

    def __call__(self, op: str, *fields: Any) -> None: ...

    def with_workspace(self, op: str, *fields: Any) -> None:
        """The same for an op that takes sums, which a GPU wants memory for."""


def address(t: Tensor | None) -> int:
    """Where a tensor begins, 0 for none."""
    return 0 if t is None else t.data_ptr()
