"""Data-free quantization: rewriting keeps the function, and the formulas are what sampling gives.

Broken on purpose, and red: the folded batch norm's eps forgotten; the shift not divided by the factor; factors of a
grouped layer in another order; ReLU6 equalised; constants absorbed into a padded layer; the bias corrected the other
way; the clipped normal's upper bound dropped.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.graph import batch_norms
from zsq_ext.quant.modules import activation_quantizers, calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.tune.dfq import DfqConfig, absorb, check_ranges, correct_biases, dfq, equalise, fold, pairs
from zsq_ext.tune.moments import clipped_normal, moments
from zsq_ext.zoo import small_nets

IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Chain(nn.Module):
    """Everything that can be a pair, and what cannot: grouped and depthwise layers, biases, pooling, ReLU6."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)  # depthwise, with a bias
        self.c, self.nc = nn.Conv2d(8, 12, 1, groups=2, bias=False), nn.BatchNorm2d(12)
        self.d, self.nd = nn.Conv2d(12, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.e, self.ne = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.f, self.nf, self.g = nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)

    def forward(self, x):
        x = F.relu(self.na(self.a(x)))
        x = F.relu(self.nb(self.b(x)))
        x = F.max_pool2d(self.nc(self.c(x)), 2)
        x = F.relu6(self.nd(self.d(x)))
        x = F.relu(self.ne(self.e(x))).mean([2, 3])
        return self.g(F.relu(self.nf(self.f(x))))


PAIRS = [("a", "b"), ("b", "c"), ("c", "d"), ("e", "f"), ("f", "g")]  # d and e have a ReLU6 between them


@pytest.fixture
def chain(nets):
    return capture(nets.seen(Chain, 3, 8, 8), torch.zeros(2, 3, 8, 8)).to(memory_format=torch.channels_last).double()


def named(layer):
    return str(layer.node.args[1].target).removesuffix(".weight")


def widths(pair):
    """The largest weights of the channels between two layers, written out channel by channel."""
    first, second = pair.first.weight, pair.second.weight
    groups = len(first) // second.shape[1]
    out, per = len(second) // groups, second.shape[1]
    of = [second[(i // per) * out : (i // per + 1) * out, i % per].abs().max() for i in range(len(first))]
    return first.flatten(1).abs().amax(1), torch.stack(of)


def test_folding_and_equalising_keep_the_function(chain):
    network = copy.deepcopy(chain)
    with torch.no_grad():
        x = IMAGES.double()
        expected = chain(x)
        layers, normals = fold(network)
        torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)
        for norm in batch_norms(network):
            assert torch.equal(network.get_buffer(norm.mean), torch.zeros_like(network.get_buffer(norm.mean)))
            assert torch.equal(network.get_parameter(norm.weight), torch.ones_like(network.get_parameter(norm.weight)))
            assert ((network.get_buffer(norm.var) + norm.eps - 1).abs() < 1e-15).all()
        joined = pairs(network, layers)
        assert [(named(p.first), named(p.second)) for p in joined] == PAIRS
        before = [widths(pair) for pair in joined]
        assert any((r1 / r2).log().abs().max() > 0.5 for r1, r2 in before)
        equalise(joined, normals, DfqConfig())
        torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)
        for pair in joined:
            torch.testing.assert_close(*widths(pair), rtol=1e-3, atol=0)  # factors within 1e-4 of 1
    assert chain.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(chain.state_dict()[k], v) for k, v in dict(copy.deepcopy(chain).state_dict()).items())


def test_the_moments_follow_the_equalised_network(chain):
    """What equalisation says of a batch norm's output is what its own numbers would say."""
    network = copy.deepcopy(chain)
    with torch.no_grad():
        layers, normals = fold(network)
        before = {name: (mean.clone(), std.clone()) for name, (mean, std) in normals.items()}
        for norm in batch_norms(chain):
            assert torch.equal(before[norm.node][0], chain.get_parameter(norm.bias))
            assert torch.equal(before[norm.node][1], chain.get_parameter(norm.weight).abs())
        shifts = {layer.end: layer.shift.clone() for layer in layers if layer.norm}
        equalise(pairs(network, layers), normals, DfqConfig())
        for layer in layers:
            if layer.norm:
                s = shifts[layer.end] / layer.shift
                torch.testing.assert_close(normals[layer.end][0] * s, before[layer.end][0])
                torch.testing.assert_close(normals[layer.end][1] * s, before[layer.end][1])


def test_a_dead_channel_stays_as_it_is(chain):
    network = copy.deepcopy(chain)
    with torch.no_grad():
        network.get_parameter("c.weight")[3] = 0
        expected = network(IMAGES.double())
        layers, normals = fold(network)
        equalise(pairs(network, layers), normals, DfqConfig())
        torch.testing.assert_close(network(IMAGES.double()), expected, rtol=1e-10, atol=1e-10)
        assert all(value.isfinite().all() for value in network.state_dict().values())


def test_high_biases_move_where_nothing_pads(nets):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.na = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.b, self.nb = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
            self.c, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x):
            x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
            return self.fc(F.relu(self.c(x)).mean([2, 3]))

    network = capture(nets.seen(Net, 3, 8, 8), torch.zeros(2, 3, 8, 8)).double()
    with torch.no_grad():
        for name in ("na", "nb"):
            network.get_parameter(f"{name}.bias").fill_(10.0)  # far above 3 gamma <= 4.5: no value is clipped
        x = IMAGES.double().clamp(-2, 2)
        expected = network(x)
        layers, normals = fold(network)
        joined = pairs(network, layers)
        assert [pair.plain for pair in joined] == [
            True,
            False,
            False,
        ]  # padding; a pool
        before = [pair.first.shift.clone() for pair in joined]
        weight = joined[0].second.weight
        absorb(joined, normals, DfqConfig(absorbed=3.0))
        gamma = normals[joined[0].first.end][1]
        torch.testing.assert_close(before[0] - joined[0].first.shift, 10 - 3 * gamma)
        c = 10 - 3 * gamma
        torch.testing.assert_close(joined[1].first.shift, before[1] + weight.flatten(1) @ c)
        torch.testing.assert_close(normals[joined[0].first.end][0], 3 * gamma)
        # whatever lies below 3 sigma is clipped now: one value in 741, by a fraction of sigma
        torch.testing.assert_close(network(x), expected, rtol=0, atol=0.02 * expected.abs().max().item())
        absorb(joined, normals, DfqConfig(absorbed=3.0))
        torch.testing.assert_close(before[0] - joined[0].first.shift, 10 - 3 * gamma)  # nothing is left to move


@pytest.mark.parametrize("bounds", [(0.0, None), (0.0, 6.0), (-1.0, 2.0)])
def test_the_clipped_normal_is_what_sampling_gives(bounds):
    mean, std = torch.tensor([-3.0, -0.5, 0.0, 1.0, 5.0, 9.0]).double(), torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.1])
    n = 400_000
    draws = mean + std * torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clipped = draws.clamp(*bounds)
    m, v = clipped_normal(mean, std.double(), *bounds)
    error = clipped.std(0) / n**0.5
    assert ((clipped.mean(0) - m).abs() <= 5 * error + 1e-9).all()
    fourth = (clipped - clipped.mean(0)).pow(4).mean(0)
    assert ((clipped.var(0) - v).abs() <= 5 * (fourth / n).sqrt() + 1e-9).all()


def test_moments_through_sums_and_clips(nets):
    network = capture(nets.residual(), torch.zeros(2, 3, 8, 8)).double()
    _, normals = fold(network)
    known = moments(network, normals, 6.0, (-2.0, 2.5))
    assert (known["x"].lo.min(), known["x"].hi.max()) == (-2.0, 2.5)
    one, two = known["relu_1"], known[batch_norms(network)[-1].node]
    torch.testing.assert_close(known["add"].mean, one.mean + two.mean)
    torch.testing.assert_close(known["add"].var, one.var + two.var)
    assert (known["add"].lo >= one.lo + two.lo).all()
    assert (known["relu"].lo >= 0).all()
    beta, gamma = normals[batch_norms(network)[0].node]
    torch.testing.assert_close(known["relu"].hi, (beta + 6 * gamma).clamp_min(0))
    assert known["flatten"] is known["relu_3"]  # a pooled channel keeps its mean and its bounds


def test_biases_are_corrected_by_what_rounding_adds(chain):
    """On inputs with the moments that the batch norms name, the mean of each layer's output comes back."""
    network = copy.deepcopy(chain)
    with torch.no_grad():
        layers, normals = fold(network)
        student = prepare(network, QConfig(2, None))
        known = moments(network, normals, 6.0)
        old = {name: value.clone() for name, value in student.state_dict().items()}
        correct_biases(student, layers, known)
        by_name = {named(layer): layer for layer in layers}
        layer = by_name["d"]  # 3 x 3 without padding, behind c's batch norm and a pool
        x = known["max_pool2d"]
        n = 40_000
        draws = x.mean + x.var.sqrt() * torch.randn(n, 12, generator=torch.Generator().manual_seed(0)).double()
        draws = draws[:, :, None, None].expand(n, 12, 3, 3)
        rounded = student.get_submodule("quantizers.d_weight")(layer.weight)
        error = (F.conv2d(draws, rounded) - F.conv2d(draws, layer.weight))[:, :, 0, 0]
        moved = old[layer.norm.bias] - student.state_dict()[layer.norm.bias]
        assert moved.abs().max() > 0.05
        assert ((error.mean(0) - moved).abs() <= 5 * error.std(0) / n**0.5).all()
        assert torch.equal(old["na.bias"], student.state_dict()["na.bias"])  # the image's mean is 0


def badly_scaled(nets, seed=0):
    """A network whose channels differ by up to 1000 times between layers, as depthwise networks' do."""
    net = nets.seen(Chain, 3, 8, 8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm, conv in ((net.na, net.b), (net.nb, net.c), (net.nc, net.d), (net.ne, net.f)):
            s = torch.logspace(-1.5, 1.5, len(norm.weight))[torch.randperm(len(norm.weight), generator=generator)]
            norm.weight.mul_(s)
            norm.bias.mul_(s)
            groups = len(s) // conv.weight.shape[1]
            spread = s.view(groups, 1, -1).expand(groups, len(conv.weight) // groups, -1).reshape(len(conv.weight), -1)
            conv.weight.div_(spread.view(*spread.shape, *[1] * (conv.weight.ndim - 2)))
    return net


@pytest.mark.parametrize(("bits", "better"), [(8, 2.0), (6, 2.0)])
def test_badly_scaled_channels_quantize_well(nets, bits, better):
    """Against min-max on the same images, and with ranges from the batch norms alone."""
    teacher = capture(badly_scaled(nets), torch.zeros(2, 3, 8, 8))
    config = QConfig(bits, bits, "all_layers", a_range="minmax")
    plain = prepare(teacher, config)
    with torch.no_grad():
        expected = teacher(IMAGES)
        with calibrating(plain):
            plain(IMAGES)
        with_images = dfq(teacher, config, images=[IMAGES])
        errors = [(net(IMAGES) - expected).norm() / expected.norm() for net in (plain, with_images)]
        assert errors[1] < errors[0] / better
        config = replace(config, placement="academic")
        plain, without = prepare(teacher, config), dfq(teacher, config)
        with calibrating(plain):
            plain(IMAGES)
        errors = [(net(IMAGES) - expected).norm() / expected.norm() for net in (plain, without)]
        assert errors[1] < errors[0]


def test_nothing_of_the_teacher_changes_and_the_state_loads(nets):
    model = nets.residual()
    teacher = capture(model, torch.zeros(2, 3, 8, 8))
    own = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = dfq(teacher, QConfig(8, 8))
    assert all(torch.equal(value, own[name]) for name, value in teacher.state_dict().items())
    fresh = prepare(capture(nets.residual(seed=3), torch.zeros(2, 3, 8, 8)), QConfig(8, 8))
    fresh.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(IMAGES), student(IMAGES))
        agreement = (student(IMAGES).argmax(1) == teacher(IMAGES).argmax(1)).float().mean()
    assert agreement > 0.9
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_small"])
@pytest.mark.parametrize("placement", ["after_relu", "academic"])
def test_the_embedded_networks_need_no_images(name, placement):
    torch.manual_seed(0)
    teacher = capture(getattr(small_nets, name)().eval(), torch.zeros(2, 3, 32, 32))
    student = dfq(teacher, QConfig(8, 8, placement), image_range=(-3.0, 3.0))
    assert all(q.batches == 1 for q in activation_quantizers(student))


def test_what_no_batch_norm_tells_is_refused(nets):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.fc(F.relu(x * x).mean([2, 3]))

    teacher = capture(Gated().eval(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^dfq: images must be given where .* got none for 'model:relu'"):
        dfq(teacher, QConfig(8, 8))
    assert dfq(teacher, QConfig(8, 8), images=[IMAGES]) is not None
    network = capture(nets.residual(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^dfq: images must be given where .* got none for 'output'"):
        dfq(network, QConfig(8, 8, "all_layers"))  # the logits
    with pytest.raises(ValueError, match=r"^DfqConfig: sigmas must be positive, got 0"):
        DfqConfig(sigmas=0)
    with pytest.raises(ValueError, match=r"^dfq: images must be given where .* got none for 'model:relu'"):
        check_ranges(teacher, QConfig(8, 8))
    check_ranges(teacher, QConfig(8, None))
