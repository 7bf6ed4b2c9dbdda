"""Ranges and quantizer parameters: shapes, errors, and what holds for every input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_ext.ops import fake_quant
from zsq_ext.quant import ranges

FINITE = st.floats(-1e6, 1e6, width=32)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None)
@given(values=st.lists(FINITE, min_size=1, max_size=20), bits=st.integers(2, 8), signed=st.booleans())
def test_values_inside_the_range_come_back_within_half_a_step(values, bits, signed):
    x = torch.tensor(values)
    grid = ranges.affine_params(*ranges.min_max(x), bits, signed=signed, include_zero=True)
    scale, zero_point, qmin, qmax = grid
    assert qmin <= zero_point <= qmax
    # half a step, and the other half once at each end, where the zero-point's own rounding shifts the grid
    error = (fake_quant(x, *grid) - x).abs()
    assert (error <= scale * (1 + 1e-5)).all()
    ends = ((0 - zero_point) + torch.tensor([qmin, qmax])) * scale
    inside = (x >= ends[0]) & (x <= ends[1])
    assert (error[inside] <= scale / 2 * (1 + 1e-4)).all()


@settings(deadline=None)
@given(lo=FINITE, width=st.floats(0, 1e6, width=32), bits=st.integers(2, 8))
def test_every_range_has_a_usable_scale(lo, width, bits):
    lo = torch.tensor(lo)
    hi = lo + width
    scale, zero_point, qmin, _ = ranges.affine_params(lo, hi, bits, signed=True, include_zero=False)
    assert scale.shape == zero_point.shape == (1,)
    assert 0 < scale < math.inf
    # exact in fp32, and the code of lo is qmin
    assert abs(zero_point.item()) <= 2**23 + 2**bits
    assert torch.round(lo / scale) + zero_point == qmin


def test_params_keep_channels_and_double_precision():
    lo, hi = -torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    scale, zero_point, qmin, qmax = ranges.affine_params(lo, hi, 8, signed=False, include_zero=True)
    assert scale.dtype == torch.float64
    assert zero_point.dtype == torch.int32
    assert scale.shape == zero_point.shape == (5,)
    assert (qmin, qmax) == (0, 255)
    half = ranges.affine_params(lo.half(), hi.half(), 8, signed=False, include_zero=True)[0]
    assert half.dtype == torch.float32


def test_a_weight_range_away_from_zero_is_kept():
    lo, hi = torch.tensor([1.0]), torch.tensor([2.5])
    scale, zero_point, qmin, _ = ranges.affine_params(lo, hi, 4, signed=True, include_zero=False)
    assert scale.item() == pytest.approx(0.1)
    assert zero_point.item() == -18
    wide = ranges.affine_params(lo, hi, 4, signed=True, include_zero=True)
    assert wide[0].item() == pytest.approx(2.5 / 15)
    assert wide[1].item() == qmin


@pytest.mark.parametrize("bits", [1, 9, 4.0, "4"])
def test_bits_outside_the_contract_are_refused(bits):
    with pytest.raises(ValueError, match="affine_params: bits must be an integer from 2 to 8"):
        ranges.affine_params(torch.zeros(1), torch.ones(1), bits, signed=True, include_zero=True)


def test_wrong_shapes_and_types_are_refused():
    with pytest.raises(ValueError, match=r"affine_params: lo and hi must .* got \(2,\), \(3,\)"):
        ranges.affine_params(torch.zeros(2), torch.ones(3), 4, signed=True, include_zero=True)
    with pytest.raises(TypeError, match="affine_params: lo must be floating point"):
        ranges.affine_params(torch.zeros(2, dtype=torch.int32), torch.ones(2), 4, signed=True, include_zero=True)
    with pytest.raises(TypeError, match="affine_params: hi must be a tensor, got float"):
        ranges.affine_params(torch.zeros(1), 1.0, 4, signed=True, include_zero=True)
    with pytest.raises(TypeError, match="affine_params: signed must be True or False, got 'no'"):
        ranges.affine_params(torch.zeros(1), torch.ones(1), 4, signed="no", include_zero=True)
    with pytest.raises(TypeError, match="min_max: x must be floating point"):
        ranges.min_max(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="min_max: x must not be empty"):
        ranges.min_max(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"min_max: axis must be in \[-2, 1\], got 2"):
        ranges.min_max(torch.zeros(2, 3), axis=2)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_min_max_and_the_whole_percentile_agree(axis):
    x = normal(3, 4, 5).transpose(0, 2).requires_grad_()
    lo, hi = ranges.min_max(x, axis)
    axes = [0, 1, 2] if axis is None else [a for a in range(3) if a != axis % 3]
    assert torch.equal(lo.squeeze(), x.amin(axes))
    assert torch.equal(hi.squeeze(), x.amax(axes))
    assert not lo.requires_grad
    whole = ranges.percentile(x, 100, axis)
    assert torch.equal(whole[0], lo)
    assert torch.equal(whole[1], hi)


def test_channels_of_a_vector_are_its_elements():
    lo, hi = ranges.min_max(torch.tensor([3.0, -1.0]), axis=0)
    assert torch.equal(lo, hi)
    assert lo.tolist() == [3.0, -1.0]


def test_percentile_takes_the_nearest_rank_from_either_end():
    x = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    assert [t.item() for t in ranges.percentile(x, 99.9)] == [1.0, 998.0]
    assert [t.item() for t in ranges.percentile(x, 99)] == [10.0, 989.0]
    with pytest.raises(ValueError, match="percentile: percent must be above 50"):
        ranges.percentile(x, 50)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_lp_search_finds_the_best_ratio(axis, p):
    x = normal(4, 500, seed=2)
    x[:, 0] = torch.tensor([3.0, 10.0, 30.0, 100.0])
    x[:, 1] = -5.0
    lo, hi = ranges.lp_search(x, 4, p, axis=axis, signed=True, include_zero=True)
    rows = x.reshape(1, -1) if axis is None else x
    for row, low, high in zip(rows, lo, hi, strict=True):
        errors = {}
        for i in range(100, 0, -1):
            bounds = row.amin() * (i / 100), row.amax() * (i / 100)
            grid = ranges.affine_params(*bounds, 4, signed=True, include_zero=True)
            errors[i] = (fake_quant(row, *grid) - row).abs().pow(p).mean().item()
        best = min(errors, key=errors.get)
        assert low.item() == pytest.approx(row.amin().item() * best / 100, rel=1e-6)
        assert high.item() == pytest.approx(row.amax().item() * best / 100, rel=1e-6)
    if axis == 0:
        # a mild outlier is worth clipping, an extreme one costs more than it disturbs
        assert hi[0] < x[0].max()
        assert hi[3] == x[3].max()


def test_lp_search_shrinks_the_start_it_is_given_and_prefers_the_wide_range():
    m = torch.tensor([4.0])
    x = torch.tensor([-1.0, 0.0, 1.0])
    lo, hi = ranges.lp_search(x, 8, start=(-m, m), signed=True, include_zero=True, ratios=(1.0, 0.5))
    assert torch.equal(lo, -hi)
    assert hi.item() in (4.0, 2.0)
    zeros = torch.zeros(7)
    assert [t.item() for t in ranges.lp_search(zeros, 4, signed=True, include_zero=True, start=(-m, m))] == [-4, 4]


def test_lp_search_refuses_what_it_cannot_search():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="lp_search: p must be above 0 and at most 16, got 0"):
        ranges.lp_search(x, 4, 0, signed=True, include_zero=True)
    with pytest.raises(TypeError, match="lp_search: p must be a number, got '2'"):
        ranges.lp_search(x, 4, "2", signed=True, include_zero=True)
    with pytest.raises(ValueError, match=r"lp_search: ratios\[1\] must be positive and finite, got -1"):
        ranges.lp_search(x, 4, signed=True, include_zero=True, ratios=(1, -1))
    with pytest.raises(TypeError, match=r"lp_search: ratios\[0\] must be a number, got 'a'"):
        ranges.lp_search(x, 4, signed=True, include_zero=True, ratios=["a"])
    with pytest.raises(TypeError, match=r"lp_search: start must be None or a pair \(lo, hi\), got 1"):
        ranges.lp_search(x, 4, signed=True, include_zero=True, start=1)
    with pytest.raises(ValueError, match="lp_search: ratios must name"):
        ranges.lp_search(x, 4, signed=True, include_zero=True, ratios=())


def test_ema_starts_at_zero_and_takes_beta_zero():
    empty = torch.zeros(1), torch.zeros(1), torch.zeros((), dtype=torch.int64)
    assert [t.item() for t in ranges.ema_value(*empty)] == [0, 0]
    state = ranges.ema_update(*empty, torch.tensor([-1.0]), torch.tensor([2.0]), beta=0.0)
    state = ranges.ema_update(*state, torch.tensor([-3.0]), torch.tensor([4.0]), beta=0.0)
    assert [t.item() for t in ranges.ema_value(*state, beta=0.0)] == [-3, 4]
    assert state[2].item() == 2
    with pytest.raises(ValueError, match="beta must be in"):
        ranges.ema_value(*empty, beta=1.0)


@settings(deadline=None, max_examples=30)
@given(values=st.lists(FINITE, min_size=1, max_size=30), beta=st.floats(0.0, 0.99))
def test_ema_value_is_the_weighted_mean_of_the_batches(values, beta):
    zero = torch.zeros(1, dtype=torch.float64)
    state = zero, zero, torch.zeros((), dtype=torch.int64)
    for v in values:
        state = ranges.ema_update(*state, torch.full_like(zero, v), torch.full_like(zero, v), beta)
    weights = [beta ** (len(values) - 1 - i) for i in range(len(values))]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert ranges.ema_value(*state, beta)[1].item() == pytest.approx(mean, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("lo", "hi"), [("nan", "nan"), ("-inf", "1"), ("-1", "inf"), ("-inf", "inf"), ("nan", "1")])
def test_a_range_that_is_not_finite_hides_behind_no_code(lo, hi, symmetric):
    lo, hi = torch.tensor([float(lo), -1.0]), torch.tensor([float(hi), 2.0])
    grid = ranges.affine_params(lo, hi, 4, signed=True, include_zero=False, symmetric=symmetric)
    scale, zero_point, *_ = grid
    assert -16 <= zero_point[0] <= 16  # and nothing that a cast of NaN may give
    assert not torch.isfinite(scale[0])
    found = fake_quant(torch.tensor([[0.5, -3.0, 0.0], [0.5, -3.0, 0.0]]), *grid, axis=0)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
