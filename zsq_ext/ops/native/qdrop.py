"""How `cpu` and `cuda` call the native module's qdrop and its gradient."""

from torch import Tensor

from zsq_ext.ops.layout import arranged, channels_last, empty_arranged, places_of
from zsq_ext.ops.native.call import Call, address


def _run(
    call: Call, x: Tensor, x_hat: Tensor | None, out: Tensor | None, rest: Tensor | None, threshold: int, key: Tensor
) -> None:
    last = channels_last(x)
    x = arranged(x, last)  # by this name: a copy must live until the call is over
    x_hat = None if x_hat is None else arranged(x_hat, last)
    shape = (*places_of(x)[:3], True) if last else (1, 1, x.numel(), False)
    pointers = (address(t) for t in (x, x_hat, out, rest, key))
    call("qdrop", *pointers, shape, threshold, x.element_size())


def qdrop(call: Call, x: Tensor, x_hat: Tensor, threshold: int, key: Tensor) -> Tensor:
    out = empty_arranged(x, channels_last(x))
    _run(call, x, x_hat, out, None, threshold, key)
    return out


def qdrop_backward(
    call: Call, grad: Tensor, threshold: int, key: Tensor, need_x: bool, need_x_hat: bool
) -> tuple[Tensor, Tensor]:
    last, nothing = channels_last(grad), grad.new_empty(0)
    dx, dx_hat = (empty_arranged(grad, last) if needed else None for needed in (need_x, need_x_hat))
    _run(call, grad, None, dx, dx_hat, threshold, key)
    return nothing if dx is None else dx, nothing if dx_hat is None else dx_hat
