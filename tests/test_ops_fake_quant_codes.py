"""quantize and dequantize: fake_quant in two halves.

Broken on purpose, each seen red:

    NaN reaches the conversion, scalar or AVX2     wide_channel
    NaN reaches the conversion, Triton             smallest_type
    the zero-point not clamped for NaN             smallest_type, 0 to 127
    uint8 packed as signed                         unsigned
    int8 read as unsigned                          per_tensor
    channels stand still along a row of channels   axis_last
    rounded half up                                ties
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_exports, assert_raises, assert_same, every, path, skip_refused

from zsq_ext.ops import backend, cpu, dequantize, fake_quant, quantize, reference
from zsq_ext.ops.cases import ErrorCase
from zsq_ext.ops.cases import fake_quant as cases
from zsq_ext.ops.layout import empty_for

ALL = every(cases.FAKE_QUANT)
CASE = {case.name: case for case in cases.FAKE_QUANT}

pytestmark = pytest.mark.usefixtures("poison")


# meaning


@ALL
def test_codes_are_what_fake_quant_rounds_to(case):
    x, scale, zero_point, qmin, qmax, axis = case.args()
    code = quantize(x, scale, zero_point, qmin, qmax, axis)
    assert code.dtype == (torch.int8 if qmax <= 127 and qmin >= -128 else torch.uint8 if qmin >= 0 else torch.int32)
    assert code.shape == x.shape
    values = dequantize(code, scale, zero_point, axis, x.dtype)
    expected = fake_quant(x, scale, zero_point, qmin, qmax, axis)
    assert values.dtype == expected.dtype
    number = ~x.isnan()
    assert torch.equal(values[number], expected[number])
    assert torch.equal(values[number].signbit(), expected[number].signbit())
    zero = quantize(torch.zeros_like(x), scale, zero_point, qmin, qmax, axis)
    assert torch.equal(code[~number], zero[~number])


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype"),
    [
        (-128, 127, torch.int8),
        (0, 127, torch.int8),
        (0, 128, torch.uint8),
        (0, 255, torch.uint8),
        (-1, 128, torch.int32),
        (-129, 0, torch.int32),
        (0, 256, torch.int32),
        (-(2**24), 2**24, torch.int32),
    ],
)
def test_the_smallest_type_that_holds_the_range(qmin, qmax, dtype, fast):
    name, device = fast
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, 1.0] * 5, device=device)
    one, zero_point = torch.ones(1, device=device), torch.tensor([-3], dtype=torch.int32, device=device)
    with backend.backend(name):
        code = quantize(x, one, zero_point, qmin, qmax)
    assert code.dtype == dtype
    zero, two = max(qmin, -3), max(qmin, -2)
    assert code.tolist() == [qmin, qmax, zero, two] * 5


def test_neither_has_a_gradient():
    x, scale, zero_point, *range_ = CASE["axis_1"].args()
    code = quantize(x.requires_grad_(), scale.requires_grad_(), zero_point, *range_)
    assert not dequantize(code, scale, zero_point, range_[2]).requires_grad


# parity


@ALL
def test_quantize_has_the_reference_codes(case, fast):
    name, device = fast
    skip_refused(fast, "quantize", case.dtype)
    args = case.args(device)
    with backend.backend(name):
        got = quantize(*args)
    assert_same(got, reference.quantize(*case.args()))
    assert got.stride() == empty_for(*args[:2]).stride()


@ALL
def test_dequantize_has_the_reference_bits(case, fast):
    name, device = fast
    skip_refused(fast, "quantize", case.dtype)
    _, scale, zero_point, _, _, axis = case.args(device)
    for dtype in (torch.int8, torch.uint8, torch.int32):
        info = torch.iinfo(dtype)
        rng = torch.Generator().manual_seed(0)
        code = torch.randint(info.min, info.max + 1, case.shape, generator=rng).to(dtype).to(device)
        code = code.contiguous(memory_format=torch.channels_last) if case.layout == "channels_last" else code
        with backend.backend(name):
            got = dequantize(code, scale, zero_point, axis, case.dtype)
        assert_same(got, reference.dequantize(code.cpu(), scale.cpu(), zero_point.cpu(), axis, case.dtype))
        assert got.stride() == empty_for(code, scale).stride()


@ALL
def test_scalar_path(case, scalar):
    args = case.args()
    code = reference.quantize(*args)
    back = *args[1:3], args[5], case.dtype
    assert_same(cpu.quantize(*args), code)
    assert_same(cpu.dequantize(code, *back), reference.dequantize(code, *back))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    args = CASE["threads"].args()
    with path(threads=threads):
        assert_same(quantize(*args), reference.quantize(*args))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    scale=st.floats(2.0**-10, 2.0**10, width=32),
    qmin=st.integers(-400, 400),
    levels=st.integers(0, 300),
    zero_point=st.integers(-500, 500),
)
def test_properties(values, scale, qmin, levels, zero_point):
    x, s, z = torch.tensor(values), torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
    code = quantize(x, s, z, qmin, qmin + levels)
    assert code.min() >= qmin
    assert code.max() <= qmin + levels
    back = dequantize(code, s, z)
    assert torch.equal(quantize(back, s, z, qmin, qmin + levels), code), "not the inverse on codes"
    whole = fake_quant(x, s, z, qmin, qmin + levels)
    assert torch.equal(back[~x.isnan()], whole[~x.isnan()])


# errors

_INT = torch.zeros(4, dtype=torch.int32)
ERRORS = (
    ErrorCase(
        "learned",
        TypeError,
        "quantize: zero_point must be torch.int32 for torch.float32 x, got torch.float32",
        {"zero_point": torch.zeros(4)},
    ),
    ErrorCase("scale", ValueError, "quantize: scale must have shape (1,) or (4,), got (3,)", {"scale": torch.ones(3)}),
    ErrorCase(
        "x",
        TypeError,
        "quantize: x must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        {"x": _INT},
    ),
    ErrorCase(
        "range",
        ValueError,
        "quantize: qmin must be <= qmax, both within 2**24 of 0, got 8 and 7",
        {"qmin": 8},
    ),
)
BACK_ERRORS = (
    ErrorCase(
        "code",
        TypeError,
        "dequantize: code must be an int8, uint8 or int32 tensor, got torch.int64",
        {"code": _INT.long()},
    ),
    ErrorCase(
        "dtype",
        TypeError,
        "dequantize: dtype must be torch.float32, torch.float16, torch.bfloat16 or torch.float64, got torch.int8",
        {"dtype": torch.int8},
    ),
    ErrorCase(
        "dtype_by_name",
        TypeError,
        "dequantize: dtype must be torch.float32, torch.float16, torch.bfloat16 or torch.float64, got 'float32'",
        {"dtype": "float32"},
    ),
    ErrorCase(
        "double",
        TypeError,
        "dequantize: scale must be torch.float64 for torch.float64 values, got torch.float32",
        {"dtype": torch.float64},
    ),
    ErrorCase("axis", ValueError, "dequantize: axis must be in [-3, 2], got 3", {"axis": 3}),
)


@every(ERRORS)
def test_errors_of_quantize(case):
    good = {"x": torch.zeros(2, 4, 3), "scale": torch.ones(4), "zero_point": _INT, "qmin": -8, "qmax": 7, "axis": 1}
    assert_raises(case, quantize, good)


@every(BACK_ERRORS)
def test_errors_of_dequantize(case):
    good = {"code": torch.zeros(2, 4, 3, dtype=torch.int8), "scale": torch.ones(4), "zero_point": _INT, "axis": 1}
    assert_raises(case, dequantize, good)


# torch's machinery


@pytest.mark.parametrize("name", ["axis_1", "empty", "expanded", "channels_last_axis_1", "groups", "bf16", "fp64"])
def test_opcheck(name):
    args, dtype = CASE[name].args(), CASE[name].dtype
    torch.library.opcheck(torch.ops.zsq.quantize, args)
    code = reference.quantize(*args)
    torch.library.opcheck(torch.ops.zsq.dequantize, (code, *args[1:3], args[5], dtype))


@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_compile(chosen):
    x, scale, zero_point, *range_ = CASE["axis_1"].args()

    def both(x):
        code = quantize(x, scale, zero_point, *range_)
        return code, dequantize(code, scale, zero_point, range_[2])

    torch._dynamo.reset()
    with backend.backend(chosen):
        found = torch.compile(both, backend="aot_eager", fullgraph=True)(x)
    assert_same(found, both(x))


def test_export_keeps_the_ops():
    class Model(torch.nn.Module):
        def forward(self, x):
            grid = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
            return dequantize(quantize(x, *grid, -8, 7), *grid)

    assert_exports(Model(), (torch.randn(5, 3),), (torch.randn(7, 3),), "quantize", "dequantize")


def test_autocast_keeps_the_dtypes():
    x, scale, zero_point, *range_ = CASE["per_tensor"].args()
    with torch.autocast("cpu", torch.bfloat16):
        code = quantize(x, scale, zero_point, *range_)
        assert code.dtype == torch.int8
        assert dequantize(code, scale, zero_point).dtype == torch.float32
