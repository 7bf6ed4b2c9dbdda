"""What a captured graph says about a network's build: blocks, feature maps, classifier tails, activation maps."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from graph_nets import NETS, SMALL, Net, captured, conv, conv_bn_relu, network, normal, plain
from torch import nn

from zsq_ext.quant import graph, sites, structure
from zsq_ext.tune.cam import autograd_alpha, bn_slope, closed_form_alpha

# Blocks


def check_blocks(module):
    """Each weight in one block, each block reads the one before, and nothing else crosses a border."""
    blocks = structure.blocks(module)
    nodes = list(module.graph.nodes)
    place = {node.name: i for i, node in enumerate(nodes)}
    assert [w for b in blocks for w in b.weights] == [w.name for w in sites.weights(module)]
    assert blocks[0].input == nodes[[node.op for node in nodes].index("placeholder")].name
    assert blocks[-1].output == module.graph.output_node().args[0].name
    for before, after in itertools.pairwise(blocks):
        assert after.input == before.output
        border = place[after.input]
        for node in nodes[border + 1 :]:
            crossing = [s for s in node.all_input_nodes if place[s.name] < border and s.op != "get_attr"]
            assert all(not isinstance(s.meta.get("val"), torch.Tensor) for s in crossing if s.op != "call_module")
    return blocks


@pytest.mark.parametrize("name", [*SMALL, "resnet18", "mobilenet_v2"])
def test_blocks_are_a_chain(name):
    check_blocks(network(name))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", [1, 2, 2, 2, 3, 2, 2, 3, 2, 2, 1]),
        ("resnet18", [1, 2, 2, 3, 2, 3, 2, 3, 2, 1]),
        ("mobilenet_v2", [1, 2, *[3] * 16, 1, 1]),  # inverted residuals are whole, with or without a shortcut
        ("mobilenet_small", [1, 2, *[3] * 8, 1, 1]),
        ("plain", [1, 1, 1, 1]),
        ("concatenating", [1, 2, 1, 1]),
        ("pre-activation", [1, 2, 2, 1]),
    ],
)
def test_weights_per_block(name, expected):
    assert [len(b.weights) for b in structure.blocks(network(name))] == expected


def test_block_names():
    names = [b.name for b in structure.blocks(network("resnet18"))]
    assert names == ["conv1", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "fc"]
    assert [b.name for b in structure.blocks(network("plain"))] == ["0.0.0", "0.2.0", "2.0", "2.2"]


def test_a_stage_of_linear_bottlenecks_is_not_one_block():
    class Bottleneck(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.expand, self.project = conv_bn_relu(inputs, 8, 1), conv(8, outputs, 1)
            self.bn = nn.BatchNorm2d(outputs)

        def forward(self, x):
            return self.bn(self.project(self.expand(x)))

    stage = nn.Sequential(Bottleneck(4, 6), Bottleneck(6, 4))
    model = nn.Sequential(conv_bn_relu(3, 4), stage, conv_bn_relu(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, 5))
    blocks = check_blocks(captured(model))
    assert [b.name for b in blocks] == ["0.0", "1.0", "1.1", "2.0", "5"]
    # a lone bottleneck in a stage does not draw the stem in
    alone = nn.Sequential(nn.Sequential(conv_bn_relu(3, 4), Bottleneck(4, 6)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    alone.append(nn.Linear(6, 5))
    assert [b.name for b in check_blocks(captured(alone))] == ["0.0.0", "0.1", "3"]


def test_other_chains_that_end_in_a_batch_norm_stay_apart():
    def linear(inputs):
        return nn.Sequential(conv(inputs, 4), nn.BatchNorm2d(4))

    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    alternating = nn.Sequential(conv_bn_relu(3, 4), linear(4), conv_bn_relu(4, 4), linear(4))
    blocks = check_blocks(captured(nn.Sequential(alternating, *head)))
    assert [b.name for b in blocks] == ["0.0.0", "0.1.0", "0.2.0", "0.3.0", "3"]
    around = nn.Sequential(linear(3), conv_bn_relu(4, 4), linear(4))
    assert len(check_blocks(captured(nn.Sequential(around, *head)))) == 4
    long = nn.Sequential(conv_bn_relu(3, 4), conv_bn_relu(4, 4), conv_bn_relu(4, 4), linear(4))
    assert len(check_blocks(captured(nn.Sequential(long, *head)))) == 5


def test_asking_for_a_size_is_not_reading():
    module = captured(plain())
    before = sites.activations_all_layers(module), structure.blocks(module)
    first = graph.find(module, "conv2d")
    with module.graph.inserting_before(graph.find(module, "linear_1")):
        size = module.graph.call_function(torch.ops.aten.sym_size.int, (first, 0))
        view = module.graph.call_function(torch.ops.aten.reshape.default, (graph.find(module, "relu_2"), [size, -1]))
    size.meta["val"], view.meta["val"] = 2, graph.find(module, "relu_2").meta["val"]
    graph.find(module, "linear_1").replace_input_with(graph.find(module, "relu_2"), view)
    module.recompile()
    assert module(normal(3, 3, 8, 8)).shape == (3, 5)
    chosen, blocks = sites.activations_all_layers(module), structure.blocks(module)
    assert chosen == before[0]
    assert [b.weights for b in blocks] == [b.weights for b in before[1]]


# Feature maps, classifier tails, class activation maps


def test_feature_maps():
    module = network("resnet20")
    modules = [graph.module_of(graph.find(module, name)) for name in structure.feature_maps(module)]
    assert modules == [f"features.stage{i}.unit{j}.body.conv2.bn" for i in (1, 2, 3) for j in (1, 2, 3)]
    assert len(structure.feature_maps(network("mobilenet_small"))) == 9  # the linear bottlenecks
    assert structure.feature_maps(network("plain")) == ["batch_norm", "batch_norm_1"]


@pytest.mark.parametrize(
    ("name", "activation", "addition"),
    [("resnet20", "relu", True), ("resnet18", "relu", True), ("mobilenet_v2", "relu6", False)],
)
def test_classifier_tails(name, activation, addition):
    module = network(name)
    tail = structure.classifier_tail(module)
    assert tail.activation == activation
    assert tail.features == structure.cam_layer(module) == tail.batch_norm.input
    assert tail.batch_norm == graph.batch_norms(module)[-1]
    assert tail.pre_activation.startswith("add") == addition
    assert graph.find(module, tail.classifier).target == sites.weights(module)[-1].name


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_small"])
def test_a_tail_gives_the_gradient_it_promises(name):
    module = network(name)
    tail = structure.classifier_tail(module)
    tapped = graph.with_taps(module, [tail.features, tail.pre_activation, tail.classifier])
    # teachers are frozen, so a gradient needs a leaf in front of the map
    logits, (features, before, weight) = tapped(normal(3, 3, *[NETS[name][1]] * 2, seed=1).requires_grad_())
    classes = torch.tensor([0, 3, 9])
    norm = tail.batch_norm
    slope = bn_slope(graph.attribute(module, norm.weight), graph.attribute(module, norm.var), norm.eps)
    closed = closed_form_alpha(weight, classes, slope, before, upper={"relu": None, "relu6": 6.0}[tail.activation])
    exact = autograd_alpha(logits, features, classes)
    # a mean of equal shares in fp32 against a sum of them: a few ulp of the largest
    torch.testing.assert_close(closed, exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("run", "has_tail"),
    [
        (lambda self, x: self.fc(F.relu(self.bn(self.conv(x))).mean([2, 3])), True),
        (lambda self, x: self.fc(F.relu(self.bn(self.conv(x))).mean((-1, -2))), True),
        (lambda self, x: self.fc(F.avg_pool2d(F.relu(self.bn(self.conv(x))), 8).flatten(1)), True),
        (lambda self, x: self.fc(F.avg_pool2d(F.relu(self.bn(self.conv(x))), 8).squeeze(3).squeeze(2)), True),
        (lambda self, x: self.fc(F.relu(self.bn(self.conv(self.skip(x))) + self.skip(x)).mean([2, 3])), True),
        (lambda self, x: self.fc(F.relu(self.bn(self.conv(x)) + self.skip(x)).mean([2, 3])), False),  # which is which?
        (lambda self, x: self.fc(self.bn(self.conv(x)).mean([2, 3])), False),  # no activation
        (lambda self, x: self.fc(F.silu(self.bn(self.conv(x))).mean([2, 3])), False),
        (lambda self, x: self.fc(self.bn(self.conv(x)).clamp(0, 4).mean([2, 3])), False),
        (lambda self, x: self.fc(self.bn(F.relu(self.conv(x))).mean([2, 3])), False),
        (lambda self, x: self.fc(F.relu(self.conv(self.bn(x))).mean([2, 3])), False),
        (lambda self, x: self.fc(F.relu(self.bn(self.conv(x))).amax([2, 3])), False),  # another pooling
        (lambda self, x: self.fc(F.relu(self.bn(self.conv(x))).mean(2)[:, :, 0]), False),
        (lambda self, x: self.fc(F.relu(self.bn(self.conv(x)) + 1).mean([2, 3])), False),
        (lambda self, x: self.fc(F.relu(self.bn(self.conv(x))).mean([2, 3])).log_softmax(1), False),
    ],
)
def test_which_tails_are_closed(run, has_tail):
    layers = {"conv": conv(4, 4), "bn": nn.BatchNorm2d(4), "skip": conv(4, 4, 1), "fc": nn.Linear(4, 5)}
    model = Net(lambda self, x: run(self, self.stem(x)), stem=conv(3, 4), **layers)
    module = captured(model)
    tail = structure.classifier_tail(module)
    assert (tail is not None) == has_tail
    if tail is not None:
        assert graph.module_of(graph.find(module, tail.features)) == "conv"


def test_a_network_with_linear_layers_behind_has_no_tail_but_a_map():
    assert structure.classifier_tail(network("plain")) is None
    assert structure.cam_layer(network("plain")) == "conv2d_1"


def test_the_map_is_larger_than_one_position():
    def run(self, x):
        return self.head(F.adaptive_avg_pool2d(self.body(x), 1)).flatten(1)

    module = captured(Net(run, body=conv_bn_relu(3, 4), head=conv(4, 5, 1)))
    assert structure.cam_layer(module) == "conv2d"
    flat = captured(nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(3, 5, 1), nn.Flatten()))
    assert structure.cam_layer(flat) is None
