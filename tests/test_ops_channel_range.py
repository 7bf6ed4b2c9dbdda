"""channel_range: the extremes of a tensor or its channels, the same bits on every backend.

Broken on purpose, each seen red:

    NaN dropped: in a row, in its second half, in a column   nan_anywhere 0 and 8, special_long
    NaN dropped by the scalar path, by Triton                wide_channel
    the tail of a row lost                                   axis_1
    a zero with the sign of whichever came first             zero_has_no_sign
    pieces of a row taken for channels                       long_rows
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_exports, assert_raises, assert_same, every, on_every_path, refused, unchanged

from zsq_ext.ops import backend, channel_range, cpu, reference
from zsq_ext.ops.cases import ErrorCase
from zsq_ext.ops.cases import fake_quant as cases

CASES = [case for case in cases.FAKE_QUANT if 0 not in case.shape and not case.groups] + [
    cases.FakeQuantCase("long_rows", shape=(3, 140001), axis=0),
    cases.FakeQuantCase("vector", shape=(9,), axis=0),
    cases.FakeQuantCase("special_long", shape=(64, 700), axis=1, values="special"),
    cases.FakeQuantCase("special_rows", shape=(3, 5, 7, 11), axis=1, values="special", zero_point="inside"),
]
ALL = every(CASES)
CASE = {case.name: case for case in CASES}

# More channels than a task of 64 Ki elements meets, in rows and in channels-last memory.
MANY = [
    cases.FakeQuantCase("many_channels", shape=(2, 40000, 3), axis=1),
    cases.FakeQuantCase("wide_rows", shape=(3, 70003), axis=1),
]

pytestmark = pytest.mark.usefixtures("poison")


@ALL
def test_reference_is_the_extremes(case):
    x, axis = case.args()[0], case.axis
    lo, hi = reference.channel_range(x, axis)
    wide = x.to(torch.float64 if case.dtype == torch.float64 else torch.float32)
    for i, row in enumerate([wide] if axis is None else wide.unbind(axis)):
        assert_same((lo[i], hi[i]), (row.min() + 0.0, row.max() + 0.0))


@ALL
def test_every_backend_has_the_reference_bits(case, fast):
    name, device = fast
    x = case.args(device)[0]
    if refused(fast, "channel_range", case.dtype, lambda: channel_range(x, case.axis)):
        return
    with backend.backend(name), unchanged(x):
        got = channel_range(x, case.axis)
    assert_same(got, reference.channel_range(case.args()[0], case.axis))


@every(CASES + MANY)
def test_the_scalar_path_and_any_number_of_threads(case):
    x, axis = case.args()[0], case.axis
    assert_same(on_every_path(lambda: cpu.channel_range(x, axis)), reference.channel_range(x, axis))


@pytest.mark.parametrize("place", [0, 5, 7, 8, 15, 16, 31, 40])
@pytest.mark.parametrize("layout", ["row", "column"])
def test_a_nan_anywhere_is_seen_and_stays(place, layout, fast):
    name, device = fast
    x = torch.arange(41.0, device=device)
    x[place] = torch.nan
    x = x.expand(3, 41).clone() if layout == "row" else x[:, None].expand(41, 20).clone()
    x[0 if layout == "row" else slice(None), 1 if layout == "row" else 0] = 0  # and a channel without one
    if layout == "row":
        x[0] = 1
    with backend.backend(name):
        lo, hi = channel_range(x, 0 if layout == "row" else 1)
    assert lo.isnan().tolist() == hi.isnan().tolist() == [False] + [True] * (len(lo) - 1)


def test_a_zero_has_no_sign(fast):
    name, device = fast
    with backend.backend(name):
        for zeros in ([-0.0] * 20, [0.0, -0.0] * 9, [-0.0, 0.0] * 9):
            lo, hi = channel_range(torch.tensor(zeros, device=device))
            assert not lo.signbit().any()
            assert not hi.signbit().any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
)
def test_properties(seed, shape, data):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = x.permute(data.draw(st.permutations(range(len(shape)))))
    lo, hi = channel_range(x, axis)
    assert lo.shape == hi.shape == (x.size(axis),)
    whole = channel_range(x)
    assert_same(whole, (lo.amin()[None], hi.amax()[None]))
    assert_same(channel_range(-x, axis), (-hi, -lo))
    sizes = [1] * x.dim()
    sizes[axis] = -1
    inside = (x >= lo.view(sizes)) & (x <= hi.view(sizes))
    assert inside.all()


def test_no_gradient_and_autocast():
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        lo, hi = channel_range(x, 0)
    assert lo.dtype == hi.dtype == torch.float32
    assert not lo.requires_grad


ERRORS = (
    ErrorCase(
        "x",
        TypeError,
        "channel_range: x must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        {"x": torch.zeros(2, dtype=torch.int32)},
    ),
    ErrorCase("empty", ValueError, "channel_range: x must not be empty, got shape (2, 0)", {"x": torch.zeros(2, 0)}),
    ErrorCase("axis", ValueError, "channel_range: axis must be in [-2, 1], got 2", {"axis": 2}),
)


@every(ERRORS)
def test_errors_name_the_argument(case):
    assert_raises(case, channel_range, {"x": torch.zeros(2, 3), "axis": 1})


@pytest.mark.parametrize("name", ["per_tensor", "axis_1", "strided", "expanded", "channels_last_axis_1", "bf16"])
def test_opcheck(name):
    torch.library.opcheck(torch.ops.zsq.channel_range, (CASE[name].args()[0], CASE[name].axis))


def test_compile_and_export():
    class Model(torch.nn.Module):
        def forward(self, x):
            lo, hi = channel_range(x, 1)
            return hi - lo

    x = torch.randn(5, 3, 4)
    torch._dynamo.reset()
    assert_same([torch.compile(Model(), backend="aot_eager", fullgraph=True)(x)], [Model()(x)])
    assert_exports(Model(), (x,), (torch.randn(7, 3, 4),), "channel_range")
