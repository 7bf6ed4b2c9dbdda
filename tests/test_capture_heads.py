"""Networks with several outputs, captured: the structure comes back, and frozen batch norms are seen as what they are.

What was broken on purpose, and which test saw it:

    the outputs in the order of their names              test_the_structure_comes_back
    eps left out of the thawed batch norm                test_a_frozen_batch_norm_is_one
    thawed by its buffers' names alone                   test_what_only_looks_frozen_stays
"""

import collections
import copy

import heads_nets
import pytest
import torch
from heads_nets import SIZE, FrozenNorm, alive, equal, normal
from torch import nn

from zsq_ext.quant import graph, sites, structure
from zsq_ext.quant.capture import capture
from zsq_ext.quant.frozen import thaw

models = heads_nets.models
modules = heads_nets.modules


# Structure


class Pair(collections.namedtuple("Pair", "a b")):
    pass


@pytest.mark.parametrize(
    ("returned", "expected", "paths"),
    [
        (lambda a, b: (a, b), tuple, ["0", "1"]),
        (lambda a, b: [a, b], list, ["0", "1"]),
        (lambda a, b: [a], list, ["0"]),
        (lambda a, b: {"z": a, "a": b}, dict, ["z", "a"]),
        (lambda a, b: {"one": [a, (b, a)], "two": {"x": b}}, dict, ["one.0", "one.1.0", "one.1.1", "two.x"]),
        (lambda a, b: collections.OrderedDict(z=a, a=b), dict, ["z", "a"]),
        (lambda a, b: Pair(a, b), tuple, ["0", "1"]),
        (lambda a, b: a, torch.Tensor, [""]),
        (lambda a, b: a.flatten(1), torch.Tensor, [""]),
    ],
)
def test_the_structure_comes_back(returned, expected, paths):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return returned(self.one(x), self.two(x))

    model = Net().eval()
    module = capture(model, torch.zeros(2, 3, 8, 8))
    x = normal(3, 3, 8, 8)
    got = module(x)
    assert type(got) is expected
    assert list(graph.leaves(got)) == list(graph.outputs(module)) == paths
    assert equal(got, model(x))
    assert graph.is_classifier(module) == (paths == [""] and got.ndim == 2)
    assert equal(copy.deepcopy(module)(x), got)
    assert equal(torch.export.export(module, (x,)).module()(x), got)


@pytest.mark.parametrize("name", ["retina", "ssdlite", "fpn_small"])
def test_doubles_are_captured_bit_for_bit(models, modules, name):
    for batch in (1, 3):
        x = normal(batch, 3, SIZE, SIZE, seed=batch)
        assert equal(modules[name](x), models[name](x))
    assert not graph.is_classifier(modules[name])
    assert structure.classifier_tail(modules[name]) is None


def test_hooks_that_look_at_heads_are_left_out(models):
    model, seen = copy.deepcopy(models["ssdlite"]), []
    model.register_forward_hook(lambda layer, args, out: seen.append(out["cls_logits"].sum().item()))
    x = normal(2, 3, SIZE, SIZE)
    assert equal(capture(model, x)(x), models["ssdlite"](x))
    assert len(seen) == 1


# Frozen batch norms


def test_a_frozen_batch_norm_is_one(models, modules):
    model, module = models["retina frozen"], modules["retina frozen"]
    frozen = [name for name, layer in model.named_modules() if isinstance(layer, FrozenNorm)]
    assert [tap.name for tap in graph.batch_norms(module)] == [n for n in frozen if "stem" in n or "layers" in n]
    assert all(tap.eps == 1e-5 and not tap.training for tap in graph.batch_norms(module))
    assert {s.name for s in sites.activations_after_relu(module)} == {
        s.name for s in sites.activations_after_relu(modules["retina"])
    }
    x = normal(2, 3, SIZE, SIZE)
    thawed = thaw(copy.deepcopy(model))
    assert isinstance(thawed.stem[1], nn.BatchNorm2d)
    assert equal(module(x), thawed(x))
    # each of 10 batch norms in a row may move a value by a few units in the last place, and the layers pass it on
    for expected, got in zip(model(x).values(), module(x).values(), strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert isinstance(model.stem[1], FrozenNorm)  # the caller's model stays


class OtherNorm(FrozenNorm):
    """The same buffers, another formula."""

    def forward(self, x):
        return super().forward(x) * 1.001


class Hooked(FrozenNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_forward_hook(lambda layer, args, out: out + 1)


class Parametrised(FrozenNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("kind", [OtherNorm, Hooked, Parametrised])
def test_what_only_looks_frozen_stays(kind):
    layer = alive(nn.Sequential(kind(4)))
    assert type(thaw(layer)[0]) is kind


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
def test_eps_of_a_frozen_batch_norm(eps):
    layer = alive(nn.Sequential(FrozenNorm(4, eps), nn.Conv2d(4, 4, 1)))
    layer[0].running_var.fill_(1e-3)
    layer[0].weight.neg_()
    x = normal(2, 4, 5, 5)
    expected = layer(x)
    again = nn.Sequential(layer[0], layer[1], layer[0])  # one module in two places
    thawed = thaw(again)
    assert thawed[0] is thawed[2]
    assert type(thawed[0]) is nn.BatchNorm2d
    assert thawed[0].eps == eps
    torch.testing.assert_close(thawed[1](thawed[0](x)), expected, rtol=1e-5, atol=1e-4 * expected.abs().max().item())
    assert type(thaw(FrozenNorm(3))) is nn.BatchNorm2d  # a model that is nothing else
