"""lp_error: sums of powers within their bound of float64's, from every backend, and the search for ranges on it.

Broken on purpose on the CPU, each seen red:

    the rest of p beside its first 12 bits dropped      a_power_is_within_its_bound, 2.4
    a logarithm's coefficient off in its fourth digit   a_power_is_within_its_bound, 0.25
    the difference's sign kept                          the_ends_of_the_power, 0.3
    the power of 0, of NaN left to the exponent         the_ends_of_the_power, 0.3
    the exponent not clamped                            sixteenth
    a grid by the reciprocal                            boundary (between two codes either is as far)
    an element behind every 16 lost                     weights
    the first chunk taken for all                       chunks
    the first channel's grids taken for all             weights
    chunks by the number of threads                     spread
"""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_ext.ops import backend, cpu, fake_quant, lp_error, reference
from zsq_ext.ops.cases import lp_error as cases
from zsq_ext.quant import ranges

ALL = pytest.mark.parametrize("case", cases.LP_ERROR, ids=lambda case: case.name)
CASE = {case.name: case for case in cases.LP_ERROR}

pytestmark = pytest.mark.usefixtures("poison")

U = 2.0**-24


def bound(p, dtype):
    """What a sum may be off by, relatively: each power, and 16 of them added in float; float64 has a library's powers
    and nothing to go on in."""
    return 2.0**-40 if dtype == torch.float64 else (22 + 3 * p) * U


def assert_within(got, expected, p, dtype):
    assert got.dtype == torch.float64
    assert got.shape == expected.shape
    got, expected = got.cpu(), expected.cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    wrong = (got - expected).abs() > bound(p, dtype) * expected + 1e-30
    wrong &= ~((got == expected) | expected.isnan())  # infinities of one sign
    # what may count as 0 or as infinity
    wrong &= ~((expected < 2.0**-100) & (got < 2.0**-100)) & ~((expected > 2.0**100) & (got > 2.0**100))
    assert not wrong.any(), f"{got[wrong]} instead of {expected[wrong]}"


# meaning


@ALL
def test_reference_is_the_formula(case):
    x, scale, zero_point, qmin, qmax, p, axis = case.args()
    found = reference.lp_error(*case.args())
    rows = [x] if axis is None else x.unbind(axis)
    for c, row in enumerate(rows):
        for k in range(scale.size(1)):
            row_ = row.to(scale.dtype)
            grid = scale[c, k : k + 1], zero_point[c, k : k + 1], qmin, qmax
            d = (row_ - fake_quant(row_, *grid)).abs().double().numpy()
            with np.errstate(all="ignore"):
                expected = np.power(d, p).sum()
            assert found[c, k].item() == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_in_numbers():
    x = torch.tensor([[0.1, 0.5, 1.0], [-0.25, 0.0, 0.25]])
    scale = torch.tensor([[0.5, 0.25], [0.25, 1.0]])
    found = lp_error(x, scale, torch.zeros(2, 2, dtype=torch.int32), 0, 3, 2, 0)
    # the second grid ends at 0.75; below 0 there is no code
    torch.testing.assert_close(
        found.float(), torch.tensor([[0.01, 0.1**2 + 0.0625], [0.0625, 0.125]]), rtol=1e-6, atol=0
    )
    assert lp_error(x, scale, torch.zeros(2, 2, dtype=torch.int32), 0, 3, axis=0)[1, 0].item() == pytest.approx(
        0.25**2.4, rel=1e-6
    )


# accuracy


def powers(a, p):
    """|a - 0|^p of each element on its own, where the only code is that of 0."""
    one, zero = torch.ones(len(a), 1), torch.zeros(len(a), 1, dtype=torch.int32)
    return lp_error(a, one, zero, 0, 0, p, 0)[:, 0]


@pytest.mark.parametrize("p", [0.25, 1.0, 2.4, 3.7, 8.0, 16.0])
def test_a_power_is_within_its_bound(p):
    # Every mantissa in steps of 61, in octaves whose powers are between 2^-100 and 2^100.
    mantissas = 1 + torch.arange(0, 2**23, 61, dtype=torch.float64) / 2**23
    reach = min(100 / p, 100)
    for octave in (
        {-int(reach), -9, -3, -1, 0, 1, 5, int(reach) - 1} if reach > 10 else {-int(reach), -1, 0, int(reach) - 1}
    ):
        a = (mantissas * 2.0**octave).float()
        expected = a.double().pow(p)
        off = ((powers(a, p) - expected).abs() / expected).max().item() / U
        assert off <= 6 + 3 * p, (octave, off)


@pytest.mark.parametrize("p", [0.3, 2.0, 2.4, 16.0])
def test_the_ends_of_the_power(p):
    tiny = torch.finfo(torch.float32).tiny
    found = powers(torch.tensor([0.0, -0.0, tiny / 2, torch.inf, -torch.inf, torch.nan]), p)
    assert found[:5].tolist() == [0, 0, 0, torch.inf, torch.inf]
    assert found[5].isnan()


# parity


@ALL
def test_every_backend_agrees_with_the_reference(case, fast):
    name, device = fast
    args = case.args(device)
    if (reason := backend.reason_against(name, "lp_error", device, case.dtype)) is not None:
        with backend.backend(name), pytest.raises(NotImplementedError, match=reason):
            lp_error(*args)
        return
    before = [t.clone() for t in args[:3]]
    with backend.backend(name):
        got, again = lp_error(*args), lp_error(*args)
    assert_within(got, reference.lp_error(*case.args()), case.p, case.dtype)
    assert torch.equal(got.nan_to_num(), again.nan_to_num())
    for a, b in zip(before, args[:3], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), "an input was modified"
    if case.values == "exact":
        assert not got[:, 0].any()


LONG = cases.LpErrorCase("long", shape=(2, 1500000), candidates=2), cases.LpErrorCase("threads", shape=(300, 700))


@pytest.mark.parametrize("case", cases.LP_ERROR + LONG, ids=lambda case: case.name)
def test_the_scalar_path_and_any_number_of_threads(case):
    native = pytest.importorskip("zsq_ext._C")
    args, threads, simd = case.args(), torch.get_num_threads(), native.simd_enabled()
    expected = cpu.lp_error(*args)
    assert_within(expected, reference.lp_error(*args), case.p, case.dtype)
    try:
        for number, path in ((1, True), (2, True), (5, True), (2, False)):
            torch.set_num_threads(number)
            native.set_simd(path)
            found = cpu.lp_error(*args)
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    finally:
        torch.set_num_threads(threads)
        native.set_simd(simd)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    channels=st.integers(1, 5),
    length=st.integers(1, 40),
    candidates=st.integers(1, 20),
    p=st.floats(0.25, 8),
    power=st.integers(-6, 6),
)
def test_properties(seed, channels, length, candidates, p, power):
    case = cases.LpErrorCase("any", shape=(channels, length), candidates=candidates, p=p)
    x, scale, zero_point, *rest = case.args(seed=seed)
    found = lp_error(x, scale, zero_point, *rest)
    assert (found >= 0).all()
    # a channel does not know its neighbours, a grid does not know the others
    c, k = seed % channels, seed % candidates
    one = lp_error(x[c : c + 1], scale[c : c + 1, k : k + 1], zero_point[c : c + 1, k : k + 1], *rest)
    assert one.item() == found[c, k].item()
    # the unit of x is the unit of the error; a mirrored tensor on a mirrored grid has the same
    unit = 2.0**power
    scaled = lp_error(x * unit, scale * unit, zero_point, *rest)
    torch.testing.assert_close(scaled, found * unit**p, rtol=2 * bound(p, x.dtype), atol=1e-20)
    qmin, qmax, *rest = rest
    assert torch.equal(lp_error(-x, scale, -zero_point, -qmax, -qmin, *rest), found)


# the search


def searched(x, bits, p, axis, signed, include_zero, ratios=ranges.CLIP_RATIOS):
    """(errors in float64 [C, ratios], lows, highs), from the definition."""
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    lo, hi = rows.amin(1).float(), rows.amax(1).float()
    errors, lows, highs = [], [], []
    for ratio in ratios:
        grid = ranges.affine_params(lo * ratio, hi * ratio, bits, signed=signed, include_zero=include_zero)
        d = (rows.float() - fake_quant(rows.float(), *grid, axis=0)).abs().double()
        errors.append(d.pow(p).sum(1))
        lows.append(lo * ratio)
        highs.append(hi * ratio)
    return (torch.stack(t, 1) for t in (errors, lows, highs))


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize(
    ("shape", "axis", "bits", "signed", "include_zero"),
    [((24, 8, 3, 3), 0, 4, True, False), ((24, 8, 3, 3), 0, 2, True, False), ((4, 6, 7, 7), None, 4, False, True)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_finds_what_float64_finds(shape, axis, bits, signed, include_zero, p, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x if signed else x.relu()
    lo, hi = ranges.lp_search(x, bits, p, axis=axis, signed=signed, include_zero=include_zero)
    errors, lows, highs = searched(x, bits, p, axis, signed, include_zero)
    best = errors.argmin(1)
    for c in range(len(lo)):
        (k,) = ((lows[c] == lo[c]) & (highs[c] == hi[c])).nonzero()[:1, 0].tolist()
        # Each of the two sums may be off by the bound, in opposite directions.
        assert errors[c, k] <= errors[c, best[c]] * (1 + 2.01 * bound(p, x.dtype))
        if k != best[c]:
            assert errors[c, k] != errors[c, best[c]], "of two that tie, the earlier one"


def test_the_search_reads_any_memory_and_16_bits():
    x = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(3))
    search = functools.partial(ranges.lp_search, bits=3, axis=1, signed=True, include_zero=False)
    expected = search(x)
    last = search(x.contiguous(memory_format=torch.channels_last))
    for a, b in zip(expected, last, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0)  # another order of the sum may tip the balance by one ratio
    for dtype in (torch.float16, torch.bfloat16):
        for a, b in zip(search(x.to(dtype)), search(x.to(dtype).float()), strict=True):
            assert torch.equal(a, b)
    assert search(x.double())[0].dtype == torch.float64


def test_the_search_keeps_the_range_where_no_error_is_finite():
    x = torch.tensor([[1.0, -2.0, torch.nan], [1.0, -2.0, 0.5]])
    lo, hi = ranges.lp_search(
        x, 4, axis=0, signed=True, include_zero=True, start=(torch.tensor([-3.0]), torch.tensor([3.0])), ratios=(0.5,)
    )
    assert lo.tolist() == [-3, -1.5]
    assert hi.tolist() == [3, 1.5]
    with pytest.raises(ValueError, match="lp_search: p must be above 0 and at most 16, got 20"):
        ranges.lp_search(x, 4, 20, signed=True, include_zero=True)


# errors


@pytest.mark.parametrize("case", cases.LP_ERROR_ERRORS, ids=lambda case: case.name)
def test_errors_name_the_argument(case):
    good = {
        "x": torch.zeros(2, 3),
        "scale": torch.ones(2, 4),
        "zero_point": torch.zeros(2, 4, dtype=torch.int32),
        "qmin": -8,
        "qmax": 7,
        "axis": 0,
    }
    lp_error(**good)
    with pytest.raises(case.error) as raised:
        lp_error(**{**good, **case.change})
    assert str(raised.value) == case.message


def test_no_gradient_and_autocast():
    x, scale, *rest = CASE["weights"].args()
    with torch.autocast("cpu", torch.bfloat16):
        found = lp_error(x.requires_grad_(), scale.requires_grad_(), *rest)
    assert found.dtype == torch.float64
    assert not found.requires_grad


# torch's machinery


@pytest.mark.parametrize("name", ["weights", "axis_1", "tensor", "strided", "expanded", "permuted", "bf16", "empty"])
def test_opcheck(name):
    torch.library.opcheck(torch.ops.zsq.lp_error, CASE[name].args())


def test_compile_and_export():
    class Model(torch.nn.Module):
        def forward(self, x, scale, zero_point):
            return lp_error(x, scale, zero_point, -8, 7, 2.4, 0).sqrt()

    args = CASE["weights"].args()[:3]
    torch._dynamo.reset()
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*args), Model()(*args))
    program = torch.export.export(Model(), args)
    assert "zsq.lp_error" in str(program.graph)
    assert torch.equal(program.module()(*args), Model()(*args))


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.LP_ERROR, ids=lambda case: case.name)
def test_cuda_has_the_bits_of_the_cpu(case):
    if case.dtype == torch.float64:
        pytest.skip("cuda takes no float64")
    with backend.backend("cuda"):
        found = lp_error(*case.args("cuda")).cpu()
    expected = cpu.lp_error(*case.args())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_new_contents(name):
    x, *rest = CASE["chunks"].args("cuda")
    with backend.backend(name):
        lp_error(x, *rest)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = lp_error(x, *rest)
        x.normal_()
        graph.replay()
        assert torch.equal(found, lp_error(x, *rest))
