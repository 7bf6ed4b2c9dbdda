"""What is read off a captured graph: counts that the papers state, placements, taps; the same on a student."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from graph_nets import SMALL, Net, captured, conv, conv_bn_relu, network, normal, plain
from torch import nn

from zsq_ext.quant import graph, sites, structure
from zsq_ext.quant.config import PLACEMENTS, QConfig
from zsq_ext.quant.prepare import prepare
from zsq_ext.zoo.torchvision_nets import resnet18

# Counts


@pytest.mark.parametrize(
    ("name", "norms", "weights", "activations"),
    [
        ("resnet20", 21, 22, 19),
        ("resnet18", 20, 21, 17),
        ("resnet50", 53, 54, 49),
        ("mobilenet_v2", 52, 53, 35),
        ("mobilenet_v2 expand first", 53, 54, 36),
    ],
)
def test_counts_that_the_papers_state(name, norms, weights, activations):
    module = network(name)
    assert len(graph.batch_norms(module)) == norms
    assert len(sites.weights(module)) == weights
    assert len(sites.activations_after_relu(module)) == activations


def test_sizes_that_the_papers_state():
    """ResNet-20 at 32 x 32: values per image."""
    module = network("resnet20")

    def numel(names):
        return sum(graph.find(module, name).meta["val"][0].numel() for name in names)

    assert numel(site.node for site in sites.activations_after_relu(module)) == 188_416
    assert numel(tap.input for tap in graph.batch_norms(module)) == 200_704
    assert round(sum(graph.attribute(module, w.name).numel() for w in sites.weights(module)) / 1e6, 3) == 0.271


def test_names_are_those_of_the_model():
    module = network("resnet18")
    model = resnet18()
    for tap in graph.batch_norms(module):
        layer = model.get_submodule(tap.name)
        assert isinstance(layer, nn.BatchNorm2d)
        assert (tap.weight, tap.mean) == (f"{tap.name}.weight", f"{tap.name}.running_mean")
        assert (tap.eps, tap.training) == (layer.eps, False)
    for weight in sites.weights(module):
        assert graph.attribute(module, weight.name).shape == model.get_parameter(weight.name).shape
        assert [f"{graph.module_of(graph.find(module, user))}.weight" for user in weight.users] == [weight.name]


def test_output_channels_come_first_except_in_a_transposed_convolution():
    def run(self, x):
        return self.fc(self.up(self.conv(x)).mean([2, 3]))

    module = captured(Net(run, conv=conv(3, 4), up=nn.ConvTranspose2d(4, 6, 2), fc=nn.Linear(6, 5)))
    shapes = {w.name: graph.attribute(module, w.name).shape[w.axis] for w in sites.weights(module)}
    assert shapes == {"conv.weight": 4, "up.weight": 6, "fc.weight": 5}


def test_a_shared_layer_is_one_weight_and_two_batch_norms():
    def run(self, x):
        return self.fc(self.layer(self.layer(x)).mean([2, 3]))

    module = captured(Net(run, layer=conv_bn_relu(3, 3), fc=nn.Linear(3, 5)))
    assert [(w.name, len(w.users)) for w in sites.weights(module)] == [("layer.0.weight", 2), ("fc.weight", 1)]
    first, second = graph.batch_norms(module)
    assert first.name == second.name == "layer.1"
    assert first.input != second.input
    assert len(sites.activations_after_relu(module)) == 2
    student = prepare(module, QConfig(4, 4))
    assert sum(n.op == "call_module" and "weight" in str(n.target) for n in student.graph.nodes) == 2


# Activations


@pytest.mark.parametrize(
    ("function", "is_relu", "bound"),
    [
        (F.relu, True, None),
        (lambda x: F.relu(x, inplace=True), True, None),
        (torch.relu_, True, None),
        (F.relu6, True, 6),
        (nn.ReLU6(inplace=True), True, 6),
        (lambda x: x.clamp(0, 4), True, 4),
        (lambda x: x.clamp(min=0), True, None),
        (lambda x: x.clamp_min(0), True, None),
        (lambda x: F.hardtanh(x, 0, 2), True, 2),
        (F.hardtanh, False, None),
        (F.silu, False, None),
        (lambda x: x * torch.sigmoid(x), False, None),
        (lambda x: x.mul_(x.sigmoid()), False, None),
        (F.hardswish, False, None),
        (F.gelu, False, None),
        (nn.PReLU(), False, None),
        (nn.LeakyReLU(0.1, inplace=True), False, None),
        (torch.tanh, False, None),
    ],
)
def test_activation_functions_get_one_site(function, is_relu, bound):
    def run(self, x):
        return self.fc(self.act(self.bn(self.conv(x))).mean([2, 3]))

    act = function if isinstance(function, nn.Module) else Net(lambda self, x: function(x))
    module = captured(Net(run, conv=conv(3, 4), bn=nn.BatchNorm2d(4), act=act, fc=nn.Linear(4, 5)))
    (site,) = sites.activations_after_relu(module)
    node = graph.find(module, site.node)
    assert graph.is_relu(node) == is_relu
    if is_relu:
        assert graph.upper_bound(node) == bound
    # conv, batch norm and activation are one layer: the image, its output, the pooled features, the logits
    everywhere = [a.node for a in sites.activations_all_layers(module)]
    assert everywhere == ["x", site.node, "mean", "linear"]


@pytest.mark.parametrize("function", [torch.sigmoid, F.hardsigmoid, lambda x: x.clamp(-1, 1), lambda x: x.clamp(max=6)])
def test_gates_and_bounds_are_no_activation_functions(function):
    def run(self, x):
        return self.fc(function(self.conv(x)).mean([2, 3]))

    module = captured(Net(run, conv=conv(3, 4), fc=nn.Linear(4, 5)))
    assert sites.activations_after_relu(module) == []


def test_the_hardware_placement_of_a_linear_bottleneck():
    names = [a.name for a in sites.activations_all_layers(network("mobilenet_small"))]
    assert names[:6] == [
        "input",
        "features.0.2:hardtanh_",  # conv + bn + relu6
        "features.1.conv.0.2:hardtanh__1",
        "features.1.conv.2:batch_norm_2",  # linear
        "features.1:add",
        "features.2.conv.0.2:hardtanh__2",
    ]
    assert names[-3:] == ["features.10.2:hardtanh__18", "model:adaptive_avg_pool2d", "output"]
    assert len(names) == 1 + 28 + 6 + 1 + 1  # image, layers with a batch norm, additions, pooling, logits


def test_the_academic_placement_of_residual_units():
    names = [a.name for a in sites.activations_academic(network("resnet20"))]
    assert names == ["features.init_block.activ:relu"] + [
        name
        for n in range(9)
        for unit in [f"features.stage{n // 3 + 1}.unit{n % 3 + 1}"]
        for name in (f"{unit}.body.conv1.activ:relu_{2 * n + 1}", f"{unit}.activ:relu_{2 * n + 2}")
    ]  # no image, no logits, no pooled features; neither branch of an addition before it


def test_the_academic_placement_of_linear_bottlenecks():
    module = network("mobilenet_small")
    names = [a.name for a in sites.activations_academic(module)]
    everywhere = [a.name for a in sites.activations_all_layers(module)]
    assert [name for name in everywhere if name not in names] == [
        "input",
        *(f"features.{n}.conv.{2 if n == 1 else 3}:batch_norm_{3 * n - 1}" for n in (1, 3, 5, 6, 8, 9)),  # into a sum
        "model:adaptive_avg_pool2d",
        "output",
    ]
    assert "features.2.conv.3:batch_norm_5" in names  # into a layer


def test_the_hardware_placement_of_everything_else():
    def run(self, x):
        x = self.stem(x)
        y = self.conv(x)  # read by an activation and by the sum: both tensors are needed
        left, right = torch.cat([F.relu(y), y + x], 1).chunk(2, 1)
        x = F.max_pool2d(F.pad(left, (1, 1, 1, 1)), 2) * torch.sigmoid(self.scale)
        x = F.interpolate(x, size=y.shape[2:])  # asking for a size is not reading
        return self.head(F.avg_pool2d(x * right, 8)).view(-1, 5)

    layers = {"stem": conv_bn_relu(3, 4), "conv": conv(4, 4), "scale": nn.Parameter(normal(1, 4, 1, 1))}
    module = captured(Net(run, **layers, head=conv(4, 5, 1)))
    found = [(a.node, a.role) for a in sites.activations_all_layers(module)]
    assert found == [
        ("x", "input"),
        ("relu", "activation"),
        ("conv2d_1", "activation"),
        ("relu_1", "activation"),
        ("add", "activation"),
        ("cat", "activation"),
        ("mul", "activation"),
        ("mul_1", "activation"),
        ("avg_pool2d", "activation"),
        ("conv2d_2", "output"),  # through the reshape behind it
    ]


@pytest.mark.parametrize("name", SMALL)
def test_no_value_is_quantized_twice(name):
    """Every site of the hardware placement stands behind an operator that makes new values."""
    module = network(name)
    chosen = {a.node for a in sites.activations_all_layers(module)}
    for node in module.graph.nodes:
        if node.target in sites.PASS_THROUGH:
            assert node.name not in chosen
        if node.target in graph.LAYERS:
            value, steps = node, 0
            while value.name not in chosen:  # a layer's output reaches its one site within batch norm and activation
                (value,) = value.users
                steps += 1
            assert steps <= 2


# A student reads like its teacher


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", SMALL)
def test_quantizers_do_not_change_what_is_read(name, placement):
    teacher = network(name)
    student = prepare(teacher, QConfig(4, 4, placement))
    for read in (
        graph.batch_norms,
        sites.weights,
        sites.activations_after_relu,
        sites.activations_all_layers,
        structure.feature_maps,
        structure.cam_layer,
        lambda m: [(b.name, b.weights) for b in structure.blocks(m)],
        lambda m: (tail := structure.classifier_tail(m)) and (tail.features, tail.pre_activation, tail.batch_norm),
    ):
        assert read(student) == read(teacher)


# Taps


def test_taps_give_the_tensors_inside_the_autograd_graph():
    module = captured(plain())
    names = ["batch_norm", "max_pool2d_1"]
    before = [(node.name, node.args) for node in module.graph.nodes]
    tapped = graph.with_taps(module, names)
    x = normal(2, 3, 8, 8).requires_grad_()
    output, (norm, pooled) = tapped(x)
    assert torch.equal(output, module(x))
    assert norm.shape == (2, 4, 8, 8)
    assert pooled.shape == (2, 4, 2, 2)
    (gradient,) = torch.autograd.grad(output.sum(), norm, retain_graph=True)
    assert gradient.abs().sum() > 0
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    assert gradient.abs().sum() > 0
    assert [(node.name, node.args) for node in module.graph.nodes] == before


def test_taps_share_parameters_and_leak_nothing():
    module = captured(plain())
    tapped = graph.with_taps(module, ["linear"])
    shared = dict(tapped.named_parameters())
    assert shared.keys() == dict(module.named_parameters()).keys()
    assert all(parameter is shared[name] for name, parameter in module.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    _, (seen,) = tapped(normal(2, 3, 8, 8))
    alive = weakref.ref(tapped), weakref.ref(seen)
    del tapped, seen
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_unknown_nodes():
    with pytest.raises(KeyError, match="with_taps: the graph has no node 'nothing'"):
        graph.with_taps(network("plain"), ["nothing"])
    with pytest.raises(KeyError, match="find: the graph has no node 'nothing'"):
        graph.find(network("plain"), "nothing")
