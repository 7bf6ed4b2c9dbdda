"""The inputs that every backend of lp_error meets."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zsq_ext.ops.cases import LAYOUTS, ErrorCase


@dataclass(frozen=True)
class LpErrorCase:
    """A tensor beside the grids of a search.

    `values` is what x holds: "normal"; "exact" lies on the first grid of its channel, whose error is 0; "boundary" lies
    between two of its codes, where dividing and multiplying by the reciprocal disagree; "spread" has runs of magnitudes
    so far apart that float64 too sees the order of a sum; "special" has zeros, NaN, infinities and both ends of the
    dtype.
    """

    name: str
    shape: tuple[int, ...] = (5, 37)
    axis: int | None = 0
    candidates: int = 11
    p: float = 2.4
    qmin: int = -8
    qmax: int = 7
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    layout: str = "contiguous"

    def args(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, int, int, float, int | None]:
        """(x, scale, zero_point, qmin, qmax, p, axis), the same on every device."""
        rng = torch.Generator().manual_seed(seed)
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        channels = 1 if self.axis is None else self.shape[self.axis]
        x = torch.randn(self.shape, generator=rng, dtype=torch.float64)
        ratios = torch.linspace(1, 0.01, self.candidates, dtype=torch.float64)
        widest = torch.rand(channels, 1, generator=rng, dtype=torch.float64) + 2.5
        scale = (2 * widest * ratios / (self.qmax - self.qmin)).to(compute)
        zero_point = torch.randint(-3, 4, scale.shape, generator=rng, dtype=torch.int32)
        sizes = [1] * len(self.shape)
        if self.axis is not None:
            sizes[self.axis] = channels
        if self.values == "exact":
            scale = 2.0 ** scale.log2().round()
        if self.values in ("exact", "boundary"):
            steps = torch.randint(self.qmin, self.qmax + 1, self.shape, generator=rng) - zero_point[:, 0].view(sizes)
            x = (steps + 0.5 * (self.values == "boundary")) * scale[:, 0].view(sizes)
        if self.values == "spread":
            runs = torch.rand(x.numel() // 16 + 1, generator=rng).repeat_interleave(16)[: x.numel()]
            x = x * 10.0 ** (14 * runs.view(self.shape) - 7)
        if self.values == "special":
            info = torch.finfo(self.dtype)
            odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.max, info.min, info.tiny])
            at = torch.randint(len(odd), (max(channels, 1),), generator=rng)
            rows = x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)
            rows[:, rows.size(1) // 2] = odd[at].double()
            x = rows.view(self.shape) if self.axis in (None, 0) else x
        return (
            LAYOUTS[self.layout](x.to(self.dtype).to(device)),
            scale.to(device),
            zero_point.to(device),
            self.qmin,
            self.qmax,
            self.p,
            self.axis,
        )


def _cases() -> list[LpErrorCase]:
    cases = [
        LpErrorCase("weights", shape=(4, 3, 3, 3), candidates=100),
        LpErrorCase("axis_1", shape=(3, 5, 4, 2), axis=1),
        LpErrorCase("tensor", shape=(7, 31), axis=None, candidates=80, qmin=0, qmax=15),
        LpErrorCase("scalar", shape=(), axis=None),
        LpErrorCase("vector", shape=(9,)),
        LpErrorCase("one_candidate", candidates=1),
        LpErrorCase("eight_candidates", candidates=8, shape=(2, 16)),
        LpErrorCase("more_candidates_than_a_block", candidates=130, shape=(2, 17)),
        LpErrorCase("one_code", qmin=2, qmax=2),
        LpErrorCase("eight_bits", qmin=-128, qmax=127),
        LpErrorCase("chunks", shape=(2, 1024 + 33), candidates=3),
        LpErrorCase("square", p=2.0, shape=(3, 70)),
        LpErrorCase("absolute", p=1.0),
        LpErrorCase("root", p=0.5),
        LpErrorCase("fourth", p=4.0),
        LpErrorCase("sixteenth", p=16.0),
        LpErrorCase("exact", values="exact"),
        LpErrorCase("exact_root", values="exact", p=0.3),
        LpErrorCase("boundary", values="boundary", shape=(6, 200), candidates=2, qmin=-128, qmax=127),
        LpErrorCase("spread", values="spread", shape=(2, 2100), candidates=2),
        LpErrorCase("nan_inf", values="special", shape=(12, 9)),
        LpErrorCase("nan_inf_square", values="special", shape=(12, 9), p=2.0),
        LpErrorCase("nan_inf_root", values="special", shape=(12, 9), p=0.5),
        LpErrorCase("empty", shape=(3, 0, 4)),
        LpErrorCase("no_channels", shape=(0, 4)),
        LpErrorCase("no_candidates", candidates=0),
    ]
    for layout in ("channels_last", "strided", "expanded", "misaligned", "permuted"):
        cases.append(LpErrorCase(layout, shape=(4, 6, 3, 5), layout=layout, candidates=5))
        cases.append(LpErrorCase(f"{layout}_axis_1", shape=(2, 6, 3, 5), layout=layout, axis=1, candidates=5))
        cases.append(LpErrorCase(f"{layout}_tensor", shape=(2, 6, 3, 5), layout=layout, axis=None, candidates=5))
    for dtype, label in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float64, "fp64")):
        cases.append(LpErrorCase(label, dtype=dtype))
        cases.append(LpErrorCase(f"{label}_square", dtype=dtype, p=2.0, axis=None))
        cases.append(LpErrorCase(f"{label}_nan_inf", dtype=dtype, values="special", shape=(12, 9)))
    return cases


LP_ERROR = tuple(_cases())

# The good call: x float32 [2, 3], scale and zero_point [2, 4], codes -8 ... 7, p 2.4, axis 0.
LP_ERROR_ERRORS = (
    ErrorCase(
        "x",
        TypeError,
        "lp_error: x must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        {"x": torch.zeros(2, 3, dtype=torch.int32)},
    ),
    ErrorCase("scale_number", TypeError, "lp_error: scale must be a tensor, got float", {"scale": 0.5}),
    ErrorCase(
        "scale_dtype",
        TypeError,
        "lp_error: scale must be torch.float32 for torch.float32 x, got torch.float64",
        {"scale": torch.ones(2, 4, dtype=torch.float64)},
    ),
    ErrorCase("scale_shape", ValueError, "lp_error: scale must have shape (2, K), got (4,)", {"scale": torch.ones(4)}),
    ErrorCase("scale_of_a_tensor", ValueError, "lp_error: scale must have shape (1, K), got (2, 4)", {"axis": None}),
    ErrorCase(
        "zero_point_shape",
        ValueError,
        "lp_error: zero_point must have scale's shape (2, 4), got (2, 1)",
        {"zero_point": torch.zeros(2, 1, dtype=torch.int32)},
    ),
    ErrorCase(
        "zero_point_dtype",
        TypeError,
        "lp_error: zero_point must be torch.int32 for torch.float32 x, got torch.float32",
        {"zero_point": torch.zeros(2, 4)},
    ),
    ErrorCase(
        "zero_point_device",
        ValueError,
        "lp_error: zero_point must be on cpu, got meta",
        {"zero_point": torch.zeros(2, 4, dtype=torch.int32, device="meta")},
    ),
    ErrorCase("axis_range", ValueError, "lp_error: axis must be in [-2, 1], got 2", {"axis": 2}),
    ErrorCase(
        "empty_range",
        ValueError,
        "lp_error: qmin must be <= qmax, both within 2**24 of 0, got 8 and 7",
        {"qmin": 8},
    ),
    ErrorCase("p_zero", ValueError, "lp_error: p must be above 0 and at most 16, got 0", {"p": 0}),
    ErrorCase("p_large", ValueError, "lp_error: p must be above 0 and at most 16, got 17", {"p": 17}),
    ErrorCase("p_nan", ValueError, "lp_error: p must be above 0 and at most 16, got nan", {"p": math.nan}),
)

# What a search does: the largest weight of ResNet-18 and a small one, per channel; an activation as a whole.
LP_ERROR_BENCH = (
    LpErrorCase("weight_512x512x3x3", shape=(512, 512, 3, 3), candidates=100),
    LpErrorCase("weight_64x64x3x3", shape=(64, 64, 3, 3), candidates=100),
    LpErrorCase("weight_64x64x3x3_square", shape=(64, 64, 3, 3), candidates=100, p=2.0),
    LpErrorCase("activation_4x64x56x56", shape=(4, 64, 56, 56), axis=None, candidates=80, qmin=0, qmax=15),
)
