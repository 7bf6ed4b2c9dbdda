"""view_images, resize_crops and the low-pass filter beside what is written without them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.ops import backend, resize_crops, view_images
from zsq_ext.ops.cases import image as cases
from zsq_ext.synth.filters import LowPass

# One batch of SynQ's images of either size, as (shape, cut): the published cut, and one that filters small images.
LOW_PASS = (((256, 3, 32, 32), 10.0), ((32, 3, 224, 224), 80.0))

_PASSES = ("forward", "forward+backward")
# per output pixel: two axes of 2 products and 2 sums and two comparisons; two lines and one column of a blend
_FLOPS = {"view_images": 16, "resize_crops": 9}


def subjects(device: str) -> list[Subject]:
    gathered = [_subject(case, device, pass_) for case in (*cases.VIEW_BENCH, *cases.CROP_BENCH) for pass_ in _PASSES]
    return gathered + [_low_pass(shape, cut, device) for shape, cut in LOW_PASS]


def _bytes(case: cases.ImageCase, args: dict[str, Any], pass_: str) -> int:
    """What has to move: the part of x that is looked at and y; then y's gradient and all of x's."""
    one = args["x"].element_size()
    x, y = args["x"].nbytes, one * torch.Size((*case.shape[:2], *case.size)).numel()
    seen = one * case.shape[1] * int((args["height"] * args["width"]).sum()) if "height" in args else y
    return seen + y + (y + x if pass_ != "forward" else 0)


def _subject(case: cases.ViewCase | cases.CropCase, device: str, pass_: str) -> Subject:
    view = isinstance(case, cases.ViewCase)
    op = "view_images" if view else "resize_crops"
    public: Callable[..., Tensor] = view_images if view else resize_crops
    written = {"eager": _eager_view} if view else {"matmul": _matmul_crops, "loop": _looped_crops}
    peers = {name: _pass(function, pass_) for name, function in written.items()}

    def by_the_reference(grad: Tensor, args: dict[str, Any]) -> Tensor:
        with backend.backend("reference"):
            return public(**args)

    # The reference's adjoint takes hundreds of steps at such sizes; the gradient is compared with the first peer's.
    forward = pass_ == "forward"
    return Subject(
        op=op,
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_=pass_,
        bytes_=_bytes(case, case.args(device), pass_),
        flops=_FLOPS[op] * (1 if forward else 2) * case.grad().numel(),
        inputs=lambda: (case.grad(device), case.args(device)),
        ours=_pass(public, pass_),
        expected=by_the_reference if forward else next(iter(peers.values())),
        peers=peers,
        tolerance=0.0 if forward else 1e-5 if case.dtype == torch.float32 else 1e-2,
    )


def _pass(function: Callable[..., Tensor], pass_: str) -> Callable[..., Tensor]:
    """function(**args), or x's gradient through it, as a function of (grad, args)."""
    if pass_ == "forward":
        return lambda grad, args: function(**args)

    def both(grad: Tensor, args: dict[str, Any]) -> Tensor:
        x = args["x"].detach().requires_grad_()
        return torch.autograd.grad(function(**{**args, "x": x}), x, grad)[0]

    return both


def _eager_view(
    x: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    size: tuple[int, int],
    sigma: float,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """What people write: a depthwise convolution of the stored images, and the crops by an index."""
    g = torch.exp(-(torch.arange(-1.0, 2, device=x.device) ** 2) / (2 * sigma**2))
    kernel = (g[:, None] * g / g.sum() ** 2).to(x.dtype).expand(x.size(1), 1, 3, 3)
    x = F.conv2d(torch.where(flip[:, None, None, None], x.flip(3), x), kernel, padding=1, groups=x.size(1))
    b, c = (torch.arange(n, device=x.device) for n in x.shape[:2])
    row, column = (s[:, None] + torch.arange(n, device=x.device) for s, n in zip((top, left), size, strict=True))
    y = x[b[:, None, None, None], c[:, None, None], row[:, None, :, None], column[:, None, None, :]]
    low, high = (t[:, None, None].to(y.dtype) for t in (low, high))
    return y + (y.clamp(low, high) - y).detach() if y.requires_grad else y.clamp(low, high)


def _hats(start: Tensor, extent: Tensor, full: int, size: int) -> Tensor:
    """[B, size, full] dense bilinear weights of one axis."""
    start, extent = start[:, None].float(), extent[:, None].float()
    output = torch.arange(size, device=start.device) + 0.5
    inside = (output * (extent / size) - 0.5).clamp_min(0).minimum(extent - 1)
    return (1 - ((start + inside)[:, :, None] - torch.arange(full, device=start.device)).abs()).clamp_min(0)


def _matmul_crops(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    """Two batched products with dense weights."""
    batch, channels, full_height, full_width = x.shape
    down, across = _hats(top, height, full_height, size[0]), _hats(left, width, full_width, size[1])
    across = torch.where(flip[:, None, None], across.flip(1), across)
    wide = x.reshape(batch, channels * full_height, full_width) @ across.mT
    return down[:, None] @ wide.view(batch, channels, full_height, size[1])


def _looped_crops(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    """An interpolation per image, as loaders do it."""
    out = []
    for image, i, j, h, w, f in zip(x, *(t.tolist() for t in (top, left, height, width, flip)), strict=True):
        y = F.interpolate(image[None, :, i : i + h, j : j + w], size=size, mode="bilinear", align_corners=False)
        out.append(y.flip(3) if f else y)
    return torch.cat(out)


def _low_pass(shape: tuple[int, ...], cut: float, device: str) -> Subject:
    """The filter as it is, two products with circulant matrices, beside the transform that defines it."""
    height, width = shape[2:]
    filtered = LowPass((height, width), cut).to(device)
    u, v = (torch.fft.fftfreq(n, 1 / n, device=device) for n in (height, width))
    gain = torch.exp(-(u[:, None] ** 2 + v[: width // 2 + 1] ** 2) / (2 * cut**2))

    def by_transform(x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=(height, width))

    n = torch.Size(shape).numel()
    return Subject(
        op="low_pass",
        case="x".join(map(str, shape)),
        dtype=torch.float32,
        device=device,
        pass_="forward",
        bytes_=2 * 4 * n,
        flops=2 * (height + width) * n,
        inputs=lambda: (torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device),),
        ours=filtered,
        expected=by_transform,
        peers={"rfft2": by_transform},
        tolerance=1e-5,
        runs=None,
        products=True,
    )
