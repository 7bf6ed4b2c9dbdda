"""Ranges as wide on either side of zero."""

import functools

import pytest
import torch

from zsq_ext.ops import fake_quant, fake_quant_minmax
from zsq_ext.quant import ranges


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_abs_max_is_the_largest_magnitude_on_either_side(axis):
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lo, hi = ranges.abs_max(x, axis)
    axes = [0, 1, 2] if axis is None else [a for a in range(3) if a != axis % 3]
    assert torch.equal(hi.squeeze(), x.detach().abs().amax(axes))
    assert torch.equal(lo, -hi)
    assert not hi.requires_grad
    with pytest.raises(ValueError, match="abs_max: x must not be empty"):
        ranges.abs_max(torch.zeros(0))
    with pytest.raises(TypeError, match="abs_max: x must be floating point"):
        ranges.abs_max(torch.zeros(2).int())


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_symmetric_grid_is_that_of_fake_quant_minmax(bits):
    # Among so many ranges some have a quotient just beside the tie.
    x = torch.randn(3000, 2, generator=torch.Generator().manual_seed(bits))
    _, (scale,), (zero_point,) = fake_quant_minmax([x], bits, symmetric=True, return_grid=True)
    for lo, hi in (ranges.abs_max(x, 0), ranges.min_max(x, 0)):
        found = ranges.affine_params(lo, hi, bits, signed=True, include_zero=False, symmetric=True)
        assert torch.equal(found[0], scale)
        assert torch.equal(found[1], zero_point)
        assert not found[1].any()
    unsigned = ranges.affine_params(*ranges.abs_max(x, 0), bits, signed=False, include_zero=True, symmetric=True)
    assert torch.equal(unsigned[0], scale)
    assert (unsigned[1] == 2 ** (bits - 1)).all()


def test_the_search_tries_symmetric_grids():
    x = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 12.0
    search = functools.partial(ranges.lp_search, x, 3, axis=0, signed=True, include_zero=False, symmetric=True)
    lo, hi = search(start=ranges.abs_max(x, 0))
    assert torch.equal(lo, -hi)
    for c, row in enumerate(x):
        errors = []
        for ratio in ranges.CLIP_RATIOS:
            scale = 2 * (12.0 * torch.tensor(ratio)) / 7
            errors.append(
                (fake_quant(row, scale[None], torch.zeros(1).int(), -4, 3) - row).abs().double().pow(2.4).sum()
            )
        assert hi[c].item() == pytest.approx(12 * ranges.CLIP_RATIOS[int(torch.stack(errors).argmin())], rel=1e-6)
    # the extremes of x, which are widened, give the same grids
    assert torch.equal(torch.stack(search()).abs().amax(0), hi)
