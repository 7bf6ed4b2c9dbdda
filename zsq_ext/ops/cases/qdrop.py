"""The inputs that every backend of qdrop meets."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.cases import LAYOUTS, ErrorCase


@dataclass(frozen=True)
class QDropCase:
    """One input of qdrop. `values` "special" has NaN, infinities and zeros of both signs, in x and in x_hat."""

    name: str
    shape: tuple[int, ...] = (4, 8, 6, 6)
    dtype: torch.dtype = torch.float32
    probability: float = 0.5
    key: tuple[int, int] = (42, 7)
    values: str = "normal"
    layout: str = "contiguous"
    x_hat_layout: str = "contiguous"

    def args(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, float, Tensor]:
        """(x, x_hat, probability, key), the same on every device."""
        rng = torch.Generator().manual_seed(seed)
        x, x_hat = (self._values(rng).to(device) for _ in range(2))
        key = torch.tensor(self.key, device=device)
        return LAYOUTS[self.layout](x), LAYOUTS[self.x_hat_layout](x_hat), self.probability, key

    def op_args(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, int, Tensor]:
        """The same as the op has it."""
        x, x_hat, probability, key = self.args(device, seed)
        return x, x_hat, round(probability * 2**24), key

    def _values(self, rng: torch.Generator) -> Tensor:
        if self.values == "special":
            odd = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0], dtype=self.dtype)
            return odd[torch.randint(len(odd), self.shape, generator=rng)]
        return torch.randn(self.shape, generator=rng, dtype=torch.float64).to(self.dtype)


def _cases() -> list[QDropCase]:
    cases = [
        QDropCase("plain"),
        QDropCase("mostly", probability=0.9),
        QDropCase("always", probability=1.0),
        QDropCase("never", probability=0.0),
        QDropCase("once_in_16_million", probability=2.0**-24),
        QDropCase("negative_key", key=(-1, -1)),
        QDropCase("wide_key", key=(0x123456789ABCDEF, 2**62 + 5)),
        QDropCase("scalar", shape=()),
        QDropCase("tail", shape=(1037,)),
        QDropCase("short", shape=(3,)),
        QDropCase("empty", shape=(0, 8, 6, 6)),
        QDropCase("threads", shape=(3, 64, 40, 40)),
        QDropCase("threads_channels_last", shape=(3, 64, 40, 40), layout="channels_last"),
        QDropCase("strided", layout="strided"),
        QDropCase("expanded", layout="expanded", x_hat_layout="expanded"),
        QDropCase("misaligned", layout="misaligned", x_hat_layout="misaligned"),
        QDropCase("channels_last", layout="channels_last", x_hat_layout="channels_last"),
        QDropCase("channels_last_of_one", layout="channels_last"),
        QDropCase("channels_last_of_the_other", x_hat_layout="channels_last"),
        QDropCase("channels_last_tail", layout="channels_last", shape=(2, 21, 6, 6)),
        QDropCase("channels_last_odd", layout="channels_last", shape=(2, 21, 5, 3)),
        QDropCase("channels_last_odd_wide", layout="channels_last", shape=(2, 16, 7, 7)),
        QDropCase("permuted", layout="permuted", shape=(3, 4, 5, 6)),
        QDropCase("nan_inf", values="special"),
    ]
    for dtype, label in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float64, "fp64")):
        cases += [
            QDropCase(label, dtype=dtype),
            QDropCase(f"{label}_tail", dtype=dtype, shape=(1037,)),
            QDropCase(f"{label}_nan_inf", dtype=dtype, values="special"),
            QDropCase(f"{label}_channels_last", dtype=dtype, layout="channels_last", shape=(2, 24, 6, 6)),
            QDropCase(f"{label}_channels_last_odd", dtype=dtype, layout="channels_last", shape=(2, 11, 5, 3)),
            QDropCase(f"{label}_misaligned", dtype=dtype, layout="misaligned"),
        ]
    return cases


QDROP = tuple(_cases())


def _change(name: str, error: type[Exception], rule: str, **change: Any) -> ErrorCase:
    return ErrorCase(name, error, f"qdrop: {rule}", change)


# The good call: x and x_hat float32 [2, 3], probability 0.5, key int64 [2].
QDROP_ERRORS = (
    _change(
        "x_integer",
        TypeError,
        "x must be a float32, float16, bfloat16 or float64 tensor, got torch.int64",
        x=torch.zeros(2, 3, dtype=torch.int64),
    ),
    _change("x_number", TypeError, "x must be a float32, float16, bfloat16 or float64 tensor, got float", x=1.0),
    _change("x_hat_number", TypeError, "x_hat must be a tensor, got int", x_hat=0),
    _change(
        "x_hat_dtype",
        TypeError,
        "x_hat must be torch.float32 as x is, got torch.float16",
        x_hat=torch.zeros(2, 3).half(),
    ),
    _change("x_hat_shape", ValueError, "x_hat must have x's shape (2, 3), got (3,)", x_hat=torch.zeros(3)),
    _change("x_hat_device", ValueError, "x_hat must be on cpu, got meta", x_hat=torch.zeros(2, 3, device="meta")),
    _change("key_number", TypeError, "key must be a tensor, got int", key=42),
    _change("key_dtype", TypeError, "key must be torch.int64, got torch.int32", key=torch.zeros(2).int()),
    _change("key_shape", ValueError, "key must have shape (2,), got (4,)", key=torch.zeros(4).long()),
    _change("key_device", ValueError, "key must be on cpu, got meta", key=torch.zeros(2, device="meta").long()),
    _change("probability_text", TypeError, "probability must be a number, got 'half'", probability="half"),
    _change("probability_above", ValueError, "probability must be in [0, 1], got 1.5", probability=1.5),
    _change("probability_nan", ValueError, "probability must be in [0, 1], got nan", probability=float("nan")),
)

# What the benchmark times: activations of the first ResNet-18 stage at the batch of a reconstruction.
QDROP_BENCH = (
    QDropCase("activation_16x64x56x56", shape=(16, 64, 56, 56)),
    QDropCase(
        "channels_last_16x64x56x56", shape=(16, 64, 56, 56), layout="channels_last", x_hat_layout="channels_last"
    ),
    QDropCase("bf16_16x64x56x56", shape=(16, 64, 56, 56), dtype=torch.bfloat16),
)
