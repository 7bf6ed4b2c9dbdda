"""The inputs that every backend of fake_quant_many meets: lists of what fake_quant meets."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.cases import ErrorCase
from zsq_ext.ops.cases import fake_quant as one
from zsq_ext.ops.cases.fake_quant import FakeQuantCase
from zsq_ext.ops.cases.fake_quant_minmax import RESNET18


@dataclass(frozen=True)
class ManyCase:
    """Tensors of one dtype, each with a grid of its own."""

    name: str
    each: tuple[FakeQuantCase, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.each[0].dtype

    def args(self, device: str = "cpu", seed: int = 0, learned: bool = False) -> tuple[list[Any], ...]:
        """(tensors, scales, zero_points, qmin, qmax, axes), the same on every device; an axis of -1 is none.

        learned: with zero-points as LSQ+ learns them.
        """
        made = [(case.learned if learned else case.args)(device, seed + 10 * k) for k, case in enumerate(self.each)]
        *lists, axes = ([args[i] for args in made] for i in range(6))
        return *lists, [-1 if axis is None else axis for axis in axes]

    def grads(self, device: str = "cpu", seed: int = 1) -> list[Tensor]:
        return [case.grad(device, seed + k) for k, case in enumerate(self.each)]


def _cases() -> list[ManyCase]:
    by_name = {case.name: case for case in one.FAKE_QUANT}

    def many(name: str, *names: str) -> ManyCase:
        return ManyCase(name, tuple(by_name[n] for n in names))

    small = tuple(FakeQuantCase("small", shape=(1 + k % 3, 1 + k % 4), axis=k % 2, qmin=-(k % 4)) for k in range(45))
    weights = tuple(
        FakeQuantCase("weight", shape=shape, axis=0, qmin=-8 - k, zero_point="inside")
        for k, shape in enumerate([(6, 3, 3, 3), (7, 6, 1, 1), (5, 7, 3, 3), (5, 63), (4, 1100)])
    )
    return [
        ManyCase("weights", weights),
        ManyCase("one", weights[:1]),
        ManyCase("more_than_a_table", small),
        many("ranges", "unsigned", "wide", "two_bits", "one_code", "zp_outside", "zp_outside_channel"),
        many("shapes", "scalar", "per_tensor", "tail", "one_channel", "tail_channel", "short_rows", "axis_last"),
        many("empty", "empty", "per_channel", "empty_inner", "no_channels", "groups_empty"),
        many("nothing_but_empty", "empty", "no_channels"),
        many("layouts", "strided", "expanded", "misaligned", "channels_last", "channels_last_axis_0", "permuted"),
        many("columns", "channels_last_axis_1", "per_channel", "channels_last_odd", "axis_1", "axis_last"),
        many("grouped", "groups", "groups_odd", "per_channel", "groups_channels_last", "groups_strided"),
        many("rounding", "ties", "ties_channel", "boundary", "boundary_channel", "edges"),
        many("nan_inf", "nan_inf", "per_channel", "nan_inf_channel", "wide_channel"),
        ManyCase(
            "parts", (FakeQuantCase("rows", shape=(2, 8200), axis=0), FakeQuantCase("columns", shape=(300, 20), axis=1))
        ),
        many("slabs", "threads", "per_channel", "parts", "parts_channels_last", "groups_threads"),
        *(
            many(label, *(f"{label}{kind}" for kind in ("", "_channel", "_nan_inf", "_channels_last", "_misaligned")))
            for label in ("fp16", "bf16")
        ),
        many("fp64", "fp64", "fp64_channel", "fp64_nan_inf"),
    ]


FAKE_QUANT_MANY = tuple(_cases())


def _codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def _two(**kinds: Any) -> list[Tensor]:
    return [torch.zeros(2, 3), torch.zeros(4, 5, **kinds)]


# The good call: tensors float32 [2, 3] and [4, 5], scales [2] and [1], codes -8 ... 7, axis 0.
FAKE_QUANT_MANY_ERRORS = (
    ErrorCase(
        "tensors_one",
        TypeError,
        "fake_quant_many: tensors must be a list or tuple of tensors, got Tensor",
        {"tensors": torch.zeros(2, 3)},
    ),
    ErrorCase(
        "tensors_integer",
        TypeError,
        "fake_quant_many: tensors[1] must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        {"tensors": _two(dtype=torch.int32)},
    ),
    ErrorCase(
        "tensors_dtypes",
        TypeError,
        "fake_quant_many: tensors[1] must be torch.float32 as tensors[0] is, got torch.float16",
        {"tensors": _two(dtype=torch.float16)},
    ),
    ErrorCase(
        "tensors_devices",
        ValueError,
        "fake_quant_many: tensors[1] must be on cpu, got meta",
        {"tensors": _two(device="meta")},
    ),
    ErrorCase(
        "scales_one",
        TypeError,
        "fake_quant_many: scales must be a list or tuple of tensors, got Tensor",
        {"scales": torch.ones(2)},
    ),
    ErrorCase(
        "scales_count", ValueError, "fake_quant_many: scales must have 2 tensors, got 1", {"scales": [torch.ones(2)]}
    ),
    ErrorCase(
        "scales_number",
        TypeError,
        "fake_quant_many: scales[1] must be a tensor, got float",
        {"scales": [torch.ones(2), 0.5]},
    ),
    ErrorCase(
        "scales_shape",
        ValueError,
        "fake_quant_many: scales[1] must have shape (1,), (4,) or (4, G), got (3,)",
        {"scales": [torch.ones(2), torch.ones(3)]},
    ),
    ErrorCase(
        "scales_dtype",
        TypeError,
        "fake_quant_many: scales[0] must be torch.float32 for torch.float32 tensors[0], got torch.float64",
        {"scales": [torch.ones(2).double(), torch.ones(1)]},
    ),
    ErrorCase(
        "groups_uneven",
        ValueError,
        "fake_quant_many: scales[1] must have groups that divide the 5 elements of a channel, got 2",
        {"scales": [torch.ones(2), torch.ones(4, 2)]},
    ),
    ErrorCase(
        "groups_differ",
        ValueError,
        "fake_quant_many: zero_points[1] must have shape (1,) or scales[1]'s shape (4, 5), got (4,)",
        {"scales": [torch.ones(2), torch.ones(4, 5)], "zero_points": [_codes(2), _codes(4)]},
    ),
    ErrorCase(
        "zero_points_count",
        ValueError,
        "fake_quant_many: zero_points must have 2 tensors, got 3",
        {"zero_points": [_codes(1)] * 3},
    ),
    ErrorCase(
        "zero_points_learned",
        TypeError,
        "fake_quant_many: zero_points[0] must be torch.float32 for torch.float32 tensors[0] under lsq_plus, "
        "got torch.int32",
        {"grad": "lsq_plus"},
    ),
    ErrorCase("axis_range", ValueError, "fake_quant_many: axis[1] must be in [-2, 1], got 2", {"axis": (0, 2)}),
    ErrorCase(
        "axis_count",
        ValueError,
        "fake_quant_many: axis must be one or one per tensor, got 1 for 2 tensors",
        {"axis": [0]},
    ),
    ErrorCase(
        "qmax_count",
        ValueError,
        "fake_quant_many: qmax must be one or one per tensor, got 3 for 2 tensors",
        {"qmax": (7, 7, 7)},
    ),
    ErrorCase(
        "axis_of_one",
        ValueError,
        "fake_quant_many: axis must be in [-1, 0] for tensors[1], got 1",
        {"tensors": [torch.zeros(2, 3), torch.zeros(4)], "axis": 1, "scales": [torch.ones(3), torch.ones(1)]},
    ),
    ErrorCase("qmax_float", TypeError, "fake_quant_many: qmax[1] must be an integer, got 7.0", {"qmax": [7, 7.0]}),
    ErrorCase(
        "empty_range",
        ValueError,
        "fake_quant_many: qmin[1] must be <= qmax, both within 2**24 of 0, got 8 and 7",
        {"qmin": (0, 8)},
    ),
    ErrorCase(
        "grad_name",
        ValueError,
        "fake_quant_many: grad must be one of lsq, lsq_plus, ste_clip, ste, got 'tanh'",
        {"grad": "tanh"},
    ),
    ErrorCase(
        "grad_scale",
        ValueError,
        "fake_quant_many: grad_scale[1] must be finite, got inf",
        {"grad_scale": (1.0, float("inf"))},
    ),
    ErrorCase(
        "grad_scale_count",
        ValueError,
        "fake_quant_many: grad_scale must be one or one per tensor, got 1 for 2 tensors",
        {"grad_scale": [1.0]},
    ),
    ErrorCase("out_count", ValueError, "fake_quant_many: out must have 2 tensors, got 1", {"out": [torch.zeros(2, 3)]}),
    ErrorCase(
        "out_shape",
        ValueError,
        "fake_quant_many: out[1] must have shape (4, 5) as tensors[1] has, got (5, 4)",
        {"out": [torch.zeros(2, 3), torch.zeros(5, 4)]},
    ),
    ErrorCase(
        "out_with_gradient",
        ValueError,
        "fake_quant_many: out must be None where a gradient is taken, got tensors",
        {"scales": [torch.ones(2, requires_grad=True), torch.ones(1)], "out": _two()},
    ),
)

_STAGES = {16: 32, 32: 64}
_RESNET20 = (
    (16, 3, 3, 3),
    *[(16, 16, 3, 3)] * 6,
    *[shape for i, o in _STAGES.items() for shape in ((o, i, 3, 3), *[(o, o, 3, 3)] * 5, (o, i, 1, 1))],
    (10, 64),
)


def _network(name: str, shapes: tuple[tuple[int, ...], ...]) -> ManyCase:
    return ManyCase(name, tuple(FakeQuantCase("weight", shape=shape, axis=0) for shape in shapes))


# All weights of a network.
FAKE_QUANT_MANY_BENCH = (_network("weights_resnet18", RESNET18), _network("weights_resnet20", _RESNET20))
