"""Image objectives: conditioning, forms the specifications do not print, and errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_ext.synth import objectives


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 5, 4), (1, 3, 1, 1), (2, 3, 2, 2, 2)])
def test_statistics_of_any_rank(shape):
    u = normal(*shape, seed=1)
    axes = [0, *range(2, len(shape))]
    for centre in (None, torch.tensor([0.5, -1.0, 2.0])):
        mean, variance = objectives.channel_statistics(u, centre)
        torch.testing.assert_close(mean, u.mean(axes))
        torch.testing.assert_close(variance, u.var(axes, correction=0), rtol=1e-5, atol=1e-6)


def test_the_centre_keeps_the_digits_of_a_small_variance():
    u = 1000 + 1e-2 * normal(64, 4, 8, 8, seed=2)
    exact = u.double().var((0, 2, 3), correction=0)
    centred = objectives.channel_statistics(u, torch.full((4,), 1000.0))[1]
    torch.testing.assert_close(centred.double(), exact, rtol=1e-5, atol=0)
    plain = objectives.channel_statistics(u)[1]
    assert ((plain.double() - exact).abs() > exact).any()


def test_a_constant_channel_has_no_negative_variance_and_a_finite_gradient():
    # among a hundred levels some have S2 / n below (S1 / n)^2 by rounding
    u = torch.linspace(50, 150, 100)[:, None, None].expand(32, 100, 7, 7).clone().requires_grad_()
    mean, variance = objectives.channel_statistics(u)
    assert (variance >= 0).all()
    targets = [torch.zeros(100)], [torch.ones(100)]
    objectives.bn_statistics_loss([mean], [variance], *targets, form="mean_std").backward()
    assert torch.isfinite(u.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_fp32(dtype):
    u = (normal(64, 2, 32, 32, seed=3) * 100).to(dtype)
    mean, variance = objectives.channel_statistics(u)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(variance.double(), u.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_sums_add_across_batches():
    a, b = normal(4, 3, 5, 5, seed=4), normal(9, 3, 5, 5, seed=5)
    centre = torch.tensor([0.1, 0.2, 0.3])
    sums = [objectives.channel_sums(u, centre) for u in (a, b)]
    s1, s2, count = (x + y for x, y in zip(*sums, strict=True))
    both = objectives.statistics_of_sums(s1, s2, count, centre)
    whole = objectives.channel_statistics(torch.cat([a, b]), centre)
    torch.testing.assert_close(both, whole)


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_merging_is_order_free_and_exact(sizes, seed):
    parts = [normal(n, 3, seed=seed + i, dtype=torch.float64) + i for i, n in enumerate(sizes)]
    statistics = [objectives.channel_statistics(p) for p in parts]
    means, variances = zip(*statistics, strict=True)
    mean, variance = objectives.merge_statistics(means, variances, sizes)
    whole = torch.cat(parts)
    torch.testing.assert_close(mean, whole.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variance, whole.var(0, correction=0), rtol=1e-10, atol=1e-12)
    back = objectives.merge_statistics(means[::-1], variances[::-1], sizes[::-1])
    torch.testing.assert_close(back, (mean, variance))


def layers(count=4, seed=6):
    return [normal(2 + i, seed=seed + i).abs() for i in range(count)]


def test_bn_loss_forms_by_hand():
    m, v, mu, var = (layers(seed=s) for s in (10, 20, 30, 40))
    by_hand = sum(((a - b) ** 2).mean() + ((c - d) ** 2).mean() for a, b, c, d in zip(m, mu, v, var, strict=True)) / 4
    torch.testing.assert_close(objectives.bn_statistics_loss(m, v, mu, var), by_hand)
    by_hand = 0
    for a, b, c, d in zip(m, mu, v, var, strict=True):
        by_hand += ((a - b) ** 2).sum() + (((c + 1e-6).sqrt() - (d + 1e-6).sqrt()) ** 2).sum()
    torch.testing.assert_close(objectives.bn_statistics_loss(m, v, mu, var, form="mean_std"), by_hand / 4)
    assert objectives.bn_statistics_loss(mu, var, mu, var, form="mean_std") == 0


def test_layer_weights_and_the_centres_loss():
    assert objectives.calibration_centre_weights(20) == [0.2] * 9 + [1.1] * 11
    m, v, mu, var = (layers(count=6, seed=s) for s in (10, 20, 30, 40))
    single = [
        objectives.bn_statistics_loss(m[i : i + 1], v[i : i + 1], mu[i : i + 1], var[i : i + 1]) for i in range(6)
    ]
    weighted = sum(w * x for w, x in zip([0.2, 0.2, 1.1, 1.1, 1.1, 1.1], single, strict=True)) / 6
    torch.testing.assert_close(objectives.calibration_centre_loss(m, v, mu, var), weighted)


def test_layered_loss_sees_the_deep_layers_only():
    m, v, mu, var = (layers(count=6, seed=s) for s in (10, 20, 30, 40))
    loss = objectives.layered_bn_statistics_loss(m, v, mu, var)
    deep = sum(((m[i] - mu[i]) ** 2).mean() + ((v[i] - var[i]) ** 2).mean() for i in range(2, 6))
    torch.testing.assert_close(loss, deep / 6)
    m[1] = m[1] + 100
    assert objectives.layered_bn_statistics_loss(m, v, mu, var) == loss
    torch.testing.assert_close(objectives.layered_bn_statistics_loss(m, v, mu, var, divide_by="released"), loss / 256)


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
    m = layers()
    with pytest.raises(ValueError, match=r"bn_statistics_loss: statistics and targets must .* got 4, 4, 3, 4"):
        objectives.bn_statistics_loss(m, m, m[:3], m)
    with pytest.raises(ValueError, match="got 0, 0, 0, 0"):
        objectives.bn_statistics_loss([], [], [], [])
    with pytest.raises(ValueError, match="form must be"):
        objectives.bn_statistics_loss(m, m, m, m, form="mean")
    with pytest.raises(ValueError, match=r"weights must have one value per layer \(4\), got 2"):
        objectives.bn_statistics_loss(m, m, m, m, weights=[1, 2])
    with pytest.raises(ValueError, match="divide_by must be"):
        objectives.layered_bn_statistics_loss(m, m, m, m, divide_by="batch")
    with pytest.raises(ValueError, match="split_index: layers must be at least 2"):
        objectives.split_index(1)
    with pytest.raises(ValueError, match="channel_sums: u must be a non-empty"):
        objectives.channel_statistics(torch.zeros(3))
    with pytest.raises(ValueError, match="merge_statistics: counts must be positive, got 0"):
        objectives.merge_statistics(m[:1], m[:1], [0])
    with pytest.raises(ValueError, match="must have the same length"):
        objectives.merge_statistics(m, m, [1])
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
