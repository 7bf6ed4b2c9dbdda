"""The Gaussian low-pass filter of SynQ as two exact circulant matrix products.

The filter multiplies the spectrum by exp(-(u^2 + v^2) / (2 d0^2)), with u and v in whole frequency bins. That
is separable, so it equals one periodic convolution along each axis, and an image filtered is R x C with two
circulant matrices. No transform, no shift convention, and the gradient is the filter itself.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Attenuation(NamedTuple):
    """What the filter leaves of an image, see `attenuation`."""

    edge: float
    corner: float
    white_noise_kept: float
    sigma: float


def lowpass_taps(n: int, d0: float) -> Tensor:
    """One period of the filter along one axis, the inverse DFT of the Gaussian.

        h_j = (1/n) sum_k g_k cos(2 pi j k / n),     g_k = exp(-k^2 / (2 d0^2)),  k = -n/2 .. n/2

    A sampled spatial Gaussian would be another filter: at the published cuts its width is below half a pixel.

    Args:
        n: axis length in pixels, odd or even, >= 1.
        d0: cut in frequency bins, > 0; the gain there is exp(-1/2).

    Returns:
        (n,) fp64, h_0 the centre, summing to 1.

    Raises:
        ValueError: n below 1 or d0 not positive.
    """
    return torch.fft.ifft(_gains(n, d0, "lowpass_taps")).real


def circulant(
    n: int, d0: float, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The filter along one axis as a symmetric circulant matrix, M[i, j] = h[(i - j) mod n].

    Args:
        n, d0: as for `lowpass_taps`.
        device, dtype: of the result.

    Returns:
        (n, n). Each row sums to 1 after rounding to dtype, so that a constant image passes unchanged.
    """
    taps = lowpass_taps(n, d0).to(dtype)
    # rounding the taps moves their sum; the centre tap, the largest, takes the difference
    taps[0] += 1 - taps.double().sum()
    index = torch.arange(n)
    return taps[(index[:, None] - index) % n].to(device)


def attenuation(n: int, d0: float) -> Attenuation:
    """How strong the filter is on an n x n image.

    Args:
        n, d0: as for `lowpass_taps`.

    Returns:
        edge: gain at the highest frequency of one axis.
        corner: gain where both axes are at it.
        white_noise_kept: share of white noise's variance that passes.
        sigma: standard deviation in pixels of the spatial Gaussian it amounts to, n / (2 pi d0).

    Example:
        >>> round(attenuation(32, 80).white_noise_kept, 3)  # the published cut leaves small images alone
        0.974
    """
    gains = _gains(n, d0, "attenuation")
    edge = gains[n // 2].item()
    return Attenuation(edge, edge**2, gains.square().mean().item() ** 2, n / (2 * math.pi * d0))


class LowPass(nn.Module):
    """The filter for images of one size.

        y = R x C,  per sample and channel

    The boundary is periodic, as in the published transform. Computed in fp32 (fp64 for fp64 images) also
    under autocast, result in x's dtype and contiguous. Contiguous images are read where they lie; of channels-last ones
    the product makes one contiguous copy, which is faster than products that avoid it.

    The products keep to torch's `float32_matmul_precision`: "highest", the default, is fp32 throughout. Whoever sets
    "high" or "medium" gets TF32 here too, which is off by up to 2^-11 of the image's size.

    Args:
        size: (H, W) of the images, odd or even, square or not.
        d0: cut in frequency bins of either axis, > 0. SynQ's default is 80 at every size, which hardly
            filters images of 32 pixels; 8 to 12 does.

    Raises:
        ValueError: sizes below 1, d0 not positive, or (in forward) images of another size.

    Source: SynQ (arXiv 2603.18423), eq. 4.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, size: tuple[int, int], d0: float = 80.0):
        super().__init__()
        height, width = size
        self.d0 = d0
        # derived from size and d0, so not part of a checkpoint
        self.register_buffer("rows", circulant(height, d0), persistent=False)
        self.register_buffer("columns", circulant(width, d0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Filter images (..., H, W)."""
        size = len(self.rows), len(self.columns)
        if x.shape[-2:] != size:
            raise ValueError(f"LowPass: x must have height and width {size}, got shape {tuple(x.shape)}")
        dtype = torch.promote_types(x.dtype, self.rows.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return (self.rows.to(dtype) @ (x.to(dtype) @ self.columns.to(dtype))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"size=({len(self.rows)}, {len(self.columns)}), d0={self.d0}"


def _gains(n: int, d0: float, function: str) -> Tensor:
    """Gain of each DFT bin of one axis in fp64, DC first."""
    if n < 1:
        raise ValueError(f"{function}: n must be at least 1, got {n}")
    if not d0 > 0:
        raise ValueError(f"{function}: d0 must be positive, got {d0}")
    bins = torch.fft.fftfreq(n, d=1 / n, dtype=torch.float64)
    return torch.exp(-bins.square() / (2 * d0**2))
