"""Images as the networks are to see them: a smoothed and clipped view of each, or a resized crop, and the way back.

Both ops are gathers: one read of x, one write of the result. Both adjoints are gathers too, so a gradient is the same
bits on every run.
"""

import math
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import backend
from zsq_ext.ops import check as checks
from zsq_ext.ops.layout import COMPUTE, channels_last, empty_arranged

_WHERE = "Tensor top, Tensor left, Tensor flip, SymInt[2] size, float edge"
_CROPS = "Tensor top, Tensor left, Tensor height, Tensor width, Tensor flip, SymInt[2] size"


def _fake_view(x: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: tuple[int, int], *rest: Any) -> Tensor:
    return empty_arranged(x, channels_last(x), size)


def _fake_resize(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    return empty_arranged(x, channels_last(x), size)


_op_view = backend.define(f"view_images(Tensor x, {_WHERE}, Tensor? low, Tensor? high) -> Tensor", _fake_view)
_op_view_backward = backend.define(f"view_images_backward(Tensor grad, {_WHERE}) -> Tensor", _fake_view)
_op_resize = backend.define(f"resize_crops(Tensor x, {_CROPS}) -> Tensor", _fake_resize)
_op_resize_backward = backend.define(f"resize_crops_backward(Tensor grad, {_CROPS}) -> Tensor", _fake_resize)


class _View(torch.autograd.Function):
    """The clip lets every gradient through; what remains is linear, and its gradient is its adjoint."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        top: Tensor,
        left: Tensor,
        flip: Tensor,
        size: tuple[int, int],
        edge: float,
        low: Tensor | None,
        high: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(top, left, flip)
        ctx.size, ctx.edge = x.shape[2:], edge
        return _op_view(x, top, left, flip, size, edge, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ViewAdjoint.apply(grad, *ctx.saved_tensors, ctx.size, ctx.edge), *(None,) * 7


class _ViewAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: tuple[int, int], edge: float
    ) -> Tensor:
        ctx.save_for_backward(top, left, flip)
        ctx.size, ctx.edge = grad.shape[2:], edge
        return _op_view_backward(grad, top, left, flip, size, edge)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _View.apply(grad, *ctx.saved_tensors, ctx.size, ctx.edge, None, None), *(None,) * 5


class _Resize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        top: Tensor,
        left: Tensor,
        height: Tensor,
        width: Tensor,
        flip: Tensor,
        size: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(top, left, height, width, flip)
        ctx.size = x.shape[2:]
        return _op_resize(x, top, left, height, width, flip, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ResizeAdjoint.apply(grad, *ctx.saved_tensors, ctx.size), *(None,) * 6


class _ResizeAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        top: Tensor,
        left: Tensor,
        height: Tensor,
        width: Tensor,
        flip: Tensor,
        size: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(top, left, height, width, flip)
        ctx.size = grad.shape[2:]
        return _op_resize_backward(grad, top, left, height, width, flip, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Resize.apply(grad, *ctx.saved_tensors, ctx.size), *(None,) * 6


def _check_images(op: str, x: Tensor) -> None:
    checks.compute_dtype(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must have shape (B, C, H, W), got {tuple(x.shape)}")


def _check_each(op: str, x: Tensor, flip: Tensor, **pixels: Tensor) -> list[Tensor]:
    """One value per image each: the whole numbers as contiguous int64, and flip."""
    for name, t in pixels.items():
        checks.tensor(op, name, t)
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: {name} must be torch.int64 or torch.int32, got {t.dtype}")
        checks.beside(op, name, t, t.dtype, x.shape[:1], x.device)
    checks.beside(op, "flip", flip, torch.bool, x.shape[:1], x.device)
    return [*(t.to(torch.int64).contiguous() for t in pixels.values()), flip.contiguous()]


def edge_of(sigma: float | None) -> float:
    """The weight of either neighbour under a Gaussian of three samples; 0 where nothing is smoothed."""
    if sigma is None or sigma == 0:
        return 0.0
    side = math.exp(-0.5 / sigma / sigma)
    return side / (1 + 2 * side)


def view_images(
    x: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    size: tuple[int, int],
    *,
    sigma: float | None = 1.25,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """What a network is shown of larger images: each flipped, smoothed, cropped and clipped, in one read.

        f = x mirrored left to right where flip
        h[i, j] = centre * f[i, j] + edge * (f[i, j - 1] + f[i, j + 1])
        s[i, j] = centre * h[i, j] + edge * (h[i - 1, j] + h[i + 1, j])
        y[i, j] = clamp(s[top + i, left + j], low, high)

    with edge = e / (1 + 2 e), e = exp(-1 / (2 sigma^2)), and centre = 1 - 2 edge: a Gaussian of three samples. Beyond
    the border of the stored image stands +0, which is multiplied and added like any pixel. Computed in float32 (float64
    for float64 x), each operation rounded once and in the order written, the result rounded once to x's dtype. NaN
    stays NaN. Every backend gives the same bits.

    The gradient is that of the linear part, exact: the clip passes everything (straight through), and pixels outside
    the view get +0. It has gradients of any order; low and high get none.

    Args:
        x: the stored images, (B, C, H, W), any strides; float32, float16, bfloat16, or float64 (on the reference and
            cpu backends).
        top, left: where each view begins in the mirrored image, (B,), int64 (int32 is converted), 0 to H - h and 0 to
            W - w. Their values are not looked at, which would wait for the device: a view outside is moved inside.
        flip: which images are mirrored, (B,), bool.
        size: (h, w) of the views, at most (H, W).
        sigma: the Gaussian's width in pixels, finite; None or 0 leaves the images sharp.
        low, high: per channel, (C,), float32, or float64 where x is; both or neither. Where low > high, high holds.

    Returns:
        (B, C, h, w) in x's dtype and memory format: channels last where x's channels vary fastest, else contiguous.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device or number is not as above.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> x = torch.arange(9.0).view(1, 1, 3, 3)
        >>> zero, low, high = torch.tensor([0]), torch.tensor([1.5]), torch.tensor([4.0])
        >>> view_images(x, zero, zero, torch.tensor([True]), (2, 2), sigma=None, low=low, high=high)
        tensor([[[[2.0000, 1.5000],
                  [4.0000, 4.0000]]]])

    Source: the image pipeline of DGH (released code), with one flip and one offset per image instead of per batch.
    """
    _check_images("view_images", x)
    where = _check_each("view_images", x, flip, top=top, left=left)
    height, width = checks.size("view_images", "size", size)
    if not (0 <= height <= x.size(2) and 0 <= width <= x.size(3)):
        raise ValueError(f"view_images: size must be within {tuple(x.shape[2:])}, got {(height, width)}")
    if sigma is not None:
        checks.number("view_images", "sigma", sigma, rule="None or a number")
        if not 0 <= sigma < math.inf:
            raise ValueError(f"view_images: sigma must be None or >= 0 and finite, got {sigma}")
    if (low is None) != (high is None):
        raise ValueError(f"view_images: low and high must both be given, got no {'low' if low is None else 'high'}")
    clip = [None if t is None else _bound(name, t, x) for name, t in (("low", low), ("high", high))]
    args = x, *where, (height, width), edge_of(sigma), *clip
    return _View.apply(*args) if torch.is_grad_enabled() and x.requires_grad else _op_view(*args)


def _bound(name: str, t: Tensor, x: Tensor) -> Tensor:
    checks.beside("view_images", name, t, COMPUTE[x.dtype], x.shape[1:2], x.device, of=f" for {x.dtype} x")
    return t.detach().contiguous()


def resize_crops(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    """One crop of each image, resized bilinearly to one size and mirrored where asked.

    Along an axis of `extent` pixels that become `size`, output pixel o is at place t / (2 size) of the crop:

        t = clamp((2 o + 1) * extent - size, 0, (extent - 1) * 2 * size)
        first = t div (2 size),     second = min(first + 1, extent - 1),     w = (t mod (2 size)) / (2 size)
        y[o] = (1 - w) * x[first] + w * x[second]

    along rows first and then down columns; mirroring comes last. That is the convention of `interpolate` with
    `align_corners=False` and no antialiasing. Places are whole numbers until one division, so every backend reads the
    same pixels; each operation is rounded once and in the order written, in float32 (float64 for float64 x), the result
    rounded once to x's dtype. Every backend gives the same bits. NaN and infinities reach the pixels that read them,
    with a weight of 0 too.

    The gradient is the exact adjoint, and a gather: each pixel adds up the outputs that read it, from +0 on and in the
    order of the crop, down columns first and then along rows. Pixels outside the crop get +0. It has gradients of any
    order.

    Args:
        x: images, (B, C, H, W) with at least one pixel, any strides; float32, float16, bfloat16, or float64 (on the
            reference and cpu backends).
        top, left, height, width: the crops in whole pixels, (B,), int64 (int32 is converted). Their values are not
            looked at, which would wait for the device: a crop outside the image is moved and cut to lie inside.
        flip: which results are mirrored left to right, (B,), bool.
        size: (h, w) of the results.

    Returns:
        (B, C, h, w) in x's dtype and memory format: channels last where x's channels vary fastest, else contiguous.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device or number is not as above.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> x = torch.tensor([[[[0.0, 4.0, 8.0, 100.0]]]])
        >>> zero, one = torch.tensor([0]), torch.tensor([1])
        >>> resize_crops(x, zero, zero, one, one + 1, torch.tensor([True]), (1, 4))
        tensor([[[[4., 3., 1., 0.]]]])

    Source: torchvision's documented `resized_crop` of tensors without antialiasing.
    """
    _check_images("resize_crops", x)
    crops = _check_each("resize_crops", x, flip, top=top, left=left, height=height, width=width)
    if x.size(2) == 0 or x.size(3) == 0:
        raise ValueError(f"resize_crops: x must have at least one pixel, got shape {tuple(x.shape)}")
    rows, columns = checks.size("resize_crops", "size", size)
    if rows < 0 or columns < 0:
        raise ValueError(f"resize_crops: size must be >= 0, got {(rows, columns)}")
    args = x, *crops, (rows, columns)
    return _Resize.apply(*args) if torch.is_grad_enabled() and x.requires_grad else _op_resize(*args)
