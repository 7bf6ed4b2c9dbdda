"""Image objectives: conditioning, forms the specifications do not print, and errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from zsq_ext.ops import channel_sums, statistics_of
from zsq_ext.synth import objectives
from zsq_ext.synth.objectives import Statistics


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def statistics(inputs, centres):
    """What enters each batch norm, by the op that the teacher uses."""
    pairs = zip(inputs, centres, strict=True)
    found = [statistics_of(*channel_sums(u, mu), u.numel() // u.shape[1], mu) for u, mu in pairs]
    return Statistics.of(*zip(*found, strict=True))


def test_a_constant_channel_has_no_negative_variance_and_a_finite_gradient():
    # among a hundred levels some have S2 / n below (S1 / n)^2 by rounding
    u = torch.linspace(50, 150, 100)[:, None, None].expand(32, 100, 7, 7).clone().requires_grad_()
    found = statistics([u], [torch.zeros(100)])
    assert (found.variance >= 0).all()
    target = Statistics.of([torch.zeros(100)], [torch.ones(100)])
    objectives.bn_statistics_loss(found, target, form="mean_std").backward()
    assert torch.isfinite(u.grad).all()


def layers(count=4, seed=6):
    return [normal(2 + i, seed=seed + i).abs() for i in range(count)]


def test_bn_loss_forms_by_hand():
    m, v, mu, var = (layers(seed=s) for s in (10, 20, 30, 40))
    by_hand = sum(((a - b) ** 2).mean() + ((c - d) ** 2).mean() for a, b, c, d in zip(m, mu, v, var, strict=True)) / 4
    found, target = Statistics.of(m, v), Statistics.of(mu, var)
    torch.testing.assert_close(objectives.bn_statistics_loss(found, target), by_hand)
    by_hand = 0
    for a, b, c, d in zip(m, mu, v, var, strict=True):
        by_hand += ((a - b) ** 2).sum() + (((c + 1e-6).sqrt() - (d + 1e-6).sqrt()) ** 2).sum()
    torch.testing.assert_close(objectives.bn_statistics_loss(found, target, form="mean_std"), by_hand / 4)
    assert objectives.bn_statistics_loss(target, target, form="mean_std") == 0


def test_layer_weights_and_the_centres_loss():
    assert objectives.calibration_centre_weights(20) == [0.2] * 9 + [1.1] * 11
    m, v, mu, var = (layers(count=6, seed=s) for s in (10, 20, 30, 40))
    single = [
        objectives.bn_statistics_loss(Statistics.of([m[i]], [v[i]]), Statistics.of([mu[i]], [var[i]])) for i in range(6)
    ]
    weighted = sum(w * x for w, x in zip([0.2, 0.2, 1.1, 1.1, 1.1, 1.1], single, strict=True)) / 6
    found = objectives.calibration_centre_loss(Statistics.of(m, v), Statistics.of(mu, var))
    torch.testing.assert_close(found, weighted)


def test_layered_loss_sees_the_deep_layers_only():
    m, v, mu, var = (layers(count=6, seed=s) for s in (10, 20, 30, 40))
    target = Statistics.of(mu, var)
    loss = objectives.layered_bn_statistics_loss(Statistics.of(m, v), target)
    deep = sum(((m[i] - mu[i]) ** 2).mean() + ((v[i] - var[i]) ** 2).mean() for i in range(2, 6))
    torch.testing.assert_close(loss, deep / 6)
    m[1] = m[1] + 100
    found = Statistics.of(m, v)
    assert objectives.layered_bn_statistics_loss(found, target) == loss
    torch.testing.assert_close(objectives.layered_bn_statistics_loss(found, target, divide_by="released"), loss / 256)


def test_focal_limits():
    logits, labels = normal(16, 10, seed=7), torch.arange(16) % 10
    torch.testing.assert_close(objectives.focal_ce(logits, labels, gamma=0.0), F.cross_entropy(logits, labels))
    each = objectives.focal_ce(logits, labels, beta=3.0, gamma=2.0, reduction="none")
    torch.testing.assert_close(each.mean(), objectives.focal_ce(logits, labels, beta=3.0, gamma=2.0))
    assert each.shape == (16,)
    half = objectives.focal_ce(logits.bfloat16(), labels)
    assert half.dtype == torch.float32


def test_focal_gradient_flows_through_both_factors():
    logits = normal(5, 4, seed=8, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0])
    assert torch.autograd.gradcheck(lambda x: objectives.focal_ce(x, labels, beta=0.1, gamma=0.5), logits)


def test_log_odds_give_the_probability():
    logits, labels = normal(8, 5, seed=9, dtype=torch.float64), torch.arange(8) % 5
    against = objectives.wrong_over_right(logits, labels)
    right = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(torch.sigmoid(against), 1 - right)
    torch.testing.assert_close(F.softplus(against), -right.log())
    assert objectives.wrong_over_right(torch.tensor([[0.0, 300.0]]), torch.tensor([0])).item() == 300


def test_cross_entropy_takes_soft_labels_and_low_precision():
    logits, labels = normal(6, 4, seed=11), torch.arange(6) % 4
    soft = F.one_hot(labels, 4).float()
    torch.testing.assert_close(objectives.cross_entropy(logits, soft), objectives.cross_entropy(logits, labels))
    assert objectives.cross_entropy(logits.half(), labels).dtype == torch.float32


def test_errors_name_the_argument():
    some, fewer = Statistics.of(layers(), layers()), Statistics.of(layers(3), layers(3))
    with pytest.raises(ValueError, match=r"bn_statistics_loss: .* layers, got channels \(2, 3, 4, 5\) and \(2, 3, 4\)"):
        objectives.bn_statistics_loss(some, fewer)
    with pytest.raises(ValueError, match="form must be"):
        objectives.bn_statistics_loss(some, some, form="mean")
    with pytest.raises(ValueError, match=r"weights must have one value per layer \(4\), got 2"):
        objectives.bn_statistics_loss(some, some, weights=[1, 2])
    with pytest.raises(ValueError, match="divide_by must be"):
        objectives.layered_bn_statistics_loss(some, some, divide_by="batch")
    with pytest.raises(ValueError, match="split_index: layers must be at least 2"):
        objectives.split_index(1)
    with pytest.raises(ValueError, match="wrong_over_right: logits must be"):
        objectives.focal_ce(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        objectives.focal_ce(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), gamma=-1)
    with pytest.raises(ValueError, match="reduction must be"):
        objectives.focal_ce(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), reduction="sum")


def test_the_safe_focal_form_keeps_learning_signal_in_the_far_tail():
    logits = torch.tensor([[30.0, 0.0]]).requires_grad_()
    loss = objectives.focal_ce(logits, torch.tensor([0]), gamma=0.5)
    loss.backward()
    # (1-p)^0.5 * -log p = e^-15 * e^-30, slope -1.5 times that
    assert loss.item() == pytest.approx(math.exp(-45), rel=1e-4)
    assert logits.grad[0, 0].item() == pytest.approx(-1.5 * math.exp(-45), rel=1e-4)
