"""The inputs that every backend of fake_quant meets."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zsq_ext.ops.cases import LAYOUTS, ErrorCase


@dataclass(frozen=True)
class FakeQuantCase:
    """One input of fake_quant.

    `values` is what x holds, in units of each channel's step: "normal" reaches beyond both ends of the range; "ties"
    are exact half-integers; "boundary" are products (k + 1/2) * scale and their neighbours, where dividing and
    multiplying by the reciprocal disagree; "edges" lie at both ends of the range; "special" has NaN, infinities,
    zeros and the extremes of the dtype.
    """

    name: str
    shape: tuple[int, ...] = (4, 8, 6, 6)
    dtype: torch.dtype = torch.float32
    axis: int | None = None
    groups: int = 0  # of each channel, which then lies along axis 0
    qmin: int = -8
    qmax: int = 7
    zero_point: str = "zero"  # "zero", "inside" or "outside" the range
    values: str = "normal"
    layout: str = "contiguous"

    def args(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, int, int, int | None]:
        """(x, scale, zero_point, qmin, qmax, axis), the same on every device."""
        rng = torch.Generator().manual_seed(seed)
        channels = 1 if self.axis is None else self.shape[self.axis]
        channels *= max(self.groups, 1)
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        # Ties must be exact, so their steps are powers of two; elsewhere a step has a full mantissa.
        scale = torch.rand(channels, generator=rng, dtype=compute) * 0.09 + 0.01
        if self.values == "ties":
            scale = 2.0 ** scale.log2().round()
        zero_point = {
            "zero": torch.zeros(channels, dtype=torch.int32),
            "inside": torch.randint(self.qmin, self.qmax + 1, (channels,), generator=rng, dtype=torch.int32),
            "outside": torch.randint(self.qmax + 1, self.qmax + 90, (channels,), generator=rng, dtype=torch.int32),
        }[self.zero_point]
        shape = [1] * len(self.seen)
        if self.axis is not None:
            shape[self.axis] = channels
        x = self._x(scale.view(shape), zero_point.view(shape), rng).to(self.dtype)
        x = LAYOUTS[self.layout](x.reshape(self.shape).to(device))
        if self.groups:
            scale, zero_point = scale.view(-1, self.groups), zero_point.view(-1, self.groups)
        return x, scale.to(device), zero_point.to(device), self.qmin, self.qmax, self.axis

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape of x, or with groups [all groups, elements of one]: the grid's numbers go along axis."""
        if not self.groups:
            return self.shape
        return self.shape[0] * self.groups, math.prod(self.shape[1:]) // self.groups

    def learned(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, int, int, int | None]:
        """The same with a zero-point as LSQ+ learns it: in scale's dtype, and up to exactly half a code aside."""
        x, scale, zero_point, qmin, qmax, axis = self.args(device, seed)
        aside = torch.tensor([0.5, -0.3, -0.5, 0.2], dtype=scale.dtype, device=device)
        aside = aside[torch.arange(zero_point.numel(), device=device) % 4].view(zero_point.shape)
        return x, scale, zero_point + aside, qmin, qmax, axis

    def grad(self, device: str = "cpu", seed: int = 1) -> Tensor:
        """An upstream gradient, contiguous whatever x's layout is."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=rng, dtype=torch.float64).to(self.dtype).to(device)

    def _x(self, scale: Tensor, zero_point: Tensor, rng: torch.Generator) -> Tensor:
        low, high = self.qmin - zero_point, self.qmax - zero_point  # the range, in steps from x = 0

        def steps(ends: float) -> Tensor:
            """Whole numbers from `ends` below the range to `ends` above it."""
            u = torch.rand(self.seen, generator=rng, dtype=scale.dtype)
            return (low - ends + u * (high - low + 2 * ends)).round()

        if self.values == "ties":
            return (steps(3) + 0.5) * scale
        if self.values == "boundary":
            x = (steps(1) + 0.5) * scale
            aside = torch.randint(-1, 2, self.seen, generator=rng)
            return torch.nextafter(x, x + aside)
        if self.values == "edges":
            u = torch.rand(self.seen, generator=rng)
            x = torch.where(u < 0.5, low * scale, high * scale)
            return torch.nextafter(x, x + torch.randint(-1, 2, self.seen, generator=rng))
        if self.values == "special":
            info = torch.finfo(self.dtype)
            odd = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.max, info.min, info.tiny, -info.tiny]
            odd += [info.tiny * info.eps, 2.0**24 + 2, 2.0**31, -(2.0**31)]
            table = torch.tensor(odd, dtype=scale.dtype)
            return table[torch.randint(len(odd), self.seen, generator=rng)]
        spread = 0.35 * (high - low) * torch.randn(self.seen, generator=rng, dtype=scale.dtype)
        return ((low + high) / 2 + spread) * scale


def _fake_quant_cases() -> list[FakeQuantCase]:
    half, brain = torch.float16, torch.bfloat16
    cases = [
        FakeQuantCase("per_tensor"),
        FakeQuantCase("per_channel", axis=0, zero_point="inside"),
        FakeQuantCase("axis_1", axis=1, zero_point="inside"),
        FakeQuantCase("axis_last", axis=3, shape=(4, 3, 5, 16)),
        FakeQuantCase("unsigned", qmin=0, qmax=255, zero_point="inside"),
        FakeQuantCase("wide", qmin=-300, qmax=40000, zero_point="inside"),
        FakeQuantCase("wide_channel", qmin=-1, qmax=255, axis=1, values="special"),
        FakeQuantCase("two_bits", qmin=-2, qmax=1),
        FakeQuantCase("one_code", qmin=3, qmax=3),
        FakeQuantCase("scalar", shape=()),
        FakeQuantCase("one_channel", shape=(5, 1, 3), axis=1),
        FakeQuantCase("tail", shape=(1037,)),
        FakeQuantCase("tail_channel", shape=(3, 5, 7, 7), axis=1),
        FakeQuantCase("short_rows", shape=(2, 9, 3), axis=1, zero_point="inside"),
        FakeQuantCase("empty", shape=(0, 8, 6, 6)),
        FakeQuantCase("empty_inner", shape=(4, 8, 0), axis=1),
        FakeQuantCase("no_channels", shape=(4, 0, 6), axis=1),
        FakeQuantCase("threads", shape=(3, 64, 40, 40), axis=1),
        FakeQuantCase("parts", shape=(3, 7, 61, 67), zero_point="inside"),
        FakeQuantCase("parts_channels_last", shape=(3, 20, 40, 40), axis=1, layout="channels_last"),
        FakeQuantCase("ties", values="ties"),
        FakeQuantCase("ties_channel", values="ties", axis=1, zero_point="inside"),
        FakeQuantCase("boundary", values="boundary"),
        FakeQuantCase("boundary_channel", values="boundary", axis=0, qmin=-128, qmax=127),
        FakeQuantCase("edges", values="edges", axis=1, zero_point="inside"),
        FakeQuantCase("nan_inf", values="special"),
        FakeQuantCase("nan_inf_channel", values="special", axis=1, zero_point="inside"),
        FakeQuantCase("zp_outside", zero_point="outside"),
        FakeQuantCase("zp_outside_channel", zero_point="outside", axis=0, values="ties"),
        FakeQuantCase("strided", layout="strided", axis=1),
        FakeQuantCase("expanded", layout="expanded", axis=1),
        FakeQuantCase("misaligned", layout="misaligned", axis=1),
        FakeQuantCase("channels_last", layout="channels_last"),
        FakeQuantCase("channels_last_axis_0", layout="channels_last", axis=0, zero_point="inside"),
        FakeQuantCase("channels_last_axis_1", layout="channels_last", axis=1, zero_point="inside"),
        FakeQuantCase("channels_last_odd", layout="channels_last", axis=1, shape=(2, 11, 5, 3), zero_point="inside"),
        FakeQuantCase("permuted", layout="permuted", axis=2, shape=(3, 4, 5, 6), zero_point="inside"),
        FakeQuantCase("groups", axis=0, groups=4, zero_point="inside"),
        FakeQuantCase("groups_odd", axis=0, groups=5, shape=(3, 5, 7), values="boundary"),
        FakeQuantCase("groups_of_one", axis=0, groups=6, shape=(3, 2, 3), zero_point="inside"),
        FakeQuantCase("groups_channels_last", axis=0, groups=8, layout="channels_last", zero_point="inside"),
        FakeQuantCase("groups_strided", axis=0, groups=2, layout="strided", values="special"),
        FakeQuantCase("groups_empty", axis=0, groups=2, shape=(0, 8, 6)),
        FakeQuantCase("groups_threads", axis=0, groups=3, shape=(5, 3, 130, 61), zero_point="outside"),
        FakeQuantCase("groups_fp16", axis=0, groups=3, shape=(4, 6, 5), dtype=half, zero_point="inside"),
        FakeQuantCase("groups_fp64", axis=0, groups=3, shape=(4, 6, 5), dtype=torch.float64, layout="permuted"),
    ]
    for dtype, label in ((half, "fp16"), (brain, "bf16")):
        cases += [
            FakeQuantCase(label, dtype=dtype),
            FakeQuantCase(f"{label}_channel", dtype=dtype, axis=1, zero_point="inside"),
            FakeQuantCase(f"{label}_tail", dtype=dtype, shape=(3, 5, 7, 7), axis=0),
            FakeQuantCase(f"{label}_ties", dtype=dtype, values="ties"),
            FakeQuantCase(f"{label}_nan_inf", dtype=dtype, values="special"),
            FakeQuantCase(f"{label}_8_bits", dtype=dtype, qmin=-128, qmax=127, zero_point="outside"),
            FakeQuantCase(f"{label}_channels_last", dtype=dtype, layout="channels_last", axis=1, shape=(2, 12, 5, 3)),
            FakeQuantCase(f"{label}_misaligned", dtype=dtype, layout="misaligned"),
        ]
    cases += [
        FakeQuantCase("fp64", dtype=torch.float64),
        FakeQuantCase("fp64_channel", dtype=torch.float64, axis=1, zero_point="inside", values="boundary"),
        FakeQuantCase("fp64_nan_inf", dtype=torch.float64, values="special"),
    ]
    return cases


FAKE_QUANT = tuple(_fake_quant_cases())


def _codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


# The good call: x float32 [2, 4, 3], scale and zero_point [4], codes -8 ... 7, axis 1.
FAKE_QUANT_ERRORS = (
    ErrorCase("scale_number", TypeError, "fake_quant: scale must be a tensor, got float", {"scale": 0.1}),
    ErrorCase(
        "x_integer",
        TypeError,
        "fake_quant: x must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        {"x": _codes(2, 4, 3)},
    ),
    ErrorCase(
        "scale_dtype",
        TypeError,
        "fake_quant: scale must be torch.float32 for torch.float32 x, got torch.float64",
        {"scale": torch.ones(4, dtype=torch.float64)},
    ),
    ErrorCase(
        "scale_dtype_of_fp64",
        TypeError,
        "fake_quant: scale must be torch.float64 for torch.float64 x, got torch.float32",
        {"x": torch.zeros(2, 4, 3, dtype=torch.float64)},
    ),
    ErrorCase(
        "zero_point_dtype",
        TypeError,
        "fake_quant: zero_point must be torch.int32 for torch.float32 x, got torch.float32",
        {"zero_point": torch.zeros(4)},
    ),
    ErrorCase(
        "scale_shape",
        ValueError,
        "fake_quant: scale must have shape (1,) or (4,), got (3,)",
        {"scale": torch.ones(3), "zero_point": _codes(3)},
    ),
    ErrorCase(
        "scale_0d", ValueError, "fake_quant: scale must have shape (1,) or (4,), got ()", {"scale": torch.tensor(1.0)}
    ),
    ErrorCase(
        "zero_point_shape",
        ValueError,
        "fake_quant: zero_point must have shape (1,) or (4,), got (4, 1)",
        {"zero_point": _codes(4, 1)},
    ),
    ErrorCase(
        "groups_axis",
        ValueError,
        "fake_quant: scale must have shape (1,) or (4,), got (4, 3)",
        {"scale": torch.ones(4, 3)},
    ),
    ErrorCase(
        "groups_channels",
        ValueError,
        "fake_quant: scale must have shape (1,), (2,) or (2, G), got (4, 3)",
        {"scale": torch.ones(4, 3), "axis": 0},
    ),
    ErrorCase(
        "groups_uneven",
        ValueError,
        "fake_quant: scale must have groups that divide the 12 elements of a channel, got 5",
        {"scale": torch.ones(2, 5), "axis": 0},
    ),
    ErrorCase(
        "groups_none",
        ValueError,
        "fake_quant: scale must have groups that divide the 12 elements of a channel, got 0",
        {"scale": torch.ones(2, 0), "axis": 0},
    ),
    ErrorCase(
        "groups_differ",
        ValueError,
        "fake_quant: zero_point must have shape (1,) or scale's shape (2, 3), got (2,)",
        {"scale": torch.ones(2, 3), "zero_point": _codes(2), "axis": 0},
    ),
    ErrorCase(
        "groups_scale_zero",
        ValueError,
        "fake_quant: scale must be positive and finite, got 0.0 in group (1, 0)",
        {"scale": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "zero_point": _codes(1), "axis": 0, "check": True},
    ),
    ErrorCase("out_number", TypeError, "fake_quant: out must be a tensor, got int", {"out": 1}),
    ErrorCase(
        "out_dtype",
        TypeError,
        "fake_quant: out must be torch.float32 as x is, got torch.int32",
        {"out": _codes(2, 4, 3)},
    ),
    ErrorCase(
        "out_shape", ValueError, "fake_quant: out must have x's shape (2, 4, 3), got (24,)", {"out": torch.ones(24)}
    ),
    ErrorCase(
        "out_device",
        ValueError,
        "fake_quant: out must be on cpu, got meta",
        {"out": torch.ones(2, 4, 3, device="meta")},
    ),
    ErrorCase(
        "out_with_gradient",
        ValueError,
        "fake_quant: out must be None where a gradient is taken, got a tensor",
        {"x": torch.zeros(2, 4, 3, requires_grad=True), "out": torch.ones(2, 4, 3)},
    ),
    ErrorCase(
        "out_of_a_learned_scale",
        ValueError,
        "fake_quant: out must be None where a gradient is taken, got a tensor",
        {"scale": torch.ones(4, requires_grad=True), "grad": "lsq", "out": torch.ones(2, 4, 3)},
    ),
    ErrorCase("no_axis", ValueError, "fake_quant: scale must have shape (1,), got (4,)", {"axis": None}),
    ErrorCase("axis_range", ValueError, "fake_quant: axis must be in [-3, 2], got 3", {"axis": 3}),
    ErrorCase(
        "axis_0d", ValueError, "fake_quant: axis must be None for 0-d x, got 0", {"x": torch.tensor(1.0), "axis": 0}
    ),
    ErrorCase(
        "empty_range",
        ValueError,
        "fake_quant: qmin must be <= qmax, both within 2**24 of 0, got 7 and -8",
        {"qmin": 7, "qmax": -8},
    ),
    ErrorCase(
        "wide_range",
        ValueError,
        "fake_quant: qmin must be <= qmax, both within 2**24 of 0, got 0 and 16777217",
        {"qmin": 0, "qmax": 2**24 + 1},
    ),
    ErrorCase(
        "grad_name",
        ValueError,
        "fake_quant: grad must be one of ste_clip, ste, lsq, lsq_plus, got 'tanh'",
        {"grad": "tanh"},
    ),
    ErrorCase(
        "grad_scale",
        ValueError,
        "fake_quant: grad_scale must be finite, got inf",
        {"grad": "lsq", "grad_scale": math.inf},
    ),
    ErrorCase(
        "zero_point_not_learned",
        TypeError,
        "fake_quant: zero_point must be torch.float32 for torch.float32 x under lsq_plus, got torch.int32",
        {"grad": "lsq_plus"},
    ),
    ErrorCase(
        "zero_point_learned",
        TypeError,
        "fake_quant: zero_point must be torch.int32 for torch.float32 x, got torch.float32",
        {"grad": "lsq", "zero_point": torch.zeros(4)},
    ),
    ErrorCase(
        "scale_device",
        ValueError,
        "fake_quant: scale must be on cpu, got meta",
        {"scale": torch.ones(4, device="meta")},
    ),
    ErrorCase(
        "scale_zero",
        ValueError,
        "fake_quant: scale must be positive and finite, got 0.0 in channel 2",
        {"scale": torch.tensor([1.0, 1.0, 0.0, -1.0]), "check": True},
    ),
    ErrorCase(
        "scale_nan",
        ValueError,
        "fake_quant: scale must be positive and finite, got nan in channel 0",
        {"scale": torch.tensor([torch.nan, 1.0, 1.0, 1.0]), "check": True},
    ),
)

# What the benchmark times: activations of the first ResNet-18 stage at batch 16, its largest weight, and a small one.
FAKE_QUANT_BENCH = (
    FakeQuantCase("weight_512x512x3x3", shape=(512, 512, 3, 3), axis=0),
    FakeQuantCase("weight_64x64x3x3", shape=(64, 64, 3, 3), axis=0),
    FakeQuantCase("weight_groups_of_128", shape=(512, 4608), axis=0, groups=36),
    FakeQuantCase("activation_16x64x56x56", shape=(16, 64, 56, 56), qmin=0, qmax=255, zero_point="inside"),
    FakeQuantCase("activation_channel", shape=(16, 64, 56, 56), axis=1),
    FakeQuantCase("activation_channels_last", shape=(16, 64, 56, 56), axis=1, layout="channels_last"),
    FakeQuantCase("activation_bf16", shape=(16, 64, 56, 56), dtype=torch.bfloat16),
    FakeQuantCase("tiny_16", shape=(16,)),
)
# And activations of other networks: the first stages of ResNet-20 and -50, a late block of MobileNetV2.
FAKE_QUANT_BENCH_LAYERS = (
    FakeQuantCase("resnet20_64x16x32x32", shape=(64, 16, 32, 32), qmin=0, qmax=15, zero_point="inside"),
    FakeQuantCase("resnet50_16x256x56x56", shape=(16, 256, 56, 56), qmin=0, qmax=15, zero_point="inside"),
    FakeQuantCase("mobilenetv2_16x960x7x7", shape=(16, 960, 7, 7), qmin=0, qmax=15, zero_point="inside"),
)
# On a GPU also what no cache holds, per tensor and per channel.
FAKE_QUANT_BENCH_LARGE = (
    FakeQuantCase("large_2^28", shape=(1 << 28,)),
    FakeQuantCase("large_2^28_channel", shape=(256, 1 << 20), axis=0),
)
