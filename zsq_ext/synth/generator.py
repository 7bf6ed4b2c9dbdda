"""The generators of GDFQ and its descendants: noise and a label in, an image out (Xu et al. 2020, arXiv 2003.03603)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_ext.core.check import require
from zsq_ext.ops import channel_sums, statistics_of

KINDS = ("embedding", "conditional")

LARGEST_EMBEDDING = 64
"""Images up to this size are made by the generator that was published for 32 pixels, larger ones by that for 224."""


class Generator(nn.Module):
    """An image of a class, from noise, in two rounds of upsampling and convolution.

        h = Linear(E[y] * z)  or  Linear(z),                 128 x H/4 x W/4
        h = BN(h)
        h = LeakyReLU(BN(conv(up(h)))), twice,               128 x H/2 x W/2, then 64 x H x W
        x = BN(tanh(conv(h))),                               C x H x W

    The last norm has no parameters: every batch of images has mean 0 and variance 1 per channel, as normalised inputs
    have, and pixels know no other bound. All norms use the batch's own statistics, whatever the module's mode.

    Args:
        num_classes: K, at least 2.
        shape: (C, H, W) of the images, H and W multiples of 4.
        latent: size of the noise.
        kind: ``"embedding"``, where the label enters by a product with the noise (published for 32 pixels);
            ``"conditional"``, where it chooses the norms' scales and shifts (published for 224 pixels); None goes by
            the images' size.
        plain: upsample and convolve instead of ``UpConv``'s shorter way, to measure against. Parameters have the same
            names and values.

    Input z (N, latent) and labels (N,) int64; output (N, C, H, W), in channels-last memory.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> generator = Generator(10, (3, 32, 32))
        >>> generator(torch.randn(4, 100), torch.tensor([0, 3, 3, 9])).shape
        torch.Size([4, 3, 32, 32])

    Source: the released code of GDFQ, whose layers KMDFQ, AdaSG, AdaDFQ and AIT share.
    """

    # the published code passes 0.8 where batch norm takes eps (it may have meant momentum); it defines the behaviour
    EPS = 0.8
    SLOPE = 0.2

    def __init__(
        self,
        num_classes: int,
        shape: tuple[int, int, int],
        latent: int = 100,
        kind: str | None = None,
        *,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.check(shape)
        require("Generator", "num_classes", num_classes, num_classes >= 2, "be at least 2")
        require("Generator", "latent", latent, latent >= 1, "be at least 1")
        require("Generator", "kind", kind, kind is None or kind in KINDS, f"be None or one of {', '.join(KINDS)}")
        self.kind = kind or kind_for(shape)
        channels, height, width = shape
        self.small = 128, height // 4, width // 4
        by_label = self.kind == "conditional"
        groups = num_classes if by_label else 1
        self.embedding = None if by_label else nn.Embedding(num_classes, latent)
        self.project = nn.Linear(latent, 128 * (height // 4) * (width // 4))
        self.norm0 = LabelNorm(128, groups, eps=1e-5)
        self.up1 = UpConv(128, 128, plain=plain)
        self.norm1 = LabelNorm(128, groups, eps=self.EPS)
        self.up2 = UpConv(128, 64, plain=plain)
        self.norm2 = LabelNorm(64, groups, eps=self.EPS)
        self.out = nn.Conv2d(64, channels, 3, padding=1)

    @staticmethod
    def check(shape: tuple[int, int, int], otherwise: str = "") -> None:
        """Refuses a shape that no generator makes; ``otherwise`` is what the message advises."""
        fits = min(shape) >= 1 and shape[1] % 4 == 0 and shape[2] % 4 == 0
        rule = f"have height and width divisible by 4 where a generator makes images{otherwise}"
        require("Generator", "input_shape", shape, fits, rule)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        h = self.project(z if self.embedding is None else self.embedding(labels) * z)
        h = h.view(-1, *self.small).contiguous(memory_format=torch.channels_last)
        h = self.norm0(h, labels)
        h = F.leaky_relu_(self.norm1(self.up1(h), labels), self.SLOPE)
        h = F.leaky_relu_(self.norm2(self.up2(h), labels), self.SLOPE)
        return F.batch_norm(torch.tanh(self.out(h)), None, None, training=True)


def kind_for(shape: tuple[int, int, int]) -> str:
    """The kind of generator for images of that shape."""
    return "embedding" if max(shape[1:]) <= LARGEST_EMBEDDING else "conditional"


class UpConv(nn.Conv2d):
    """Nearest-neighbour upsampling by 2 and a 3 x 3 convolution, as one convolution of the small map.

    An output row sees three rows of the upsampled map, which are two of the small one: (w0, w1 + w2) of the rows
    (i - 1, i) for row 2 i, and (w0 + w1, w2) of (i, i + 1) for row 2 i + 1; columns alike. So 4 taps do for 9, the
    padding's zeros stay zeros, and the large map, which has 4 times as many values, is never made. A transposed
    convolution of stride 2 with the 4 x 4 kernel of those sums is just this. Its map from the weight is linear, so the
    3 x 3 weight gets its gradient through it.

    Args:
        in_channels, out_channels: as for ``nn.Conv2d``.
        plain: upsample and convolve in two steps.

    Input (N, in_channels, H, W); output (N, out_channels, 2 H, 2 W). Fast in channels-last memory.
    """

    def __init__(self, in_channels: int, out_channels: int, *, plain: bool = False) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))
        return F.conv_transpose2d(x, sums_of_taps(self.weight), self.bias, stride=2, padding=1)


def sums_of_taps(weight: Tensor) -> Tensor:
    """The kernel of ``UpConv``'s transposed convolution: the sums of all 2 x 2 windows of the zero-padded weight.

    Args:
        weight: (O, I, 3, 3).

    Returns:
        (I, O, 4, 4), turned by half a circle, as a transposed convolution reads it.

    Example:
        >>> sums_of_taps(torch.tensor([[[[0.0, 0.0, 0.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]]]))[0, 0, 1]
        tensor([4., 6., 3., 1.])
    """
    return F.avg_pool2d(weight.transpose(0, 1), 2, stride=1, padding=1, divisor_override=1).flip(2, 3)


class LabelNorm(nn.Module):
    """Batch norm by the batch's own statistics, with one scale and shift, or one of each per class.

        y = a u + b,     a = weight[label] / sqrt(var + eps),     b = bias[label] - a mean

    mean and var are the batch's, per channel and of all classes together. With classes, scales and shifts fold into one
    affine per sample, so the map is read once for its statistics and once for the result.

    Args:
        channels: C.
        classes: 1 is a plain batch norm, which ignores the labels.
        eps: of the square root.

    Input (N, C, H, W) and labels (N,) int64.
    """

    def __init__(self, channels: int, classes: int = 1, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(classes, channels))
        self.bias = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, u: Tensor, labels: Tensor) -> Tensor:
        if len(self.weight) == 1:
            return F.batch_norm(u, None, None, self.weight[0], self.bias[0], training=True, eps=self.eps)
        zero = u.new_zeros(u.shape[1])
        mean, var = statistics_of(*channel_sums(u, zero), u.numel() // u.shape[1], zero)
        scale = F.embedding(labels, self.weight) * (var + self.eps).rsqrt()
        shift = F.embedding(labels, self.bias) - scale * mean
        return torch.addcmul(shift[:, :, None, None], scale[:, :, None, None], u)
