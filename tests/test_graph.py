"""What is read off a captured graph: counts that the papers state, placements, blocks, tails; the same on a student."""

import functools
import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zsq_ext.quant import graph, sites, structure
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import PLACEMENTS, QConfig
from zsq_ext.quant.prepare import prepare
from zsq_ext.tune.cam import autograd_alpha, bn_slope, closed_form_alpha
from zsq_ext.zoo.small_nets import mobilenet_small, resnet20
from zsq_ext.zoo.torchvision_nets import mobilenet_v2, resnet18, resnet50


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A forward that a test gives, over layers that it names."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)


def conv_bn_relu(inputs, outputs, kernel=3, **options):
    return nn.Sequential(conv(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.ReLU())


def plain():
    """A VGG with names: two layers, a max-pool after each, two linears."""
    features = nn.Sequential(conv_bn_relu(3, 4), nn.MaxPool2d(2), conv_bn_relu(4, 4), nn.MaxPool2d(2))
    return nn.Sequential(features, nn.Flatten(), nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5)))


def concatenating():
    """A dense block: each layer reads all maps before it."""

    def run(self, x):
        maps = [self.stem(x)]
        for layer in (self.one, self.two):
            maps.append(layer(torch.cat(maps, 1)))
        return self.fc(self.transition(torch.cat(maps, 1)).mean([2, 3]))

    layers = {"stem": conv_bn_relu(3, 4), "one": conv_bn_relu(4, 2), "two": conv_bn_relu(6, 2)}
    return Net(run, **layers, transition=conv_bn_relu(8, 4, 1), fc=nn.Linear(4, 5))


class PreActivation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, width)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


def pre_activation():
    def run(self, x):
        x = self.units(self.stem((x - 0.5) / 0.25))  # a model that normalises its own input
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))

    units = nn.Sequential(PreActivation(4), PreActivation(4))
    return Net(run, stem=conv(3, 4), units=units, bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 5))


NETS = {
    "resnet20": (resnet20, 32),
    "resnet18": (resnet18, 64),
    "resnet50": (resnet50, 32),
    "mobilenet_v2": (mobilenet_v2, 64),
    "mobilenet_v2 expand first": (lambda: mobilenet_v2(expand_first=True), 32),
    "mobilenet_small": (mobilenet_small, 16),
    "plain": (plain, 8),
    "concatenating": (concatenating, 8),
    "pre-activation": (pre_activation, 8),
}
SMALL = ("resnet20", "mobilenet_small", "plain", "concatenating", "pre-activation")


def captured(model, size=8):
    return capture(model, torch.zeros(2, 3, size, size))


@functools.cache
def network(name):
    build, size = NETS[name]
    return captured(build(), size)


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
