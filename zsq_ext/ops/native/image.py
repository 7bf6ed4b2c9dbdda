"""How `cpu` and `cuda` call the native module's view_images and resize_crops; an adjoint is the same launcher."""

from typing import Any

from torch import Tensor

from zsq_ext.ops.layout import DTYPE_CODE, arranged, channels_last, empty_arranged
from zsq_ext.ops.native.call import Call, address


def _shape(x: Tensor, y: Tensor, last: bool) -> tuple[Any, ...]:
    return (*x.shape, *y.shape[2:], last)


def _view(
    call: Call,
    x: Tensor,
    where: tuple[Tensor, ...],
    size: tuple[int, int],
    clip: tuple[Tensor | None, ...],
    edge: float,
    adjoint: bool,
) -> Tensor:
    last = channels_last(x)
    y, x = empty_arranged(x, last, size), arranged(x, last)
    fields = *(address(t) for t in (x, y, *where, *clip)), edge, adjoint, _shape(x, y, last), DTYPE_CODE[x.dtype]
    call("view_images", *fields)
    return y


def view_images(
    call: Call,
    x: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    size: tuple[int, int],
    edge: float,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    return _view(call, x, (top, left, flip), size, (low, high), edge, adjoint=False)


def view_images_backward(
    call: Call, grad: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: tuple[int, int], edge: float
) -> Tensor:
    return _view(call, grad, (top, left, flip), size, (None, None), edge, adjoint=True)


def _resize(call: Call, x: Tensor, crops: tuple[Tensor, ...], size: tuple[int, int], adjoint: bool) -> Tensor:
    last = channels_last(x)
    y, x = empty_arranged(x, last, size), arranged(x, last)
    fields = *(address(t) for t in (x, y, *crops)), adjoint, _shape(x, y, last), DTYPE_CODE[x.dtype]
    call("resize_crops", *fields)
    return y


def resize_crops(
    call: Call,
    x: Tensor,
    top: Tensor,
    left: Tensor,
    height: Tensor,
    width: Tensor,
    flip: Tensor,
    size: tuple[int, int],
) -> Tensor:
    return _resize(call, x, (top, left, height, width, flip), size, adjoint=False)


def resize_crops_backward(
    call: Call,
    grad: Tensor,
    top: Tensor,
    left: Tensor,
    height: Tensor,
    width: Tensor,
    flip: Tensor,
    size: tuple[int, int],
) -> Tensor:
    return _resize(call, grad, (top, left, height, width, flip), size, adjoint=True)
