"""qdrop and its gradient on Triton."""

from torch import Tensor

from zsq_ext.ops.layout import arranged, channels_last, empty_arranged, places_of
from zsq_ext.ops.triton.launch import kernels, on_device_of


def _run(x: Tensor, x_hat: Tensor | None, out: Tensor | None, rest: Tensor | None, threshold: int, key: Tensor) -> None:
    last = channels_last(x)
    x = arranged(x, last)
    x_hat = None if x_hat is None else arranged(x_hat, last)
    channels, places = places_of(x)[1:3] if last else (1, 1)
    with on_device_of(x):
        kernels("qdrop").qdrop(x, x_hat, out, rest, key, threshold, x.numel(), channels, places, last)


def qdrop(x: Tensor, x_hat: Tensor, threshold: int, key: Tensor) -> Tensor:
    out = empty_arranged(x, channels_last(x))
    _run(x, x_hat, out, None, threshold, key)
    return out


def qdrop_backward(grad: Tensor, threshold: int, key: Tensor, need_x: bool, need_x_hat: bool) -> tuple[Tensor, Tensor]:
    last, nothing = channels_last(grad), grad.new_empty(0)
    dx, dx_hat = (empty_arranged(grad, last) if needed else None for needed in (need_x, need_x_hat))
    _run(grad, None, dx, dx_hat, threshold, key)
    return nothing if dx is None else dx, nothing if dx_hat is None else dx_hat
