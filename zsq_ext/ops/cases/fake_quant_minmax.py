"""The inputs that every backend of fake_quant_minmax meets."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.cases import LAYOUTS, ErrorCase


@dataclass(frozen=True)
class MinMaxCase:
    """Tensors as a network has them.

    `values` is what they hold: "normal"; "constant" has a different constant per channel, zero among them; "away" lies
    far from 0, so that the scale is the finest there is; "ties" makes every half a tie; "special" has a channel each
    with NaN, infinity, minus infinity, minus zero, and both ends of the dtype.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...] = ((6, 3, 3, 3), (5, 7, 1, 1), (9, 33))
    bits: tuple[int, ...] = (4, 8, 2)
    axes: tuple[int, ...] = (0, 0, 0)
    symmetric: bool = False
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    layout: str = "contiguous"

    def args(self, device: str = "cpu", seed: int = 0) -> tuple[list[Tensor], list[int], list[int], bool]:
        """(tensors, bits, axes, symmetric), the same on every device."""
        rng = torch.Generator().manual_seed(seed)
        tensors = []
        for shape, bits, axis in zip(self.shapes, self.bits, self.axes, strict=True):
            rows = self._rows(shape[axis], torch.Size(shape).numel() // shape[axis], bits, rng).to(self.dtype)
            moved = rows.view(shape[axis], *shape[:axis], *shape[axis + 1 :])
            layout = "contiguous" if self.layout == "channels_last" and len(shape) != 4 else self.layout
            tensors.append(LAYOUTS[layout](moved.movedim(0, axis).to(device)))
        return tensors, list(self.bits), list(self.axes), self.symmetric

    def _rows(self, channels: int, length: int, bits: int, rng: torch.Generator) -> Tensor:
        x = torch.randn(channels, length, generator=rng, dtype=torch.float64)
        if self.values == "constant":
            return (torch.arange(channels) / 3)[:, None].expand(channels, length).double()
        if self.values == "away":
            return x * 1e-6 + 1000
        if self.values == "ties":  # from -0.5 to 2^bits - 1.5 in quarters: steps are 1
            x = (x * 2**bits).round().clamp(-1, 2 ** (bits + 1) - 3) / 2
            x[:, 0], x[:, -1] = -0.5, 2**bits - 1.5
        if self.values == "special":
            info = torch.finfo(self.dtype)
            odd = [torch.nan, torch.inf, -torch.inf, -0.0, info.max, info.min]
            for c in range(channels):
                x[c, c % length] = odd[c % len(odd)]
        return x


def _cases() -> list[MinMaxCase]:
    cases = [
        MinMaxCase("plain"),
        MinMaxCase("symmetric", symmetric=True),
        MinMaxCase("one", shapes=((4, 8),), bits=(3,), axes=(0,)),
        MinMaxCase("transposed", shapes=((4, 6, 3, 3), (5, 4), (3, 2, 7)), axes=(1, 1, 2)),
        MinMaxCase("one_value_each", shapes=((7,), (3, 1), (1, 1)), axes=(0, 0, 0)),
        MinMaxCase("one_channel", shapes=((1, 50), (3, 1, 5), (2, 2, 1)), axes=(0, 1, 2)),
        MinMaxCase("long", shapes=((2, 70001), (3, 1537), (40, 1024))),
        MinMaxCase("many", shapes=((3, 5), (2, 9)) * 70, bits=(2, 3) * 70, axes=(0,) * 140),
        MinMaxCase("constant", values="constant"),
        MinMaxCase("constant_symmetric", values="constant", symmetric=True),
        MinMaxCase("away", values="away"),
        MinMaxCase("ties", values="ties"),
        MinMaxCase("nan_inf", shapes=((6, 3, 3, 3), (7, 7, 1, 1), (12, 33)), values="special"),
        MinMaxCase("nan_inf_symmetric", shapes=((6, 3, 3, 3), (7, 7), (12, 33)), values="special", symmetric=True),
    ]
    for layout in ("channels_last", "strided", "expanded", "misaligned"):
        cases.append(MinMaxCase(layout, layout=layout))
        cases.append(MinMaxCase(f"{layout}_axis_1", layout=layout, axes=(1, 1, 1)))
    for dtype, label in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float64, "fp64")):
        cases.append(MinMaxCase(label, dtype=dtype))
        cases.append(MinMaxCase(f"{label}_nan_inf", dtype=dtype, values="special", axes=(1, 0, 1)))
        cases.append(MinMaxCase(f"{label}_misaligned", dtype=dtype, layout="misaligned"))
    return cases


FAKE_QUANT_MINMAX = tuple(_cases())


def _two(**kinds: Any) -> list[Tensor]:
    return [torch.zeros(2, 3), torch.zeros(4, 5, **kinds)]


# The good call: tensors float32 [2, 3] and [4, 5], 4 bits.
FAKE_QUANT_MINMAX_ERRORS = (
    ErrorCase(
        "tensors_one",
        TypeError,
        "fake_quant_minmax: tensors must be a list or tuple of tensors, got Tensor",
        {"tensors": torch.zeros(2, 3)},
    ),
    ErrorCase(
        "tensors_integer",
        TypeError,
        "fake_quant_minmax: tensors[1] must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        {"tensors": _two(dtype=torch.int32)},
    ),
    ErrorCase(
        "tensors_dtypes",
        TypeError,
        "fake_quant_minmax: tensors[1] must be torch.float32 as tensors[0] is, got torch.float16",
        {"tensors": _two(dtype=torch.float16)},
    ),
    ErrorCase(
        "tensors_devices",
        ValueError,
        "fake_quant_minmax: tensors[1] must be on cpu, got meta",
        {"tensors": _two(device="meta")},
    ),
    ErrorCase(
        "tensors_empty",
        ValueError,
        "fake_quant_minmax: tensors[0] must not be empty, got shape (0, 3)",
        {"tensors": [torch.zeros(0, 3)]},
    ),
    ErrorCase(
        "axis_range", ValueError, "fake_quant_minmax: axis must be in [-2, 1] for tensors[0], got 2", {"axis": 2}
    ),
    ErrorCase(
        "axis_0d",
        ValueError,
        "fake_quant_minmax: tensors[0] must have a dimension, got shape ()",
        {"tensors": [torch.tensor(1.0)]},
    ),
    ErrorCase(
        "axis_count",
        ValueError,
        "fake_quant_minmax: axis must be one or one per tensor, got 3 for 2 tensors",
        {"axis": (0, 0, 0)},
    ),
    ErrorCase(
        "bits_count",
        ValueError,
        "fake_quant_minmax: bits must be one or one per tensor, got 1 for 2 tensors",
        {"bits": [4]},
    ),
    ErrorCase(
        "bits_range", ValueError, "fake_quant_minmax: bits[1] must be an integer from 2 to 8, got 9", {"bits": (2, 9)}
    ),
    ErrorCase(
        "bits_float", ValueError, "fake_quant_minmax: bits must be an integer from 2 to 8, got 4.0", {"bits": 4.0}
    ),
    ErrorCase(
        "grad_name",
        ValueError,
        "fake_quant_minmax: grad must be one of ste, ste_clip, got 'lsq'",
        {"grad": "lsq"},
    ),
    ErrorCase(
        "out_count", ValueError, "fake_quant_minmax: out must have 2 tensors, got 1", {"out": [torch.zeros(2, 3)]}
    ),
    ErrorCase(
        "out_shape",
        ValueError,
        "fake_quant_minmax: out[1] must have shape (4, 5) as tensors[1] has, got (5, 4)",
        {"out": [torch.zeros(2, 3), torch.zeros(5, 4)]},
    ),
    ErrorCase(
        "out_with_gradient",
        ValueError,
        "fake_quant_minmax: out must be None where a gradient is taken, got tensors",
        {"tensors": _two(requires_grad=True), "out": _two()},
    ),
)

# The weights of ResNet-18 and MobileNetV2 as torchvision defines them, and of 16 thin layers.
_BLOCKS = [(64, 64), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]
_CONVS = [shape for o, i in _BLOCKS for shape in ((o, i, 3, 3), (o, o, 3, 3), *([(o, i, 1, 1)] if o != i else []))]
RESNET18 = ((64, 3, 7, 7), *_CONVS, (1000, 512))


def _mobilenetv2() -> tuple[tuple[int, ...], ...]:
    shapes: list[tuple[int, ...]] = [(32, 3, 3, 3)]
    width = 32
    for expansion, out, count in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(count):
            hidden = width * expansion
            shapes += [(hidden, width, 1, 1)] if expansion > 1 else []
            shapes += [(hidden, 1, 3, 3), (out, hidden, 1, 1)]
            width = out
    return (*shapes, (1280, 320, 1, 1), (1000, 1280))


FAKE_QUANT_MINMAX_BENCH = tuple(
    MinMaxCase(f"weights_{name}", shapes=shapes, bits=(4,) * len(shapes), axes=(0,) * len(shapes))
    for name, shapes in (
        ("resnet18", RESNET18),
        ("mobilenetv2", _mobilenetv2()),
        ("of_16_thin_layers", ((16, 16, 3, 3),) * 16),
    )
)
