"""view_images, resize_crops and their adjoints on Triton; an adjoint is the same launcher."""

from torch import Tensor

from zsq_ext.ops.layout import arranged, channels_last, empty_arranged
from zsq_ext.ops.triton.launch import kernels, on_device_of


def _view(
    x: Tensor,
    where: tuple[Tensor, ...],
    size: tuple[int, int],
    clip: tuple[Tensor | None, ...],
    edge: float,
    adjoint: bool,
) -> Tensor:
    launchers, last = kernels("image"), channels_last(x)
    y, x = empty_arranged(x, last, size), arranged(x, last)
    with on_device_of(x):
        launchers.view_images(x, y, *where, *clip, edge, adjoint, launchers.Shape(*x.shape, *y.shape[2:], last))
    return y


def view_images(
    x: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    size: tuple[int, int],
    edge: float,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    return _view(x, (top, left, flip), size, (low, high), edge, adjoint=False)


def view_images_backward(
    grad: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: tuple[int, int], edge: float
) -> Tensor:
    return _view(grad, (top, left, flip), size, (None, None), edge, adjoint=True)


def _resize(x: Tensor, crops: tuple[Tensor, ...], size: tuple[int, int], adjoint: bool) -> Tensor:
    launchers, last = kernels("image"), channels_last(x)
    y, x = empty_arranged(x, last, size), arranged(x, last)
    with on_device_of(x):
        launchers.resize_crops(x, y, *crops, adjoint, launchers.Shape(*x.shape, *y.shape[2:], last))
    return y


def resize_crops(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    return _resize(x, (top, left, height, width, flip), size, adjoint=False)


def resize_crops_backward(
    grad: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    return _resize(grad, (top, left, height, width, flip), size, adjoint=True)
