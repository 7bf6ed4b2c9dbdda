"""The inputs that every backend of view_images and resize_crops meets."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.cases import LAYOUTS, ErrorCase
from zsq_ext.ops.image import edge_of
from zsq_ext.ops.layout import COMPUTE


@dataclass(frozen=True)
class ImageCase:
    """Images, and what the layouts, dtypes and values of both ops have in common.

    `values`: "normal", or "special" with NaN, infinities, zeros of both signs and the extremes of the dtype.
    """

    name: str
    shape: tuple[int, int, int, int] = (4, 3, 13, 21)
    size: tuple[int, int] = (9, 18)
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    layout: str = "contiguous"

    def images(self, shape: tuple[int, ...], device: str, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=rng, dtype=torch.float64).to(self.dtype)
        if self.values == "special":
            info = torch.finfo(self.dtype)
            odd = [torch.nan, torch.inf, -torch.inf, info.max, info.min, info.tiny, -info.tiny, info.tiny * info.eps]
            odd += [0.0, -0.0] * 8 + [1.0, -1.0] * 4
            x = torch.tensor(odd, dtype=self.dtype)[torch.randint(len(odd), shape, generator=rng)]
        return LAYOUTS[self.layout](x.to(device))

    def grad(self, device: str = "cpu", seed: int = 1) -> Tensor:
        """An upstream gradient, in the layout of the images."""
        return self.images((*self.shape[:2], *self.size), device, seed)

    def args(self, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The public function's arguments by name, the same on every device."""
        raise NotImplementedError


@dataclass(frozen=True)
class ViewCase(ImageCase):
    """One input of view_images. `corner` puts each view into a corner of its image; "outside" asks for more."""

    op = "view_images"
    sigma: float | None = 1.25
    clip: bool = True
    corner: str = "random"

    def op_args(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """What the registered op gets: sigma as the weight that it makes."""
        args = self.args(device, seed)
        where = (args[name] for name in ("x", "top", "left", "flip", "size"))
        return *where, edge_of(self.sigma), args["low"], args["high"]

    def backward_args(self, device: str = "cpu") -> tuple[Any, ...]:
        _, top, left, flip, _, edge, *_ = self.op_args(device)
        return self.grad(device), top, left, flip, self.shape[2:], edge

    def args(self, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(seed)
        batch, channels = self.shape[:2]
        room = [self.shape[2 + i] - self.size[i] for i in range(2)]
        start = [torch.randint(0, r + 1, (batch,), generator=rng) for r in room]
        if self.corner == "corners":
            start = [r * (torch.arange(batch) // (1 + i) % 2) for i, r in enumerate(room)]
        if self.corner == "outside":
            start = [torch.randint(-(2**62), 2**62, (batch,), generator=rng) for _ in room]
        low = torch.rand(channels, generator=rng, dtype=COMPUTE[self.dtype]) - 1
        return {
            "x": self.images(self.shape, device, seed),
            "top": start[0].to(device),
            "left": start[1].to(device),
            "flip": (torch.rand(batch, generator=rng) < 0.5).to(device),
            "size": self.size,
            "sigma": self.sigma,
            "low": low.to(device) if self.clip else None,
            "high": (low + 1).to(device) if self.clip else None,
        }


@dataclass(frozen=True)
class CropCase(ImageCase):
    """One input of resize_crops. `crops`: "random"; "full" for the whole image; "pixel" for one; "outside"."""

    op = "resize_crops"
    crops: str = "random"

    def op_args(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """What the registered op gets."""
        return tuple(self.args(device, seed).values())

    def backward_args(self, device: str = "cpu") -> tuple[Any, ...]:
        _, *crops, _ = self.op_args(device)
        return self.grad(device), *crops, self.shape[2:]

    def args(self, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(seed)
        batch = self.shape[0]
        start, extent = [], []
        for full in self.shape[2:]:
            drawn = torch.randint(1, full + 1, (batch,), generator=rng)
            drawn = {"full": torch.full_like(drawn, full), "pixel": torch.ones_like(drawn)}.get(self.crops, drawn)
            start.append((torch.rand(batch, generator=rng) * (full - drawn + 1)).long())
            extent.append(drawn)
        if self.crops == "outside":
            start, extent = (
                [torch.randint(-(2**62), 2**62, (batch,), generator=rng) for _ in range(2)] for _ in range(2)
            )
        return {
            "x": self.images(self.shape, device, seed),
            "top": start[0].to(device),
            "left": start[1].to(device),
            "height": extent[0].to(device),
            "width": extent[1].to(device),
            "flip": (torch.rand(batch, generator=rng) < 0.5).to(device),
            "size": self.size,
        }


# What both ops must take: shapes with tails and without, every layout and dtype.
_LAYOUTS = ("channels_last", "permuted", "strided", "expanded", "misaligned")
_COMMON: dict[str, dict[str, Any]] = {
    "plain": {},
    "tail": {"shape": (3, 2, 11, 31), "size": (7, 23)},
    "whole_groups": {"shape": (2, 3, 20, 40), "size": (16, 32)},
    "one_channel": {"shape": (2, 1, 9, 17), "size": (8, 16)},
    "one_channel_last": {"shape": (2, 1, 9, 17), "size": (8, 16), "layout": "channels_last"},
    "many_channels_last": {"shape": (2, 17, 6, 7), "size": (4, 5), "layout": "channels_last"},
    "one_pixel": {"shape": (3, 2, 1, 1), "size": (1, 1)},
    "one_row": {"shape": (3, 2, 1, 19), "size": (1, 11)},
    "one_column": {"shape": (3, 2, 19, 1), "size": (11, 1)},
    "no_images": {"shape": (0, 3, 8, 8), "size": (4, 4)},
    "no_channels": {"shape": (2, 0, 8, 8), "size": (4, 4)},
    "no_output": {"size": (0, 5)},
    "nan_inf": {"values": "special"},
    "nan_inf_channels_last": {"values": "special", "layout": "channels_last"},
    "threads": {"shape": (3, 3, 150, 161), "size": (131, 140)},
    "threads_channels_last": {"shape": (3, 3, 150, 161), "size": (131, 140), "layout": "channels_last"},
    **{layout: {"layout": layout} for layout in _LAYOUTS},
    **{
        f"{label}_{layout}": {"dtype": dtype, "layout": layout}
        for dtype, label in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float64, "fp64"))
        for layout in ("contiguous", "channels_last", "misaligned")
    },
    "fp16_nan_inf": {"dtype": torch.float16, "values": "special"},
    "bf16_nan_inf": {"dtype": torch.bfloat16, "values": "special"},
    "fp64_nan_inf": {"dtype": torch.float64, "values": "special"},
}

VIEW = (
    *(ViewCase(name, **options) for name, options in _COMMON.items()),
    ViewCase("corners", corner="corners"),
    ViewCase("corners_channels_last", corner="corners", layout="channels_last"),
    ViewCase("outside", corner="outside"),
    ViewCase("everything", size=(13, 21)),
    ViewCase("sharp", sigma=None),
    ViewCase("sharp_corners", sigma=0.0, corner="corners"),
    ViewCase("sharp_nan_inf", sigma=None, values="special"),
    ViewCase("sharp_channels_last", sigma=None, layout="channels_last"),
    ViewCase("wide_sigma", sigma=40.0),
    ViewCase("narrow_sigma", sigma=0.1),
    ViewCase("no_clip", clip=False),
    ViewCase("no_clip_nan_inf", clip=False, values="special"),
)

CROP = (
    *(CropCase(name, **options) for name, options in _COMMON.items()),
    CropCase("larger", size=(16, 26)),
    CropCase("larger_channels_last", size=(16, 26), layout="channels_last"),
    CropCase("smaller", size=(3, 4)),
    CropCase("mixed", size=(3, 26)),
    CropCase("full", size=(13, 21), crops="full"),
    CropCase("full_nan_inf", size=(13, 21), crops="full", values="special"),
    CropCase("pixel", crops="pixel"),
    CropCase("outside", crops="outside"),
)

_FLOATS = "must be a float32, float16, bfloat16 or float64 tensor, got"


def _shared(op: str) -> list[ErrorCase]:
    whole, far = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64, device="meta")
    return [
        ErrorCase("x_list", TypeError, f"{op}: x {_FLOATS} list", {"x": [1.0]}),
        ErrorCase("x_integer", TypeError, f"{op}: x {_FLOATS} torch.int64", {"x": torch.zeros(2, 3, 8, 8).long()}),
        ErrorCase(
            "x_3d", ValueError, f"{op}: x must have shape (B, C, H, W), got (3, 8, 8)", {"x": torch.ones(3, 8, 8)}
        ),
        ErrorCase("top_number", TypeError, f"{op}: top must be a tensor, got int", {"top": 1}),
        ErrorCase(
            "left_dtype",
            TypeError,
            f"{op}: left must be torch.int64 or torch.int32, got torch.float32",
            {"left": torch.zeros(2)},
        ),
        ErrorCase("flip_dtype", TypeError, f"{op}: flip must be torch.bool, got torch.int64", {"flip": whole}),
        ErrorCase("top_shape", ValueError, f"{op}: top must have shape (2,), got (3,)", {"top": torch.tensor([0] * 3)}),
        ErrorCase("top_device", ValueError, f"{op}: top must be on cpu, got meta", {"top": far}),
    ]


# The good call: x float32 [2, 3, 8, 8], everything else [2], size (4, 4), low and high [3].
VIEW_ERRORS = (
    *_shared("view_images"),
    ErrorCase("size_large", ValueError, "view_images: size must be within (8, 8), got (4, 9)", {"size": (4, 9)}),
    ErrorCase("size_negative", ValueError, "view_images: size must be within (8, 8), got (-1, 4)", {"size": (-1, 4)}),
    ErrorCase(
        "sigma_negative", ValueError, "view_images: sigma must be None or >= 0 and finite, got -1.0", {"sigma": -1.0}
    ),
    ErrorCase(
        "sigma_nan",
        ValueError,
        "view_images: sigma must be None or >= 0 and finite, got nan",
        {"sigma": float("nan")},
    ),
    ErrorCase("low_alone", ValueError, "view_images: low and high must both be given, got no high", {"high": None}),
    ErrorCase("high_alone", ValueError, "view_images: low and high must both be given, got no low", {"low": None}),
    ErrorCase("low_number", TypeError, "view_images: low must be a tensor, got float", {"low": 0.0}),
    ErrorCase(
        "high_dtype",
        TypeError,
        "view_images: high must be torch.float32 for torch.float32 x, got torch.float64",
        {"high": torch.ones(3, dtype=torch.float64)},
    ),
    ErrorCase("low_shape", ValueError, "view_images: low must have shape (3,), got (1,)", {"low": torch.zeros(1)}),
    ErrorCase(
        "high_device",
        ValueError,
        "view_images: high must be on cpu, got meta",
        {"high": torch.ones(3, device="meta")},
    ),
)

CROP_ERRORS = (
    *_shared("resize_crops"),
    ErrorCase(
        "width_shape", ValueError, "resize_crops: width must have shape (2,), got (1,)", {"width": torch.tensor([1])}
    ),
    ErrorCase(
        "x_empty",
        ValueError,
        "resize_crops: x must have at least one pixel, got shape (2, 3, 0, 8)",
        {"x": torch.zeros(2, 3, 0, 8)},
    ),
    ErrorCase("size_negative", ValueError, "resize_crops: size must be >= 0, got (4, -1)", {"size": (4, -1)}),
)

# What the benchmark times: the stored ImageNet images of DGH and views of them, and SynQ's augmentation at two sizes.
VIEW_BENCH = (
    ViewCase("32x3x256x256", shape=(32, 3, 256, 256), size=(224, 224)),
    ViewCase("channels_last", shape=(32, 3, 256, 256), size=(224, 224), layout="channels_last"),
    ViewCase("bf16", shape=(32, 3, 256, 256), size=(224, 224), dtype=torch.bfloat16),
)
CROP_BENCH = (
    CropCase("256x3x32x32", shape=(256, 3, 32, 32), size=(32, 32)),
    CropCase("32x3x224x224", shape=(32, 3, 224, 224), size=(224, 224)),
    CropCase("channels_last", shape=(32, 3, 224, 224), size=(224, 224), layout="channels_last"),
)
