"""view_images and resize_crops with their adjoints.

Shapes: images are [B, C, H, W]; top, left, height and width are [B] int64, flip is [B] bool. Everything is computed in
float32, or in float64 for float64 images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.ops.layout import COMPUTE, channels_last


def _positions(start: Tensor, flip: Tensor | None, full: int, size: int, adjoint: bool) -> Tensor:
    """[B, size] which pixel of the `full` a view's column sees; adjoint: [B, full] which column sees a pixel."""
    start = start.clamp(0, full - size)[:, None]
    i = torch.arange(full if adjoint else size, device=start.device)
    straight = i - start if adjoint else i + start
    return straight if flip is None else torch.where(flip[:, None], full - 1 - start - i, straight)


def _seen(x: Tensor, rows: Tensor, columns: Tensor, edge: float) -> Tensor:
    """x smoothed, at rows [B, h] and columns [B, w]; beyond its border x is +0."""
    height, width = x.shape[2:]
    x = F.pad(x.to(COMPUTE[x.dtype]), (1, 1, 1, 1))
    b, c = (torch.arange(n, device=x.device) for n in x.shape[:2])

    def at(down: int, right: int) -> Tensor:
        row, column = (rows + down).clamp(-1, height) + 1, (columns + right).clamp(-1, width) + 1
        return x[b[:, None, None, None], c[:, None, None], row[:, None, :, None], column[:, None, None, :]]

    if edge == 0:
        return at(0, 0)
    side = torch.tensor(edge, dtype=x.dtype, device=x.device)
    centre = 1 - (side + side)
    up, here, down = (centre * at(i, 0) + side * (at(i, -1) + at(i, 1)) for i in (-1, 0, 1))
    return centre * here + side * (up + down)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y in x's dtype and memory format."""
    y = y.to(x.dtype)
    return y.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last(x) else y.contiguous()


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
    rows = _positions(top, None, x.size(2), size[0], adjoint=False)
    columns = _positions(left, flip, x.size(3), size[1], adjoint=False)
    v = _seen(x, rows, columns, edge)
    if low is not None and high is not None:
        lo, hi = low[:, None, None], high[:, None, None]
        v = torch.where(v < lo, lo, v)
        v = torch.where(v > hi, hi, v)
    return _like(v, x)


def view_images_backward(
    grad: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: tuple[int, int], edge: float
) -> Tensor:
    """The adjoint without the clip: the kernel is symmetric, so it is the same smoothing of the gradient put back."""
    rows = _positions(top, None, size[0], grad.size(2), adjoint=True)
    columns = _positions(left, flip, size[1], grad.size(3), adjoint=True)
    return _like(_seen(grad, rows, columns, edge), grad)


def _taps(start: Tensor, extent: Tensor, full: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[B, size] each: the two pixels that an output pixel reads along one axis, and the weight of the second.

    Output pixel o is at t / (2 size) pixels into the crop, t = (2 o + 1) extent - size: integers until one division.
    """
    extent = extent.clamp(1, full)[:, None]
    start = torch.minimum(start[:, None].clamp_min(0), full - extent)
    t = ((2 * torch.arange(size, device=start.device) + 1) * extent - size).clamp_min(0)
    t = torch.minimum(t, (extent - 1) * (2 * size))
    first = t // (2 * size)
    weight = (t % (2 * size)).to(dtype) / (2 * size)
    return start + first, start + torch.minimum(first + 1, extent - 1), weight


def _unflipped(x: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip[:, None, None, None], x.flip(3), x)


def resize_crops(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    def read(x: Tensor, start: Tensor, extent: Tensor, size: int) -> Tensor:
        """[B, C, L, full] -> [B, C, L, size]"""
        first, second, w = (t[:, None, None] for t in _taps(start, extent, x.size(3), size, x.dtype))
        lines = *x.shape[:3], size
        return (1 - w) * x.gather(3, first.expand(lines)) + w * x.gather(3, second.expand(lines))

    across = read(x.to(COMPUTE[x.dtype]), left, width, size[1])
    return _like(_unflipped(read(across.mT, top, height, size[0]).mT, flip), x)


def resize_crops_backward(
    grad: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    """The adjoint: rows first, and each pixel adds up what reads it in the order of the crop, from +0 on."""

    def spread(g: Tensor, start: Tensor, extent: Tensor, full: int) -> Tensor:
        """[B, C, L, size] -> [B, C, L, full]"""
        out = g.new_zeros(*g.shape[:3], full)
        pixel = torch.arange(full, device=g.device)
        taps = _taps(start, extent, full, g.size(3), g.dtype)
        for o in range(g.size(3)):
            first, second, w = (t[:, o, None] for t in taps)
            weight = torch.where(pixel == first, 1 - w, w)[:, None, None]
            reads = ((pixel == first) | (pixel == second))[:, None, None]
            out = torch.where(reads, out + weight * g[..., o, None], out)
        return out

    down = spread(_unflipped(grad, flip).to(COMPUTE[grad.dtype]).mT, top, height, size[0]).mT
    return _like(spread(down, left, width, size[1]), grad)
