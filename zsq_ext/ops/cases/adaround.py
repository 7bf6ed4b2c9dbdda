"""The inputs that every backend of adaround meets."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.cases import LAYOUTS, ErrorCase


@dataclass(frozen=True)
class AdaRoundCase:
    """One weight of adaround.

    `values` is what v holds: "normal" leaves h clamped at either end for some and not for others; "edges" are the v at
    which clamping begins, 0, and their neighbours; "special" has NaN, infinities, zeros and the extremes of the dtype.
    base always reaches beyond both ends of the range.
    """

    name: str
    shape: tuple[int, ...] = (8, 4, 3, 3)
    dtype: torch.dtype = torch.float32
    axis: int | None = 0
    qmin: int = -8
    qmax: int = 7
    zero_point: str = "inside"  # "inside" or "outside" the range
    values: str = "normal"
    layout: str = "contiguous"
    beta: float | None = 5.0

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def args(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int | None]:
        """(v, base, scale, zero_point, qmin, qmax, axis), the same on every device."""
        rng = torch.Generator().manual_seed(seed)
        channels = 1 if self.axis is None else self.shape[self.axis]
        scale = torch.rand(channels, generator=rng, dtype=self.compute) * 0.09 + 0.01
        low, high = (self.qmin, self.qmax) if self.zero_point == "inside" else (self.qmax + 1, self.qmax + 90)
        zero_point = torch.randint(low, high + 1, (channels,), generator=rng, dtype=torch.int32)
        base = torch.randint(self.qmin - 2, self.qmax + 2, self.shape, generator=rng).to(torch.int16)
        v, base = (LAYOUTS[self.layout](t.to(device)) for t in (self._v(rng).to(self.dtype), base))
        return v, base, scale.to(device), zero_point.to(device), self.qmin, self.qmax, self.axis

    def lists(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """The same as the op has it: lists of one, then axis and beta, 0-d or None."""
        *weight, axis = self.args(device, seed)
        beta = None if self.beta is None else torch.tensor(self.beta, dtype=self.compute, device=device)
        return *([part] for part in weight), axis, beta

    def grads(self, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor | None]:
        """Upstream gradients of w_hat, contiguous whatever v's layout is, and of the regulariser."""
        rng = torch.Generator().manual_seed(seed)
        grad = torch.randn(self.shape, generator=rng, dtype=torch.float64).to(self.dtype).to(device)
        return grad, None if self.beta is None else torch.tensor(0.01, dtype=self.compute, device=device)

    def backward_args(self, device: str = "cpu") -> tuple[Any, ...]:
        """What the backward gets, all gradients wanted."""
        grad, grad_reg = self.grads(device)
        return [grad], *self.lists(device), grad_reg, True

    def _v(self, rng: torch.Generator) -> Tensor:
        if self.values == "special":
            info = torch.finfo(self.dtype)
            odd = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.max, info.min, info.tiny, -info.tiny]
            odd += [info.tiny * info.eps, 8.0, -8.0, 9.0, -9.0, 90.0, -90.0]
            return torch.tensor(odd, dtype=self.compute)[torch.randint(len(odd), self.shape, generator=rng)]
        if self.values == "edges":
            at = torch.tensor([math.log(11), -math.log(11), 0.0], dtype=self.dtype)
            v = at[torch.randint(len(at), self.shape, generator=rng)]
            for _ in range(3):
                v = torch.nextafter(v, v + torch.randint(-1, 2, self.shape, generator=rng).to(self.dtype))
            return v
        return torch.randn(self.shape, generator=rng, dtype=self.compute) * 2


def _cases() -> list[AdaRoundCase]:
    half, brain, double = torch.float16, torch.bfloat16, torch.float64
    cases = [
        AdaRoundCase("conv"),
        AdaRoundCase("no_beta", beta=None),
        AdaRoundCase("per_tensor", axis=None),
        AdaRoundCase("linear", shape=(10, 64)),
        AdaRoundCase("depthwise", shape=(33, 1, 3, 3)),
        AdaRoundCase("transposed", shape=(5, 6, 2, 2), axis=1),
        AdaRoundCase("axis_last", shape=(7, 5, 9), axis=-1),
        AdaRoundCase("unsigned", qmin=0, qmax=255),
        AdaRoundCase("one_code", qmin=3, qmax=3),
        AdaRoundCase("wide", qmin=-32766, qmax=32766),
        AdaRoundCase("zp_outside", zero_point="outside"),
        AdaRoundCase("scalar", shape=(), axis=None),
        AdaRoundCase("one_channel", shape=(1, 5, 3)),
        AdaRoundCase("tail", shape=(3, 1037)),
        AdaRoundCase("pieces", shape=(3, 9001)),
        AdaRoundCase("threads", shape=(70, 32, 7, 7)),
        AdaRoundCase("empty", shape=(0, 4, 3, 3)),
        AdaRoundCase("empty_inner", shape=(4, 0, 3)),
        AdaRoundCase("edges", values="edges", shape=(4, 301)),
        AdaRoundCase("nan_inf", values="special", shape=(4, 301)),
        AdaRoundCase("strided", layout="strided"),
        AdaRoundCase("expanded", layout="expanded", axis=1),
        AdaRoundCase("misaligned", layout="misaligned"),
        AdaRoundCase("channels_last", layout="channels_last"),
        AdaRoundCase("channels_last_axis_1", layout="channels_last", axis=1),
        AdaRoundCase("permuted", layout="permuted", axis=2, shape=(3, 4, 5, 6)),
        AdaRoundCase("beta_1", beta=1.0),
        AdaRoundCase("beta_2", beta=2.0, values="edges"),
        AdaRoundCase("beta_20", beta=20.0),
        AdaRoundCase("beta_huge", beta=1e30),
    ]
    for dtype, label in ((half, "fp16"), (brain, "bf16"), (double, "fp64")):
        cases += [
            AdaRoundCase(label, dtype=dtype),
            AdaRoundCase(f"{label}_tail", dtype=dtype, shape=(3, 5, 7, 7)),
            AdaRoundCase(f"{label}_nan_inf", dtype=dtype, values="special"),
            AdaRoundCase(f"{label}_channels_last", dtype=dtype, layout="channels_last", axis=1),
            AdaRoundCase(f"{label}_misaligned", dtype=dtype, layout="misaligned", beta=None),
        ]
    return cases


ADAROUND = tuple(_cases())

# The weights of a block, as a call for all has them: of all kinds, and one with nothing in it.
BLOCK = (
    AdaRoundCase("conv1", shape=(16, 8, 3, 3)),
    AdaRoundCase("conv2", shape=(16, 16, 3, 3), layout="channels_last", qmin=0, qmax=255),
    AdaRoundCase("nothing", shape=(0, 3)),
    AdaRoundCase("shortcut", shape=(16, 8, 1, 1), layout="misaligned"),
    AdaRoundCase("depthwise", shape=(40, 1, 3, 3)),
    AdaRoundCase("head", shape=(5, 9001)),
)


def _change(name: str, error: type[Exception], rule: str, **change: Any) -> ErrorCase:
    return ErrorCase(name, error, f"adaround: {rule}", change)


# The good call: v float32 [4, 3], base int16, scale and zero_point [4], codes -8 ... 7, axis 0, beta 2.0.
ADAROUND_ERRORS = (
    _change(
        "v_integer",
        TypeError,
        "v must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        v=torch.zeros(4, 3, dtype=torch.int32),
    ),
    _change("v_list", TypeError, "v must be a float32, float16, bfloat16 or float64 tensor, got list", v=[1.0]),
    _change("base_dtype", TypeError, "base must be torch.int16, got torch.float32", base=torch.zeros(4, 3)),
    _change("base_none", TypeError, "base must be a tensor, got NoneType", base=None),
    _change("base_shape", ValueError, "base must have v's shape (4, 3), got (4,)", base=torch.zeros(4).short()),
    _change("base_device", ValueError, "base must be on cpu, got meta", base=torch.zeros(4, 3, device="meta").short()),
    _change("scale_number", TypeError, "scale must be a tensor, got float", scale=0.1),
    _change(
        "scale_dtype",
        TypeError,
        "scale must be torch.float32 for torch.float32 v, got torch.float64",
        scale=torch.ones(4, dtype=torch.float64),
    ),
    _change(
        "scale_dtype_of_fp64",
        TypeError,
        "scale must be torch.float64 for torch.float64 v, got torch.float32",
        v=torch.zeros(4, 3, dtype=torch.float64),
    ),
    _change("scale_shape", ValueError, "scale must have shape (1,) or (4,), got (3,)", scale=torch.ones(3)),
    _change("no_axis", ValueError, "scale must have shape (1,), got (4,)", axis=None),
    _change("scale_device", ValueError, "scale must be on cpu, got meta", scale=torch.ones(4, device="meta")),
    _change(
        "zero_point_dtype",
        TypeError,
        "zero_point must be torch.int32 for torch.float32 v, got torch.float32",
        zero_point=torch.zeros(4),
    ),
    _change(
        "zero_point_shape",
        ValueError,
        "zero_point must have shape (1,) or (4,), got (2,)",
        zero_point=torch.ones(2).int(),
    ),
    _change("axis_range", ValueError, "axis must be in [-2, 1], got 2", axis=2),
    _change("axis_0d", ValueError, "axis must be None for 0-d v, got 0", v=torch.tensor(1.0)),
    _change("empty_range", ValueError, "qmin must be <= qmax, both within 32766 of 0, got 7 and -8", qmin=7, qmax=-8),
    _change(
        "wide_range", ValueError, "qmin must be <= qmax, both within 32766 of 0, got 0 and 32767", qmin=0, qmax=32767
    ),
    _change("beta_small", ValueError, "beta must be >= 1 and finite, got 0.5", beta=0.5),
    _change("beta_inf", ValueError, "beta must be >= 1 and finite, got inf", beta=math.inf),
    _change("beta_text", TypeError, "beta must be None, a number or a tensor, got '2'", beta="2"),
    _change(
        "beta_dtype",
        TypeError,
        "beta must be torch.float32 for torch.float32 v, got torch.float64",
        beta=torch.tensor(2.0, dtype=torch.float64),
    ),
    _change("beta_shape", ValueError, "beta must have shape (), got (1,)", beta=torch.tensor([2.0])),
    _change("beta_device", ValueError, "beta must be on cpu, got meta", beta=torch.ones((), device="meta")),
    _change("beta_hard", ValueError, "beta must be None for hard rounding, got 2.0", hard=True),
)

# What the benchmark times: all weights of a block in the first and in the last ResNet-18 stage, and of MobileNetV2.
ADAROUND_BENCH: dict[str, tuple[tuple[int, ...], ...]] = {
    "block_64": ((64, 64, 3, 3), (64, 64, 3, 3)),
    "block_512": ((512, 256, 3, 3), (512, 512, 3, 3), (512, 256, 1, 1)),
    "inverted_960": ((960, 160, 1, 1), (960, 1, 3, 3), (320, 960, 1, 1)),
}
