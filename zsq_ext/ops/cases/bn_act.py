"""The inputs that every backend of bn_act and channel_sums meets."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.bn_act_spec import Grads, Layer, Needs, Norm, Outputs, Quant
from zsq_ext.ops.cases import LAYOUTS


@dataclass(frozen=True)
class BnActCase:
    """One input of bn_act.

    `values` is what u holds: "normal" spreads what enters the activation over both ends of relu6; "edges" makes it
    exactly 0, 3, -3 and 6 and their neighbours, "ties" multiples of half the quantizer's step and their neighbours;
    "special" has NaN, infinities, zeros and the extremes of the dtype; "offset" lies far from 0, so that sums which are
    not shifted lose everything. `quant` is one grid for the "tensor" or for each "channel", which clips at both ends.
    """

    name: str
    shape: tuple[int, ...] = (4, 8, 6, 6)
    dtype: torch.dtype = torch.float32
    act: str = "relu"
    stats: str | None = "batch"
    residual: bool = False
    affine: bool = True
    values: str = "normal"
    layout: str = "contiguous"
    residual_layout: str = "contiguous"
    quant: str | None = None
    quant_grad: str = "ste_clip"
    extremes: bool = False

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def count(self) -> int:
        """How many values a sum adds up."""
        n = 1 if self.stats == "sample" else self.shape[0]
        return n * torch.Size(self.shape[2:]).numel()

    def args(self, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments of bn_act by name, the same on every device."""
        rng = torch.Generator().manual_seed(seed)
        channels, compute = self.shape[1], self.compute

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(channels, generator=rng, dtype=compute) * (high - low) + low

        mean, var, gamma, beta = uniform(-1, 1), uniform(0.2, 2), uniform(0.5, 2), uniform(0, 3)
        gamma[::3] *= -1
        eps = 1e-5
        if self.values == "offset":
            mean = mean + 1000
        if self.values in ("edges", "ties"):  # a = 1, b = 0: u itself, and u plus the residual, enter the activation
            mean, var, gamma, beta, eps = mean * 0, var * 0 + 1, gamma * 0 + 1, beta * 0, 0.0
        u, r = self._u(mean, var, rng).to(self.dtype), None
        if self.residual:
            r = self._u(mean * 0, var, rng).to(self.dtype)
            r = LAYOUTS[self.residual_layout](r.to(device))
        return {
            "u": LAYOUTS[self.layout](u.to(device)),
            "mean": mean.to(device),
            "var": var.to(device),
            "gamma": gamma.to(device) if self.affine else None,
            "beta": beta.to(device) if self.affine else None,
            "eps": eps,
            "residual": r,
            "act": self.act,
            "quant": self._grid(rng, device),
            "quant_grad": self.quant_grad,
            "stats": self.stats,
            "extremes": self.extremes,
        }

    def _grid(self, rng: torch.Generator, device: str) -> tuple[Tensor, Tensor, int, int] | None:
        if self.quant is None:
            return None
        grids = self.shape[1] if self.quant == "channel" else 1
        scale = torch.rand(grids, generator=rng, dtype=self.compute) * 0.4 + 0.1
        zero_point = torch.randint(-3, 4, (grids,), generator=rng, dtype=torch.int32)
        return (scale * 0 + 0.5 if self.values == "ties" else scale).to(device), zero_point.to(device), -4, 5

    @property
    def saves_mask(self) -> bool:
        """Whether a training forward leaves bits behind."""
        clips = self.act == "none" and self.quant is not None and self.quant_grad == "ste_clip"
        return self.residual and (clips or self.act in ("relu", "relu6"))

    def told(self, device: str = "cpu", mask: bool = False) -> tuple[Tensor, Tensor | None, Layer, Outputs]:
        """What a backend's bn_act is given."""
        args = self.args(device)
        norm = Norm(*(args[k] for k in ("mean", "var", "gamma", "beta", "eps")))
        quant = None
        if args["quant"] is not None:
            scale, zero_point, qmin, qmax = args["quant"]
            quant = Quant(scale, zero_point, qmin, qmax, self.quant_grad == "ste_clip")
        return args["u"], args["residual"], Layer(norm, self.act, quant), Outputs(self.stats, mask, self.extremes)

    def told_backward(self, mask: Tensor | None, device: str = "cpu") -> tuple[Any, ...]:
        """What a backend's bn_act_backward is given after a forward that left this mask, all gradients wanted."""
        u, residual, layer, _ = self.told(device)
        mask, residual = (mask, None) if self.saves_mask else (None, residual)
        return u, residual, mask, Grads(*self.grads(device)), layer, Needs(True, self.residual, True)

    def grads(self, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Upstream gradients of y, S1 and S2, contiguous; those of the sums are small, as a mean's are."""
        rng = torch.Generator().manual_seed(seed)
        grad = torch.randn(self.shape, generator=rng, dtype=torch.float64).to(self.dtype).to(device)
        if self.stats is None:
            return grad, None, None
        shape = self.shape[:2] if self.stats == "sample" else self.shape[1:2]
        s1, s2 = (torch.randn(shape, generator=rng, dtype=torch.float64) * 0.1 for _ in range(2))
        return grad, s1.to(self.compute).to(device), s2.to(self.compute).to(device)

    def _u(self, mean: Tensor, var: Tensor, rng: torch.Generator) -> Tensor:
        channel = [1, -1, *[1] * (len(self.shape) - 2)]
        if self.values == "special":
            info = torch.finfo(self.dtype)
            odd = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.max, info.min, info.tiny, -info.tiny]
            odd += [info.tiny * info.eps, 1.0, -1.0, 88.5, -88.5, 89.0, -89.0, 104.0, -104.0]
            return torch.tensor(odd, dtype=mean.dtype)[torch.randint(len(odd), self.shape, generator=rng)]
        if self.values in ("edges", "ties"):
            exact = [0.0, -0.0, 3.0, -3.0, 6.0] if self.values == "edges" else [k / 4 for k in range(-12, 13)]
            at = torch.tensor(exact, dtype=self.dtype)
            x = at[torch.randint(len(at), self.shape, generator=rng)]
            return torch.nextafter(x, x + torch.randint(-1, 2, self.shape, generator=rng).to(self.dtype))
        spread = torch.randn(self.shape, generator=rng, dtype=mean.dtype) * 2
        return mean.view(channel) + spread * var.sqrt().view(channel)


def _cases() -> list[BnActCase]:
    half, brain = torch.float16, torch.bfloat16
    cases = []
    for act in ("none", "relu", "relu6", "silu", "hardswish"):
        cases += [
            BnActCase(act, act=act),
            BnActCase(f"{act}_residual", act=act, residual=True),
            BnActCase(f"{act}_edges", act=act, values="edges"),
            BnActCase(f"{act}_nan_inf", act=act, values="special"),
            BnActCase(f"{act}_channels_last", act=act, residual=True, layout="channels_last", shape=(2, 24, 5, 3)),
        ]
    cases += [
        BnActCase("no_stats", stats=None),
        BnActCase("no_stats_residual", stats=None, residual=True, act="relu6"),
        BnActCase("no_affine", affine=False, act="none"),
        BnActCase("sample", stats="sample"),
        BnActCase("sample_residual", stats="sample", residual=True, shape=(3, 5, 7, 7)),
        BnActCase("sample_channels_last", stats="sample", layout="channels_last", shape=(3, 12, 5, 7)),
        BnActCase("residual_edges", residual=True, values="edges"),
        BnActCase("residual_nan_inf", residual=True, values="special", act="relu6"),
        BnActCase("two_dims", shape=(37, 19), residual=True),
        BnActCase("two_dims_sample", shape=(5, 24), stats="sample", residual=True),
        BnActCase("one_place", shape=(6, 10, 1, 1)),
        BnActCase("three_dims", shape=(3, 6, 21)),
        BnActCase("five_dims", shape=(2, 5, 2, 3, 4), residual=True),
        BnActCase("one_channel", shape=(3, 1, 5, 5), residual=True),
        BnActCase("one_channel_last", shape=(3, 1, 5, 5), layout="channels_last"),
        BnActCase("tail", shape=(3, 5, 7, 7), residual=True),
        BnActCase("tail_channels_last", shape=(3, 13, 5, 3), layout="channels_last", residual=True),
        BnActCase("pieces", shape=(2, 3, 69, 73), residual=True),
        BnActCase("pieces_sample", shape=(2, 3, 69, 73), stats="sample"),
        BnActCase("pieces_channels_last", shape=(2, 17, 69, 13), layout="channels_last", residual=True),
        BnActCase("pieces_channels_last_sample", shape=(2, 17, 69, 13), layout="channels_last", stats="sample"),
        BnActCase("empty", shape=(0, 8, 6, 6), residual=True),
        BnActCase("empty_inner", shape=(4, 8, 0), residual=True),
        BnActCase("empty_inner_sample", shape=(4, 8, 0), stats="sample"),
        BnActCase("no_channels", shape=(4, 0, 6), residual=True),
        BnActCase("threads", shape=(3, 40, 41, 41), residual=True),
        BnActCase("threads_channels_last", shape=(3, 40, 41, 41), layout="channels_last"),
        BnActCase("blocks_channels_last", shape=(2, 93, 7, 5), layout="channels_last", residual=True, quant="channel"),
        BnActCase("offset", values="offset"),
        BnActCase("offset_sample", values="offset", stats="sample", layout="channels_last"),
        BnActCase("strided", layout="strided", residual=True, residual_layout="strided"),
        BnActCase("expanded", layout="expanded", residual=True, residual_layout="expanded"),
        BnActCase("misaligned", layout="misaligned", residual=True, residual_layout="misaligned"),
        BnActCase("permuted", layout="permuted", shape=(3, 4, 5, 6), residual=True, residual_layout="channels_last"),
        BnActCase("mixed_layouts", layout="channels_last", residual=True, residual_layout="contiguous"),
    ]
    for dtype, label in ((half, "fp16"), (brain, "bf16")):
        cases += [
            BnActCase(label, dtype=dtype),
            BnActCase(f"{label}_residual", dtype=dtype, residual=True, act="relu6"),
            BnActCase(f"{label}_tail", dtype=dtype, shape=(3, 5, 7, 7), act="hardswish", residual=True),
            BnActCase(f"{label}_edges", dtype=dtype, values="edges", act="relu6"),
            BnActCase(f"{label}_nan_inf", dtype=dtype, values="special"),
            BnActCase(f"{label}_silu", dtype=dtype, act="silu"),
            BnActCase(
                f"{label}_channels_last", dtype=dtype, layout="channels_last", shape=(2, 24, 5, 3), residual=True
            ),
            BnActCase(f"{label}_misaligned", dtype=dtype, layout="misaligned", stats="sample"),
        ]
    cases += [
        BnActCase("fp64", dtype=torch.float64, residual=True),
        BnActCase("fp64_silu", dtype=torch.float64, act="silu"),
        BnActCase("fp64_channels_last", dtype=torch.float64, layout="channels_last", act="hardswish", residual=True),
        BnActCase("fp64_sample", dtype=torch.float64, stats="sample", act="relu6"),
        BnActCase("fp64_nan_inf", dtype=torch.float64, values="special", residual=True),
    ]
    return cases


def _quantized() -> list[BnActCase]:
    cases = []
    for act in ("none", "relu", "relu6", "silu", "hardswish"):
        cases += [
            BnActCase(f"quant_{act}", act=act, quant="tensor"),
            BnActCase(f"quant_{act}_residual", act=act, residual=True, quant="channel", stats="sample"),
            BnActCase(f"quant_{act}_residual_ste", act=act, residual=True, quant="tensor", quant_grad="ste"),
        ]
    last = partial(BnActCase, layout="channels_last", residual_layout="channels_last", shape=(2, 21, 5, 3))
    cases += [
        BnActCase("quant_ties", act="none", values="ties", quant="tensor"),
        BnActCase("quant_ties_residual", values="ties", residual=True, quant="channel"),
        BnActCase("quant_nan_inf", values="special", quant="tensor"),
        BnActCase("quant_nan_inf_residual", act="none", values="special", residual=True, quant="channel"),
        BnActCase("quant_ste", stats=None, quant="channel", quant_grad="ste"),
        last("quant_channels_last", quant="channel", residual=True),
        last("quant_channels_last_tensor", act="relu6", quant="tensor"),
        BnActCase("quant_one_place", shape=(6, 11), act="none", quant="channel", residual=True),
        BnActCase("quant_tail", shape=(3, 5, 7, 7), quant="channel", residual=True),
        BnActCase("quant_strided", layout="strided", residual=True, residual_layout="expanded", quant="tensor"),
        BnActCase("quant_empty", shape=(0, 8, 6, 6), residual=True, quant="channel"),
        BnActCase("quant_threads", shape=(3, 40, 41, 41), residual=True, quant="channel"),
        BnActCase("quant_fp64", dtype=torch.float64, residual=True, quant="channel"),
        BnActCase("quant_fp64_none", dtype=torch.float64, act="none", quant="tensor"),
    ]
    for dtype, label in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        cases += [
            BnActCase(f"quant_{label}", dtype=dtype, quant="tensor"),
            BnActCase(f"quant_{label}_ties", dtype=dtype, act="none", values="ties", quant="tensor", residual=True),
            last(f"quant_{label}_channels_last", dtype=dtype, act="relu6", quant="channel", residual=True),
        ]
    return cases


BN_ACT = (*_cases(), *_quantized())

# Results of 4 MiB and more, which the CPU writes past its caches where whole lines follow one another.
BN_ACT_LARGE = (
    BnActCase("large", shape=(4, 16, 132, 128), residual=True),
    BnActCase("large_channels_last", shape=(4, 80, 59, 57), residual=True, layout="channels_last"),
    BnActCase("large_no_lines", shape=(4, 20, 117, 113), residual=True, layout="channels_last"),
    BnActCase("large_fp16", shape=(4, 16, 192, 176), dtype=torch.float16, act="hardswish"),
)

# What the benchmark times: a block's end in the first ResNet-18 stage at batch 16, and a deep, narrow one.
BN_ACT_BENCH = (
    BnActCase("activation_16x64x56x56", shape=(16, 64, 56, 56)),
    BnActCase("residual_16x64x56x56", shape=(16, 64, 56, 56), residual=True),
    BnActCase(
        "channels_last_16x64x56x56",
        shape=(16, 64, 56, 56),
        residual=True,
        layout="channels_last",
        residual_layout="channels_last",
    ),
    BnActCase("bf16_16x64x56x56", shape=(16, 64, 56, 56), dtype=torch.bfloat16, residual=True),
    BnActCase("relu6_16x960x7x7", shape=(16, 960, 7, 7), act="relu6"),
    BnActCase("no_stats_16x64x56x56", shape=(16, 64, 56, 56), stats=None),
    BnActCase("quant_16x64x56x56", shape=(16, 64, 56, 56), residual=True, stats=None, quant="tensor"),
    BnActCase("extremes_16x64x56x56", shape=(16, 64, 56, 56), stats=None, extremes=True),
    BnActCase(
        "extremes_channels_last_16x64x56x56", shape=(16, 64, 56, 56), stats=None, extremes=True, layout="channels_last"
    ),
)
