"""What fine-tuning losses are made of: gradients, precision and errors."""

import pytest
import torch
import torch.nn.functional as F

from zsq_ext.tune import losses


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_feature_alignment_by_hand_and_both_gradients():
    teacher, student = (normal(2, 3, 2, 2, seed=i, dtype=torch.float64).requires_grad_() for i in (15, 16))
    energies = [(x**2).mean((2, 3)) for x in (teacher, student)]
    units = [e / e.norm(dim=1, keepdim=True) for e in energies]
    loss = losses.feature_alignment([teacher, teacher], [student, student])
    torch.testing.assert_close(loss, 2 * F.mse_loss(*units))
    assert torch.autograd.gradcheck(lambda t, s: losses.feature_alignment([t], [s]), (teacher, student))


def test_feature_alignment_in_half_precision_does_not_overflow():
    big = (300 * normal(2, 3, 4, 4, seed=17)).half()
    loss = losses.feature_alignment([big], [big.flip(0)])
    assert torch.isfinite(loss)
    assert loss.dtype == torch.float32


def test_signed_perturbation_moves_one_step_and_is_a_constant():
    x = normal(2, 3, 4, 4, seed=18).requires_grad_()
    grad = normal(2, 3, 4, 4, seed=19)
    grad[0, 0, 0, 0] = 0
    moved = losses.signed_perturbation(x, grad, 0.25)
    assert not moved.requires_grad
    torch.testing.assert_close(moved - x.detach(), 0.25 * grad.sign(), rtol=0, atol=1e-6)
    assert moved[0, 0, 0, 0] == x[0, 0, 0, 0]


def test_errors_name_the_argument():
    maps = [torch.ones(2, 3, 4, 4)]
    with pytest.raises(ValueError, match="same number of layers, at least one, got 1 and 2"):
        losses.feature_alignment(maps, maps * 2)
    with pytest.raises(ValueError, match="got 0 and 0"):
        losses.feature_alignment([], [])
    with pytest.raises(ValueError, match="maps of layer 0 must have one shape"):
        losses.feature_alignment(maps, [torch.ones(2, 3, 4, 5)])
