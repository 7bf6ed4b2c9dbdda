"""What a batch adds to a set's statistics, and the running totals over the batches.

Each of these turned a test red: a biased spread of the last batch norm, a division by zero where an image has one place
there, the first batch norm for the last, a mean of the images' sums for their sum, layer 0 with a variance of 0, a
share of 1 / batches for unequal batches, totals in fp32, a replacement that forgets to take the old sums out, or
rounds.
"""

import pytest
import torch
from torch import nn

from zsq_ext.quant.capture import capture
from zsq_ext.quant.structure import heads
from zsq_ext.synth.distance import ImageFigures, figures
from zsq_ext.synth.objectives import Statistics
from zsq_ext.synth.set_objectives import set_statistics_loss, stretching_loss
from zsq_ext.synth.whole_set import RunningTotals, SetTeacher

EPS = 2**-24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def hooked(net, x):
    """(logits, what enters each batch norm) of the caller's network."""
    inputs = []
    handles = [norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for norm in net.norms]
    logits = net(x)
    for handle in handles:
        handle.remove()
    return logits, inputs


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("tapped", [False, True])
def test_a_batch_shows_its_sums_its_heads_and_its_last_layer(teacher, nets, images, per_image, tapped):
    names = heads(teacher) if tapped else []
    watched = SetTeacher(teacher, heads=names, per_image=per_image)
    with torch.no_grad():
        seen = watched.observe(images)
        logits, inputs = hooked(nets.residual(), images)
    axes = (2, 3) if per_image else (0, 2, 3)
    tensors = [images, *inputs]
    stored = [torch.zeros(3), *(norm.running_mean for norm in nets.residual().norms)]
    shifted = [u - mean[:, None, None] for u, mean in zip(tensors, stored, strict=True)]
    expected = torch.stack([torch.cat([f(u).sum(axes) for u in shifted], -1) for f in (torch.clone, torch.square)])
    assert seen.sums.shape == ((2, 6, 3 + 4 * 8) if per_image else (2, 3 + 4 * 8))
    # a sum of up to 384 values of size 1 to 10, and the convolution's own roundings behind it
    torch.testing.assert_close(seen.sums, expected, rtol=1e-4, atol=2e-3)
    assert watched.target.channels == (3, 8, 8, 8, 8)
    torch.testing.assert_close(watched.places, torch.cat([torch.full((11,), 64.0), torch.full((24,), 16.0)]))
    if not tapped:
        assert seen.heads == ()
        assert seen.last is None
        return
    torch.testing.assert_close(seen.heads[0], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.last.mean, inputs[-1].mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.last.variance, inputs[-1].var((2, 3)), rtol=1e-4, atol=1e-5)  # unbiased
    assert torch.equal(watched.last.mean, nets.residual().norms[-1].running_mean)
    assert torch.equal(watched.last.variance, nets.residual().norms[-1].running_var)


def test_the_image_is_a_layer_of_its_own(teacher):
    target = SetTeacher(teacher).target
    assert torch.equal(target.mean[:3], torch.zeros(3))
    assert torch.equal(target.variance[:3], torch.ones(3))


def test_statistics_of_all_images_in_one_batch_are_the_datas(teacher, nets, images):
    watched = SetTeacher(teacher)
    with torch.no_grad():
        found = watched.statistics(watched.observe(images).sums.double() / len(images))
        _, inputs = hooked(nets.residual(), images)
    tensors = [images, *inputs]
    torch.testing.assert_close(
        found.mean.float(), torch.cat([u.mean((0, 2, 3)) for u in tensors]), rtol=1e-4, atol=1e-5
    )
    variances = torch.cat([u.var((0, 2, 3), correction=0) for u in tensors])
    torch.testing.assert_close(found.variance.float(), variances, rtol=1e-4, atol=1e-5)


class OnePlace(nn.Module):
    """A last batch norm over vectors: an image has one value of each channel there, and no spread."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.hidden, self.last, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.last(self.hidden(x))))


def test_a_last_layer_of_one_place_has_no_spread_and_no_nan(nets, images):
    module = capture(nets.seen(OnePlace, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    watched = SetTeacher(module, heads=heads(module))
    x = images.requires_grad_()
    seen = watched.observe(x)
    assert torch.equal(seen.last.variance, torch.zeros(6, 6))
    (grad,) = torch.autograd.grad(stretching_loss(seen.heads, seen.last, watched.last), x)
    images.requires_grad_(False)
    assert grad.isfinite().all()


# Running totals


def drawn(width, generator):
    return 100 * torch.randn(2, width, generator=generator)


@pytest.mark.parametrize("equal", [False, True])
def test_totals_are_a_full_sum_after_a_thousand_replacements(equal):
    sizes, generator = [5, 5, 5, 2], torch.Generator().manual_seed(0)
    totals, held = RunningTotals(sizes, 7, CPU, equal=equal), [torch.zeros(2, 7)] * 4
    for _ in range(1000):
        index = int(torch.randint(4, (), generator=generator))
        held[index] = drawn(7, generator)
        totals.replace(index, held[index])
    shares = [1 / (4 * size) if equal else 1 / 17 for size in sizes]
    expected = sum(share * sums.double() for share, sums in zip(shares, held, strict=True))
    # each replacement rounds twice, to 2^-53 of at most 400 / 2
    torch.testing.assert_close(totals.total, expected, rtol=0, atol=2000 * 2**-53 * 200)
    new = drawn(7, generator)
    swapped = expected + shares[2] * (new.double() - held[2].double())
    torch.testing.assert_close(totals.with_batch(2, new), swapped, rtol=0, atol=2001 * 2**-53 * 200)
    torch.testing.assert_close(totals.total, expected, rtol=0, atol=2000 * 2**-53 * 200)  # asking changes nothing


def test_only_the_visited_batch_carries_a_gradient():
    totals, sums = RunningTotals([3, 1], 4, CPU), torch.ones(2, 4, requires_grad=True)
    totals.replace(0, sums)
    assert not totals.total.requires_grad
    assert not totals.table.requires_grad
    (grad,) = torch.autograd.grad(totals.with_batch(1, sums).sum(), sums)
    torch.testing.assert_close(grad, torch.full((2, 4), 0.25))


def test_a_set_of_one_batch_is_exact():
    totals, generator = RunningTotals([3], 5, CPU), torch.Generator().manual_seed(0)
    for _ in range(50):
        sums = drawn(5, generator)
        assert torch.equal(totals.with_batch(0, sums), sums.double() * (1 / 3))
        totals.replace(0, sums)
        assert torch.equal(totals.total, totals.table[0])


@pytest.mark.parametrize("sizes", [[1] * 6, [4, 2], [6]])
def test_fresh_statistics_give_every_batch_the_gradient_of_the_whole_set(teacher, images, sizes):
    """Acceptance 6, with unequal batches too (weighted by their images): Nb = 6, Nb = 2 and Nb = 1."""
    watched = SetTeacher(teacher)

    def loss(found: Statistics):
        return set_statistics_loss(found, watched.target)

    x = images.clone().requires_grad_()
    (whole,) = torch.autograd.grad(loss(watched.statistics(watched.observe(x).sums.double() / 6)), x)
    totals, batches = RunningTotals(sizes, 35, CPU), images.split(sizes)
    with torch.no_grad():
        for i, batch in enumerate(batches):
            totals.replace(i, watched.observe(batch).sums)
    parts = []
    for i, batch in enumerate(batches):
        batch = batch.clone().requires_grad_()
        found = watched.statistics(totals.with_batch(i, watched.observe(batch).sums))
        parts += torch.autograd.grad(loss(found), batch)
    # a convolution adds in another order for another batch: 72 products forward and back in each of four layers
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=4 * 2 * 72 * EPS * whole.abs().max().item())


# Distances and ranges, for the report


def test_distances_of_a_set(teacher, nets, images):
    rows = figures(teacher, images, batch=4).layers
    with torch.no_grad():
        _, inputs = hooked(nets.residual(), images)
    assert [row.layer for row in rows] == [f"norms.{i}" for i in range(4)]
    for row, u, norm in zip(rows, inputs, nets.residual().norms, strict=True):
        sigma = norm.running_var.sqrt()
        shift = ((u.mean((0, 2, 3)) - norm.running_mean) / sigma).square().mean().sqrt()
        spread = (u.std((0, 2, 3), correction=0) / sigma - 1).square().mean().sqrt()
        assert row.mean == pytest.approx(shift.item(), rel=1e-3)
        assert row.std == pytest.approx(spread.item(), rel=1e-3)


def test_logit_ranges(teacher, images):
    with torch.no_grad():
        logits = teacher(images)
    ranges = torch.tensor(figures(teacher, images, batch=4).logit_ranges)
    torch.testing.assert_close(ranges, logits.amax(1) - logits.amin(1), rtol=1e-4, atol=1e-5)
    assert ranges.shape == (6,)


def test_a_network_without_batch_norms_has_ranges_and_one_without_classes_distances(nets, images):
    bare = capture(nets.vgg(norm=False), torch.zeros(2, 3, 8, 8))
    found = figures(bare, images)
    assert found.layers == ()
    assert len(found.logit_ranges) == 6
    maps = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.zeros(2, 3, 8, 8))
    found = figures(maps, images)
    assert [row.layer for row in found.layers] == ["1"]
    assert found.logit_ranges == ()
    assert figures(capture(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.zeros(2, 3, 8, 8)), images) == ImageFigures()
