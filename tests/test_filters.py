"""The low-pass filter: what holds for every size and cut, and how it behaves as a module."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_ext.synth import filters


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 70), d0=st.floats(0.3, 300))
def test_taps_are_a_symmetric_unit_sum(n, d0):
    taps = filters.lowpass_taps(n, d0)
    assert taps.dtype == torch.float64
    assert taps.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(taps[1:], taps[1:].flip(0), rtol=0, atol=1e-14)
    matrix = filters.circulant(n, d0)
    assert torch.equal(matrix, matrix.T)
    # the row sum is one to half a unit in the last place of the centre tap
    assert (matrix.double().sum(1) - 1).abs().max() <= 2**-24 * matrix[0, 0]


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (33, 17), (1, 8)])
@pytest.mark.parametrize("value", [1.0, -2.1179])
def test_a_constant_image_passes_unchanged(size, value):
    x = torch.full((2, 3, *size), value)
    # n products and sums per axis round
    torch.testing.assert_close(filters.LowPass(size, 20)(x), x, rtol=2e-6, atol=0)


def test_a_wide_cut_is_the_identity():
    x = normal(2, 3, 32, 30)
    torch.testing.assert_close(filters.LowPass((32, 30), 1e6)(x), x, rtol=0, atol=1e-6)


def test_the_share_of_white_noise_is_the_sampled_one():
    x = normal(64, 3, 32, 32, seed=1)
    kept = filters.LowPass((32, 32), 8)(x).var() / x.var()
    # 196608 samples, a fifth of them independent after the filter: 0.7 % standard error
    assert kept.item() == pytest.approx(filters.attenuation(32, 8).white_noise_kept, rel=0.03)


def test_the_filter_is_its_own_adjoint_and_commutes_with_shifts():
    low = filters.LowPass((16, 12), 3)
    x = normal(2, 3, 16, 12, seed=2).requires_grad_()
    upstream = normal(2, 3, 16, 12, seed=3)
    low(x).backward(upstream)
    torch.testing.assert_close(x.grad, low(upstream), rtol=1e-5, atol=1e-6)
    shifted = torch.roll(x.detach(), (5, -3), (2, 3))
    torch.testing.assert_close(low(shifted), torch.roll(low(x.detach()), (5, -3), (2, 3)), rtol=1e-5, atol=1e-6)


def test_precision_follows_the_images():
    low = filters.LowPass((8, 8), 2)
    x = normal(1, 1, 8, 8, seed=4)
    exact = low(x)
    assert low(x.double()).dtype == torch.float64
    half = low(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, low(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low(x), exact)


def test_any_leading_axes_and_no_parameters():
    low = filters.LowPass((8, 6), 2)
    x = normal(5, 2, 3, 8, 6, seed=5)
    torch.testing.assert_close(low(x)[4, 1], low(x[4, 1]))
    assert not low.state_dict()
    assert not list(low.parameters())
    assert "size=(8, 6), d0=2" in repr(low)


def test_it_exports_with_a_dynamic_batch():
    low = filters.LowPass((8, 8), 2)
    program = torch.export.export(low, (normal(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = normal(5, 3, 8, 8, seed=6)
    torch.testing.assert_close(program.module()(x), low(x))


def test_errors():
    with pytest.raises(ValueError, match="d0 must be positive, got 0"):
        filters.LowPass((8, 8), 0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        filters.attenuation(0, 3)
    with pytest.raises(ValueError, match=r"LowPass: x must have height and width \(8, 8\), got shape \(1, 3, 8, 9\)"):
        filters.LowPass((8, 8), 2)(torch.zeros(1, 3, 8, 9))
