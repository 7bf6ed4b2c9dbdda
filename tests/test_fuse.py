"""A fused network computes what it did: values, gradients of everything, and statistics; taps stay taps."""

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same
from torch import nn

from zsq_ext.ops import bn_act, channel_range
from zsq_ext.quant import fuse as fusing
from zsq_ext.quant import ranges
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import ACTIVATION_RANGES, QConfig
from zsq_ext.quant.fuse import bn_act_quantized, fuse, fuse_with_statistics
from zsq_ext.quant.graph import BATCH_NORMS, batch_norms, calls, with_taps
from zsq_ext.quant.modules import activation_quantizers, calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.quant.structure import feature_maps
from zsq_ext.zoo.small_nets import mobilenet_small, resnet20
from zsq_ext.zoo.torchvision_nets import mobilenet_v2, resnet18, resnet50


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(model, seed=0):
    """With batch norms that have seen something, whatever the model was initialised with."""
    rng = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                layer.running_mean.normal_(0, 0.3, generator=rng)
                layer.running_var.uniform_(0.5, 2, generator=rng)
                if layer.affine:
                    layer.weight.uniform_(-1.5, 1.5, generator=rng)
                    layer.bias.normal_(0, 0.5, generator=rng)
    return model


def ops_of(fused):
    """(act, whether a residual is added) of every bn_act, in execution order."""
    nodes = [node for node in fused.graph.nodes if node.target is bn_act]
    return [(node.kwargs["act"], node.kwargs["residual"] is not None) for node in nodes]


class Net(nn.Module):
    """What a test does with two convolutions and two batch norms; those that it leaves alone are not there."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.conv, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 5)
        used = set()
        for layer in self.children():
            layer.register_forward_hook(lambda layer, *_: used.add(layer))
        self(torch.zeros(2, 3, 6, 6))
        for name, layer in list(self.named_children()):
            layer._forward_hooks.clear()
            if layer not in used:
                delattr(self, name)

    def forward(self, x):
        return self.head(self.run(self, x).mean((2, 3)))


def shortcut(net, x):
    return F.relu(net.bn(net.conv(x)) + net.other(x))


# what a network does, and the ops that are left of its batch norms
WAYS = {
    "relu": (lambda n, x: F.relu(n.bn(n.conv(x))), [("relu", False)]),
    "in place": (lambda n, x: F.relu_(n.bn(n.conv(x))), [("relu", False)]),
    "relu6": (lambda n, x: F.relu6(n.bn(n.conv(x))), [("relu6", False)]),
    "clamp that is relu6": (lambda n, x: n.bn(n.conv(x)).clamp(0, 6), [("relu6", False)]),
    "another clamp": (lambda n, x: n.bn(n.conv(x)).clamp(0, 1), [("none", False)]),
    "silu": (lambda n, x: F.silu(n.bn(n.conv(x))), [("silu", False)]),
    "hardswish": (lambda n, x: F.hardswish(n.bn(n.conv(x))), [("hardswish", False)]),
    "leaky": (lambda n, x: F.leaky_relu(n.bn(n.conv(x))), [("none", False)]),
    "nothing": (lambda n, x: n.bn(n.conv(x)), [("none", False)]),
    "no affine part": (lambda n, x: F.relu(n.bn2(n.conv(x))), [("relu", False)]),
    "shortcut": (shortcut, [("relu", True)]),
    "shortcut first": (lambda n, x: F.relu(n.other(x) + n.bn(n.conv(x))), [("relu", True)]),
    "shortcut without activation": (lambda n, x: n.bn(n.conv(x)) + n.other(x), [("none", True)]),
    "two batch norms": (lambda n, x: F.relu(n.bn(n.conv(x)) + n.bn2(n.other(x))), [("none", False), ("relu", True)]),
    "a scaled shortcut": (lambda n, x: torch.add(n.bn(n.conv(x)), n.other(x), alpha=2), [("none", False)]),
    "a broadcast shortcut": (lambda n, x: n.bn(n.conv(x)) + n.other(x).mean((2, 3), keepdim=True), [("none", False)]),
    "a number": (lambda n, x: F.relu(n.bn(n.conv(x)) + 1.0), [("none", False)]),
    "twice itself": (lambda n, x: (lambda v: F.relu(v + v))(n.bn(n.conv(x))), [("none", False)]),
    "read twice": (lambda n, x: (lambda v: F.relu(v) + v)(n.bn(n.conv(x))), [("none", False)]),
    "a shortcut of itself": (lambda n, x: (lambda v: F.relu(v + n.other(x)) * v)(n.bn(n.conv(x))), [("none", False)]),
    "the same one twice": (lambda n, x: F.relu(n.bn(n.conv(x))) + n.bn(n.other(x)), [("relu", False), ("none", True)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_follow_a_batch_norm(way):
    """Values and gradients in double precision, where a few units in the last place are 1e-15."""
    run, left = WAYS[way]
    module = capture(trained(Net(run)).double(), normal(2, 3, 6, 6))
    for parameter in module.parameters():
        parameter.requires_grad_()
    fused = fuse(module)
    assert ops_of(fused) == left
    assert not calls(fused, BATCH_NORMS)
    x = normal(4, 3, 6, 6, seed=1).requires_grad_()
    wanted = [x, *module.parameters()]
    found = []
    for network in (module, fused):
        y = network(x)
        grads = torch.autograd.grad((y * normal(*y.shape, seed=2)).sum(), wanted, allow_unused=True)
        found.append([y, *(g for g in grads if g is not None)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


# how to build it, its input, and how many shortcuts join a batch norm
NETWORKS = {
    "resnet20": (lambda: resnet20(10), (3, 32, 32), 9),
    "mobilenet_small": (lambda: mobilenet_small(10), (3, 32, 32), 6),
    "resnet18": (lambda: resnet18(num_classes=10), (3, 32, 32), 8),
    "resnet50": (lambda: resnet50(num_classes=10), (3, 32, 32), 16),
    "mobilenet_v2": (lambda: mobilenet_v2(num_classes=10), (3, 32, 32), 10),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name):
    """In float32 every normalised value moves by at most four roundings of its largest term, 2^-22 of it, and a later
    layer neither forgets nor, to within its gain, amplifies that: the logits agree to 2^-22 a layer."""
    build, shape, residuals = NETWORKS[name]
    torch.manual_seed(0)
    module = capture(trained(build()), torch.zeros(2, *shape))
    fused = fuse(module)
    norms, ops = batch_norms(module), ops_of(fused)
    assert len(ops) == len(norms)
    assert sum(residual for _, residual in ops) == residuals
    for layout in (torch.contiguous_format, torch.channels_last):
        x = normal(4, *shape, seed=3, dtype=torch.float32).contiguous(memory_format=layout)
        want, got = module(x), fused(x)
        error = (got - want).norm() / want.norm()
        assert error < len(norms) * 2**-22
        assert not torch.isnan(error)


def test_parameters_are_shared():
    module = capture(trained(resnet20(10)), torch.zeros(2, 3, 32, 32))
    fused = fuse(module)
    assert {p.data_ptr() for p in fused.parameters()} == {p.data_ptr() for p in module.parameters()}


@pytest.mark.parametrize("statistics", [False, True])
def test_the_module_itself_is_not_touched(statistics):
    module = capture(trained(resnet20(10)), torch.zeros(2, 3, 32, 32))
    before = module.code
    (fuse_with_statistics if statistics else fuse)(module)
    assert module.code == before
    assert len(calls(module, BATCH_NORMS)) == 21


def test_what_is_tapped_is_left_to_be_seen():
    """Feature maps are batch norms before the shortcut, and inputs of batch norms; both in the middle of a chain."""
    module = capture(trained(resnet20(10)).double(), torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    names = [*feature_maps(module), *(norm.input for norm in batch_norms(module)[:3])]
    tapped = with_taps(module, names)
    x = normal(2, 3, 32, 32)
    (want, taps), (got, fused_taps) = tapped(x), fuse(tapped)(x)
    for one, two in zip((want, *taps), (got, *fused_taps), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-11, atol=1e-12)


def test_energies_are_those_of_the_maps_and_leave_the_shortcut_inside():
    module = capture(trained(resnet20(10)).double(), torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    for parameter in module.parameters():
        parameter.requires_grad_()
    names = feature_maps(module)
    tapped = with_taps(module, [*names, names[-1]])  # the last one is also wanted as it is
    fused = fuse(tapped, energies=len(names))
    assert sum(residual for _, residual in ops_of(fused)) == 8
    x, found = normal(2, 3, 32, 32), []
    for network in (tapped, fused):
        leaf = x.clone().requires_grad_()
        y, taps = network(leaf)
        energies = [t.square().mean((2, 3)) if t.ndim == 4 else t for t in taps[:-1]]
        loss = y.sum() + sum((e * normal(*e.shape, seed=4)).sum() for e in energies)
        found.append([y, *energies, taps[-1], *torch.autograd.grad(loss, [leaf, *network.parameters()])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_statistics_are_those_of_the_inputs():
    module = capture(trained(resnet20(10)).double(), torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    norms = batch_norms(module)
    x = normal(4, 3, 32, 32)
    logits, inputs = with_taps(module, [norm.input for norm in norms])(x)
    got, first, second = fuse_with_statistics(module)(x)
    torch.testing.assert_close(got, logits, rtol=1e-11, atol=1e-12)
    assert len(first) == len(second) == 21
    for norm, u, s1, s2 in zip(norms, inputs, first, second, strict=True):
        d = u - module.get_buffer(norm.mean)[:, None, None]
        torch.testing.assert_close(s1, d.sum((0, 2, 3)), rtol=1e-10, atol=1e-9)
        torch.testing.assert_close(s2, d.square().sum((0, 2, 3)), rtol=1e-10, atol=1e-9)


def test_a_student_keeps_its_quantizers():
    """The same codes but for the few that lie on a boundary, where the last bit decides."""
    torch.manual_seed(0)
    module = capture(trained(resnet20(10)), torch.zeros(2, 3, 32, 32))
    student = prepare(module, QConfig(4, 4))
    x = normal(8, 3, 32, 32, dtype=torch.float32)
    with calibrating(student), torch.no_grad():
        student(x)
    fused = fuse(student)
    assert (len(calls(fused, {bn_act})), len(calls(fused, {bn_act_quantized}))) == (2, 19)
    assert not [node for node in fused.graph.nodes if node.op == "call_module" and "act" in str(node.target)]
    want, got = student(x), fused(x)
    step = 2**-4  # of a logit's own size: one code of four bits
    assert (got - want).norm() < step * want.norm()
    with calibrating(fused), torch.no_grad():
        fused(x)
    assert all(q.batches == 2 for q in student.modules() if hasattr(q, "batches"))


@pytest.mark.parametrize(("placement", "inside"), [("after_relu", 19), ("all_layers", 21)])
def test_a_quantizer_inside_gives_the_bits_of_one_behind(placement, inside, monkeypatch):
    torch.manual_seed(0)
    student = prepare(capture(trained(resnet20(10)), torch.zeros(2, 3, 32, 32)), QConfig(4, 4, placement=placement))
    x = normal(4, 3, 32, 32, dtype=torch.float32)
    with calibrating(student), torch.no_grad():
        student(x)
    found = []
    for fused in (fuse(student), None):
        if fused is None:
            monkeypatch.setattr(fusing, "_is_quantizer", lambda module, node: False)
            fused = fuse(student)
        leaf = x.clone().requires_grad_()
        y = fused(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *fused.parameters()])
        found.append((len(calls(fused, {bn_act_quantized})), y, *grads))
    (count, *got), (none, *want) = found
    assert (count, none) == (inside, 0)
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ACTIVATION_RANGES)
def test_a_range_found_inside_has_the_bits_of_one_found_behind(kind, monkeypatch):
    """And costs a read less for every quantizer of every batch."""
    reads, found = [], []
    monkeypatch.setattr(ranges, "channel_range", lambda *args: reads.append(args) or channel_range(*args))
    torch.manual_seed(0)
    module = capture(trained(resnet20(10)), torch.zeros(2, 3, 32, 32))
    first = normal(4, 3, 32, 32, dtype=torch.float32)
    broken = first.clone()
    broken[0, 0, 0, 0] = torch.nan
    for alone in (False, True):
        student = prepare(module, QConfig(4, 4, placement="all_layers", a_range=kind))
        if alone:
            monkeypatch.setattr(fusing, "_is_quantizer", lambda module, node: False)
        fused = fuse(student)
        assert len(calls(fused, {bn_act_quantized})) == (0 if alone else 21)
        reads.clear()
        with calibrating(student):
            y = fused(first)  # with a gradient, which sees nothing of the range
            seen = [y.detach(), *torch.autograd.grad(y.square().sum(), list(fused.parameters()))]
            with torch.no_grad():
                seen += [fused(x) for x in (3 * first.to(memory_format=torch.channels_last), broken)]
        seen += [t for q in activation_quantizers(student) for t in (q.lo, q.hi, q.batches)]
        found.append((seen, len(reads)))
    (got, fewer), (want, more) = found
    assert_same(got, want)
    assert more - fewer == 3 * 21
