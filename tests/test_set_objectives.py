"""DGH's two loss terms: closed-form gradients in fp64, what each reads, and what switches it off.

Each of these turned a test red: the variance matched instead of the standard deviation, 1 / L for 1 / (L + 1), k on the
mean, amax for max, rows of images summed, hinges counted once for all heads, a mean over heads.
"""

import pytest
import torch
from torch import Tensor

from zsq_ext.ops import channel_sums, statistics_of
from zsq_ext.synth.objectives import Statistics
from zsq_ext.synth.set_objectives import set_statistics_loss, stretching_loss

CHANNELS = (3, 5, 2)  # the image and two batch norms


def normal(*shape, seed=0, offset=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def target_of(seed=9):
    width = sum(CHANNELS)
    return Statistics(normal(width, seed=seed), normal(width, seed=seed + 1).exp(), CHANNELS)


def inputs(batches):
    """[batch][layer] -> (B, C_l, H, W), every layer with a size of its own."""
    return [
        [normal(4, c, 6 - i, 3, seed=10 * b + i, offset=0.5) for i, c in enumerate(CHANNELS)] for b in range(batches)
    ]


def of_set(batches):
    """The set's statistics by the specification's own words: means and second moments, averaged over the batches."""
    means = [[x.mean((0, 2, 3)) for x in batch] for batch in batches]
    squares = [[x.square().mean((0, 2, 3)) for x in batch] for batch in batches]
    mean = torch.cat([torch.stack(layer).mean(0) for layer in zip(*means, strict=True)])
    second = torch.cat([torch.stack(layer).mean(0) for layer in zip(*squares, strict=True)])
    return Statistics(mean, second - mean.square(), CHANNELS)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(("k", "image_weight"), [(10.0, 1.0), (1.0, 3.0)])
def test_the_statistics_loss_and_its_gradient_are_the_closed_form(batches, k, image_weight):
    """Spec 2.2, with and without other batches in the average; only the first batch carries a gradient."""
    data, target = inputs(batches), target_of()
    first = [x.requires_grad_() for x in data[0]]
    found = of_set(data)
    loss = set_statistics_loss(found, target, std_factor=k, image_weight=image_weight)
    got = torch.autograd.grad(loss, first)
    layers, expected = len(CHANNELS), 0.0
    parts = (part.detach().split(CHANNELS) for part in (*found[:2], *target[:2]))
    for i, (x, grad, m, v, mu, var) in enumerate(zip(first, got, *parts, strict=True)):
        weight, c, n = (image_weight if i == 0 else 1.0) / layers, len(mu), x[:, 0].numel()
        std, sg = (v + 1e-6).sqrt(), (var + 1e-6).sqrt()
        expected += weight * ((mu - m).square().sum() + k * (sg - std).square().sum()) / c
        slope = k * (std - sg) / std
        form = (m - mu)[:, None, None] + slope[:, None, None] * (x.detach() - m[:, None, None])
        torch.testing.assert_close(grad, 2 * weight / (c * batches * n) * form, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-13, atol=0)


def test_rows_of_images_are_averaged():
    target = target_of()
    rows = Statistics(normal(4, 10), normal(4, 10, seed=1).exp(), CHANNELS)
    each = [set_statistics_loss(Statistics(m, v, CHANNELS), target) for m, v in zip(*rows[:2], strict=True)]
    torch.testing.assert_close(set_statistics_loss(rows, target), torch.stack(each).mean())


def test_the_loss_is_zero_at_its_target_and_a_dead_channel_has_a_finite_slope():
    target = target_of()
    assert set_statistics_loss(target, target) == 0
    flat = Statistics(target.mean, torch.zeros_like(target.variance).requires_grad_(), CHANNELS)
    (slope,) = torch.autograd.grad(set_statistics_loss(flat, target), flat.variance)
    assert slope.isfinite().all()


def test_other_layers_are_refused():
    other = target_of()._replace(channels=(3, 7))
    with pytest.raises(ValueError, match=r"set_statistics_loss: statistics and targets must have the same layers"):
        set_statistics_loss(target_of(), other)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_shifted_sums_keep_the_variance_of_a_channel_far_from_zero(mean):
    """Data 10,000 standard deviations away from zero: E[x^2] - E[x]^2 in fp32 would have no digit left."""
    x = normal(64, 4, 8, 8, offset=mean)
    stored = torch.full((4,), mean)
    found = statistics_of(*channel_sums(x.float(), stored), 64 * 64, stored)
    # 4096 values, each rounded to half an ulp of 1e4 (5e-4) at most, in a variance of 1
    torch.testing.assert_close(found[1].double(), x.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    assert x.half().square().isinf().any() == (mean > 0)  # what the released code's fp16 squares would do


# The output term


def last_of(u: Tensor) -> Statistics:
    return Statistics(u.mean((2, 3)), u.var((2, 3)), (u.shape[1],))


def by_hand(heads, u, target, margin=0.5):
    """Spec 2.4, image by image."""
    sigma, total = (target.variance + 1e-6).sqrt(), 0.0
    for z in heads:
        for i in range(len(u)):
            m, d = u[i].mean((1, 2)), (u[i].var((1, 2)) + 1e-6).sqrt()
            off = [(a - b).square().sum().item() / len(b) for a, b in ((m, target.mean), (d, sigma))]
            total += (-(z[i].max() - z[i].min()).item() + sum(max(0.0, x - margin) for x in off)) / len(u)
    return total


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_the_stretching_loss_is_the_specifications(heads, spread):
    """With images inside the band of both hinges, and far outside."""
    u, target = normal(4, 6, 5, 5) * spread, Statistics(normal(6, seed=1) * 0.1, torch.full((6,), 0.5), (6,))
    outputs = [normal(4, 7, seed=2), normal(4, 2, 3, 3, seed=3)][:heads]
    loss = stretching_loss(outputs, last_of(u), target)
    assert loss.item() == pytest.approx(by_hand(outputs, u, target), rel=1e-12)
    bare = stretching_loss(outputs, last_of(u), target, margin=None)
    ranges = sum((z.flatten(1).amax(1) - z.flatten(1).amin(1)).mean() for z in outputs)
    assert bare.item() == pytest.approx(-ranges.item())
    assert (loss > bare) == (spread > 1)  # the hinges pull outside their band, and nowhere inside


def test_the_range_has_a_gradient_at_two_places_of_each_image_alone():
    """Ties too: one of the equal values takes it all."""
    z = torch.tensor([[0.0, 2.0, 2.0, -1.0], [5.0, 1.0, 1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    u, target = normal(2, 3, 4, 4), Statistics(torch.zeros(3), torch.ones(3), (3,))
    (grad,) = torch.autograd.grad(stretching_loss([z], last_of(u), target), z)
    assert sorted(grad[0].tolist()) == sorted(grad[1].tolist()) == [-0.5, 0, 0, 0.5]
    assert grad[0].tolist()[3] == 0.5
    assert grad[1].tolist()[0] == -0.5


def test_the_hinges_gradient_is_zero_inside_their_band_and_that_of_the_distance_outside():
    target = Statistics(torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), (4,))
    z = normal(1, 3)
    for shift, active in ((0.5, False), (1.0, True)):  # 0.25 and 1 as mean squares
        last = Statistics(torch.full((1, 4), shift, dtype=torch.float64).requires_grad_(), target.variance[None], (4,))
        (grad,) = torch.autograd.grad(stretching_loss([z], last, target), last.mean)
        torch.testing.assert_close(grad, torch.full_like(grad, 2 * shift / 4 if active else 0.0))


def test_a_constant_image_has_a_finite_gradient():
    u = torch.zeros(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    target = Statistics(torch.zeros(3), torch.full((3,), 4.0), (3,))
    (grad,) = torch.autograd.grad(stretching_loss([normal(2, 3)], last_of(u), target), u)
    assert grad.isfinite().all()


def test_no_head_is_refused():
    target = Statistics(torch.zeros(3), torch.ones(3), (3,))
    with pytest.raises(ValueError, match="stretching_loss: heads must hold at least one output, got none"):
        stretching_loss([], target, target)
