"""What every op says to bad input: one line that begins with the op and the argument, before any kernel runs.

One table: a good call of each op, and the kind of each argument. Each kind has values that none may take.
"""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from zsq_ext import ops

X, PER_CHANNEL = torch.randn(2, 3, 4, 4), torch.rand(3)
STEP, ZERO = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)
WHOLE, BASE = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, 4, 4, dtype=torch.int16)
LOGITS, LABELS = torch.randn(4, 5), torch.arange(4)

FLOATS = [torch.zeros(2, 3, 4, 4, dtype=torch.int64), torch.zeros(2, 3, 4, 4, dtype=torch.bool)]
NO_TENSOR = ["text", 1.0, True, [1.0], np.ones(3, np.float32), torch.ones(2, 3, 4, 4).to_sparse()]
NO_NUMBER = ["2", True, [1], torch.tensor(1), 1j, np.ones(1), 10**400]
NO_INTEGER = [*NO_NUMBER, 1.5, math.nan, math.inf]

# What an argument of a kind may not be. "?" behind a kind is one that may be None.
BAD: dict[str, list[Any]] = {
    # the tensor that all others go with
    "x": [*NO_TENSOR, *FLOATS, torch.zeros(2, 3, 4, 4, dtype=torch.complex64)],
    # one of a dtype, shape and device that follow
    "tensor": [*NO_TENSOR, torch.zeros(7, 7, 7, dtype=torch.complex64)],
    "tensors": ["text", 1.0, X, None, [X, 1.0], [X, None], [X, X.double()], [X, X.to(torch.int64)]],
    "each": ["text", 1.0, X, None, [X], [X, 1.0], [X, None], [X, X.to(torch.complex64)]],
    "integer": NO_INTEGER,
    "count": [value for value in NO_INTEGER if not torch.is_tensor(value)],
    "integers": ["2", True, None, 1.5, [1], [1, None], (1, 1.5), ["1", "1"], torch.tensor([1, 1]), math.nan],
    "axis": [*NO_INTEGER, 4, -5],
    "axes": ["0", True, 1.5, [0], [0, "0"], [0, 4], [0, True], 4, torch.tensor([0, 0])],
    "number": [*NO_NUMBER, math.nan],
    "numbers": ["2", True, None, [1.0], [1.0, None], [1.0, "1"], [1.0, math.inf], torch.ones(2), math.nan],
    "size": [None, 4, "44", (4,), (4, 4, 4), (4, 1.5), (4, "4"), (4, None), (True, 4), (-1, 4), torch.tensor([4, 4])],
    "flag": [None, "no", 1, 0.0, [True], torch.tensor(True)],
    "name": [None, 3, "other", ["ste"], np.ones(2), ("ste", "lsq")],
    "dtype": [None, "float32", torch.int8, float, [torch.float32], np.float32],
    "quant": [3, [STEP, ZERO, 0, 15], (STEP, ZERO), (0.1, ZERO, 0, 15), (STEP, 0, 0, 15), (STEP, ZERO, "0", 15)],
}


@dataclass
class Op:
    """good: arguments that are taken. kinds: each argument's. bad: more that an argument may not be."""

    good: dict[str, Any]
    kinds: dict[str, str]
    bad: dict[str, list[Any]] = field(default_factory=dict)

    def faults(self):
        for name, kind in self.kinds.items():
            values = BAD[kind.rstrip("?")] + self.bad.get(name, [])
            if not kind.endswith("?") and not any(value is None for value in values):
                values = [None, *values]
            for value in values:
                if not (kind.endswith("?") and value is None):
                    yield name, value


GRID = {"scale": STEP, "zero_point": ZERO, "qmin": -8, "qmax": 7}
GRID_KINDS = {"scale": "tensor", "zero_point": "tensor", "qmin": "integer", "qmax": "integer", "axis": "axis?"}
WIDE = {"qmin": [2**25, 8], "qmax": [2**25, -9]}
ROUNDED = {"qmin": [2**15, 8], "qmax": [2**15, -9], "scale": [torch.ones(2, 2)]}
PIXELS = {"top": WHOLE, "left": WHOLE, "flip": WHOLE.bool(), "size": (2, 2)}
PIXEL_KINDS = {"x": "x", "top": "tensor", "left": "tensor", "flip": "tensor", "size": "size"}

OPS = {
    "fake_quant": Op(
        {"x": X, **GRID, "grad_scale": 1.0, "out": None, "check": True},
        {"x": "x", **GRID_KINDS, "grad": "name", "grad_scale": "number", "out": "tensor?", "check": "flag"},
        {**WIDE, "grad_scale": [math.inf, -math.inf], "scale": [-STEP, 0 * STEP, STEP / 0]},
    ),
    "fake_quant_many": Op(
        {"tensors": [X, X], "scales": [STEP, STEP], "zero_points": [ZERO, ZERO], "qmin": -8, "qmax": 7},
        {"tensors": "tensors", "scales": "each", "zero_points": "each", "qmin": "integers", "qmax": "integers"}
        | {"axis": "axes?", "grad": "name", "grad_scale": "numbers", "out": "each?"},
        {"qmin": [[0, 8], 8, [0, 2**25]], "qmax": [[0, -9], -9]},
    ),
    "fake_quant_minmax": Op(
        {"tensors": [X, X], "bits": 4},
        {"tensors": "tensors", "bits": "integers", "axis": "axes", "symmetric": "flag", "grad": "name"}
        | {"out": "each?", "return_grid": "flag"},
        {"bits": [1, 9, [4, 9], 0, -4], "tensors": [[X, X[:0]], [X, torch.tensor(1.0)]]},
    ),
    "quantize": Op({"x": X, **GRID}, {"x": "x", **GRID_KINDS}, WIDE),
    "dequantize": Op(
        {"code": BASE.to(torch.int8), "scale": STEP, "zero_point": ZERO},
        {"code": "tensor", "scale": "tensor", "zero_point": "tensor", "axis": "axis?", "dtype": "dtype"},
        {"code": [X, BASE, BASE.bool()]},
    ),
    "channel_range": Op({"x": X}, {"x": "x", "axis": "axis?"}, {"x": [X[:0]]}),
    "lp_error": Op(
        {"x": X, **GRID, "scale": STEP[None], "zero_point": ZERO[None]},
        {"x": "x", **GRID_KINDS, "p": "number"},
        {**WIDE, "p": [0, -1, 17, math.inf], "scale": [STEP]},
    ),
    "adaround": Op(
        {"v": X, "base": BASE, **GRID},
        {"v": "x", "base": "tensor", **GRID_KINDS, "beta": "number?", "hard": "flag"},
        {**ROUNDED, "beta": [0.5, math.inf, torch.ones(2), -1]},
    ),
    "adaround_many": Op(
        {"v": [X, X], "base": [BASE, BASE], "scale": [STEP, STEP], "zero_point": [ZERO, ZERO], "qmin": -8, "qmax": 7},
        {"v": "tensors", "base": "each", "scale": "each", "zero_point": "each", "qmin": "integers"}
        | {"qmax": "integers", "axis": "axis?", "beta": "number?", "hard": "flag"},
        {"v": [[]], "qmin": [[0, 8], 8, 2**15], "beta": [0.5], "qmax": [[7, 2**15]]},
    ),
    "adaround_start": Op({"w": X, **GRID}, {"w": "x", **GRID_KINDS}, {**ROUNDED, "scale": [-STEP, 0 * STEP, STEP / 0]}),
    "qdrop": Op(
        {"x": X, "x_hat": X, "probability": 0.5, "key": WHOLE},
        {"x": "x", "x_hat": "tensor", "probability": "number", "key": "tensor"},
        {"probability": [-0.1, 1.1, math.inf]},
    ),
    "bn_act": Op(
        {"u": X, "mean": PER_CHANNEL, "var": PER_CHANNEL, "gamma": None, "beta": None, "eps": 1e-5},
        {"u": "x", "mean": "tensor", "var": "tensor", "gamma": "tensor?", "beta": "tensor?", "eps": "number"}
        | {"residual": "tensor?", "act": "name", "quant": "quant?", "quant_grad": "name", "stats": "name?"}
        | {"extremes": "flag"},
        {"eps": [-1, math.inf], "u": [torch.ones(3)], "quant": [(STEP, ZERO, 8, 7), (STEP, ZERO, 0, True)]},
    ),
    "channel_sums": Op(
        {"u": X, "mean": PER_CHANNEL}, {"u": "x", "mean": "tensor", "stats": "name"}, {"u": [torch.ones(3)]}
    ),
    "statistics_of": Op(
        {"s1": PER_CHANNEL, "s2": PER_CHANNEL, "count": 32, "mean": PER_CHANNEL},
        {"s1": "x", "s2": "tensor", "count": "count", "mean": "tensor"},
        {"s1": [X], "count": [0, -1, torch.ones(2)], "s2": [torch.ones(2, 3)], "mean": [PER_CHANNEL.double()]},
    ),
    "channel_energy": Op(
        {
            "s1": PER_CHANNEL,
            "s2": PER_CHANNEL,
            "count": 32,
            "var": PER_CHANNEL,
            "gamma": None,
            "beta": None,
            "eps": 0.1,
        },
        {"s1": "x", "s2": "tensor", "count": "count", "var": "tensor", "gamma": "tensor?", "beta": "tensor?"}
        | {"eps": "number"},
        {"s1": [X], "count": [0, -1], "var": [torch.ones(2)], "gamma": [torch.ones(2)], "eps": [-1, math.inf]},
    ),
    "view_images": Op(
        {"x": X, **PIXELS, "low": PER_CHANNEL, "high": PER_CHANNEL},
        {**PIXEL_KINDS, "sigma": "number?", "low": "tensor", "high": "tensor"},
        {"size": [(5, 4)], "sigma": [-1, math.inf], "x": [X[0]], "top": [WHOLE[:1], WHOLE.float()]},
    ),
    "resize_crops": Op(
        {"x": X, **PIXELS, "height": WHOLE, "width": WHOLE},
        {**PIXEL_KINDS, "height": "tensor", "width": "tensor"},
        {"x": [X[0], X[:, :, :0]], "width": [WHOLE[:1], WHOLE.float()]},
    ),
    "distill_head": Op(
        {"student": LOGITS, "teacher": LOGITS, "labels": LABELS, "check": True},
        {"student": "x", "teacher": "tensor", "labels": "tensor?", "kd": "name", "alpha": "number"}
        | {"temperature": "number", "ce": "number", "tau": "number?", "strict": "flag", "easy": "tensor?"}
        | {"check": "flag"},
        {"temperature": [0, -1, math.inf], "alpha": [math.inf], "ce": [-math.inf], "tau": [-0.1, 1.1]}
        | {"student": [LOGITS[0], LOGITS[:, :1]], "labels": [LABELS + 2, LABELS.int()]},
    ),
    "cam_map": Op(
        {"activation": X, "alpha": torch.rand(2, 3)},
        {"activation": "x", "alpha": "tensor", "floor": "number?"},
        {"floor": [math.inf], "activation": [X[0]]},
    ),
    "count_active": Op({"x": X}, {"x": "x", "upper": "number?"}, {"upper": [0, -1, math.inf], "x": [X[0]]}),
}


def test_every_op_and_every_argument_is_in_the_table():
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert set(OPS) == public
    for name, op in OPS.items():
        assert set(op.kinds) == set(inspect.signature(getattr(ops, name)).parameters), name


@pytest.mark.parametrize("name", OPS)
def test_the_good_call_is_taken(name):
    getattr(ops, name)(**OPS[name].good)


def label(value):
    """What a fault is, without the values of tensors: two processes must give a test the same name."""
    if isinstance(value, list):
        return f"[{', '.join(map(label, value))}]"[:80]
    return str(value.dtype) + str(tuple(value.shape)) if torch.is_tensor(value) else repr(value)[:40]


FAULTS = [
    pytest.param(op, name, value, id=f"{op}-{name}-{label(value)}") for op in OPS for name, value in OPS[op].faults()
]


@pytest.mark.parametrize(("op", "name", "value"), FAULTS)
def test_a_fault_is_said_by_op_and_argument(op, name, value):
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(ops, op)(**{**OPS[op].good, name: value})
    # a range that is empty is its lower end's fault, and None for one of two bounds is the pair's
    names = {"qmax": ("qmax", "qmin"), "low": ("low", "high"), "high": ("high", "low")}.get(name, (name,))
    message = str(raised.value)
    assert message.startswith(tuple(f"{op}: {called}" for called in names)), message
    assert " must " in message
    assert ", got " in message
    assert "\n" not in message


EXACT = (
    ("fake_quant", {"grad_scale": "1"}, "grad_scale must be a number, got '1'"),
    ("fake_quant", {"qmin": True}, "qmin must be an integer, got True"),
    ("fake_quant", {"check": "no"}, "check must be True or False, got 'no'"),
    ("fake_quant", {"grad": None}, "grad must be one of ste_clip, ste, lsq, lsq_plus, got None"),
    ("fake_quant_many", {"qmin": [-8, "a"]}, "qmin[1] must be an integer, got 'a'"),
    ("fake_quant_many", {"axis": [0, 1.0]}, "axis[1] must be an integer, got 1.0"),
    ("fake_quant_many", {"grad_scale": [1.0, None]}, "grad_scale[1] must be a number, got None"),
    ("bn_act", {"eps": "1e-5"}, "eps must be a number, got '1e-5'"),
    ("bn_act", {"quant": (0.1, ZERO, 0, 15)}, "quant's scale must be a tensor, got float"),
    ("bn_act", {"quant": (STEP, ZERO, 0, 1.5)}, "quant's qmax must be an integer, got 1.5"),
    ("fake_quant", {"x": X.to_sparse()}, "x must be dense, got torch.sparse_coo"),
    ("fake_quant", {"qmin": np.int64(1)}, "qmin must be an integer, got np.int64(1)"),
    ("fake_quant", {"grad_scale": 10**400}, "grad_scale must fit into 64 bits, got an integer of 1329"),
    ("resize_crops", {"size": (2, 2**70)}, "size[1] must fit into 64 bits, got an integer of 71"),
    ("lp_error", {"p": torch.tensor(2.0)}, "p must be a number, got Tensor"),
    ("cam_map", {"floor": "0"}, "floor must be None or a number, got '0'"),
    ("view_images", {"size": 2}, "size must be two integers, got 2"),
    ("view_images", {"size": (2, 2, 2)}, "size must be two integers, got (2, 2, 2)"),
    ("resize_crops", {"size": (2, 1.5)}, "size[1] must be an integer, got 1.5"),
    ("statistics_of", {"count": 2.5}, "count must be an integer or a tensor, got 2.5"),
    ("statistics_of", {"s1": None}, "s1 must be a float32, float16, bfloat16 or float64 tensor, got NoneType"),
    ("statistics_of", {"mean": torch.ones(2)}, "mean must have shape (3,), got (2,)"),
    ("channel_energy", {"eps": -1.0}, "eps must be >= 0 and finite, got -1.0"),
    ("adaround_start", {"qmin": 8}, "qmin must be <= qmax, both within 32766 of 0, got 8 and 7"),
    ("adaround_many", {"base": [BASE]}, "base must have 2 tensors, got 1"),
    ("distill_head", {"temperature": "20"}, "temperature must be a number, got '20'"),
)


@pytest.mark.parametrize(("op", "change", "rule"), EXACT)
def test_exact_messages(op, change, rule):
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(ops, op)(**{**OPS[op].good, **change})
    assert str(raised.value) == f"{op}: {rule}"
