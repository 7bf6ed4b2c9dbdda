"""Capture: the graph computes what the model computes, bit for bit on a CPU, and the model never notices."""

import pytest
import torch
import torch.nn.functional as F
from capture_nets import Net, alive, faithful, net, pointwise, stream
from torch import nn

from zsq_ext.quant.capture import capture
from zsq_ext.quant.graph import batch_norms
from zsq_ext.quant.sites import weights
from zsq_ext.zoo.small_nets import mobilenet_small, resnet20
from zsq_ext.zoo.torchvision_nets import mobilenet_v2, resnet18, vgg11_bn

# What is captured


def light_vgg():
    """VGG-11's features without the 100 million weights of its classifier."""
    with torch.device("meta"):
        model = vgg11_bn(10)
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier = nn.Sequential(nn.Linear(512 * 4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))
    return model.to_empty(device="cpu")


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (resnet20, (3, 32, 32)),
        (mobilenet_small, (3, 16, 16)),
        (lambda: resnet20(in_channels=1), (1, 28, 28)),
        (lambda: resnet18(7), (3, 64, 48)),
        (lambda: mobilenet_v2(7), (3, 32, 32)),
        (light_vgg, (3, 32, 32)),
    ],
    ids=["resnet20", "mobilenet_small", "resnet20 28x28x1", "resnet18 64x48", "mobilenet_v2", "vgg11_bn"],
)
def test_the_zoo(build, shape):
    model = alive(build()).train()
    module = faithful(model, shape)
    named = {name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert [tap.name for tap in batch_norms(module)] == sorted(named, key=[t.name for t in batch_norms(module)].index)
    assert dict(module.named_parameters()).keys() == dict(model.named_parameters()).keys()


def residual(self, x):
    x = F.relu(x)
    out = torch.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    out += x
    return out.relu_()


def in_statements(self, x):
    y = x
    x.relu_()
    x.add_(y)
    z = x.detach()
    z.mul_(0.5)
    return z


def squeeze_excite(self, x):
    x = F.silu(x, inplace=True)
    gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)), inplace=True)), inplace=True)
    return F.hardswish(x * gate)


def dense(self, x):
    maps = [F.relu_(x)]
    for layer in (self.one, self.two):
        maps.append(F.relu(layer(torch.cat(maps, 1)), inplace=True))
    return self.back(torch.cat(maps, 1))


def shuffled(self, x):
    left, right = x.chunk(2, 1)
    x = torch.cat([left, F.relu(self.side(right))], 1)
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def up_and_down(self, x):
    small = F.max_pool2d(F.relu(x), 2)
    big = self.up(small)
    return F.relu(big + F.interpolate(small, size=big.shape[2:])) + F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)


def bn(width=4):
    return nn.BatchNorm2d(width)


def conv(width=4, **options):
    return nn.Conv2d(width, width, 3, padding=options.get("dilation", 1), **options)


BODIES = {
    "residual, in place": (residual, lambda: {"conv1": conv(), "bn1": bn(), "conv2": conv(), "bn2": bn()}),
    "in statements": (in_statements, dict),
    "clipped": (
        lambda self, x: F.hardtanh(F.relu6(x, inplace=True) - 1, -1, 2, inplace=True).clamp_(0, 1.5).clamp(max=1),
        dict,
    ),
    "attention": (squeeze_excite, lambda: {"down": pointwise(4, 2), "up": pointwise(2, 4)}),
    "concatenation": (
        dense,
        lambda: {"one": pointwise(4, 2), "two": pointwise(6, 3), "back": pointwise(9, 4)},
    ),
    "shuffle": (shuffled, lambda: {"side": pointwise(2, 2)}),
    "encoder and decoder": (up_and_down, lambda: {"up": nn.ConvTranspose2d(4, 4, 2, 2)}),
    "kinds of convolution": (
        lambda self, x: self.dilated(self.grouped(self.depthwise(x).relu_()).relu_()),
        lambda: {"depthwise": conv(groups=4), "grouped": conv(groups=2), "dilated": conv(dilation=2)},
    ),
    "shared weights": (
        lambda self, x: self.shared(F.relu(self.norm(self.shared(F.relu(self.norm(x)))))),
        lambda: {"shared": conv(), "norm": bn()},
    ),
    "counting calls": (
        lambda self, x: (self.calls.add_(1), F.relu(x))[1],
        lambda: {"calls": nn.Buffer(torch.zeros(()))},
    ),
    "casts": (lambda self, x: F.relu(x.to(torch.float64).float()), dict),
    "changed features": (lambda self, x: F.relu(x.mul_(2)).sub_(0.5), dict),
    "dropout": (
        lambda self, x: self.drop(F.dropout(F.relu(x), 0.5, self.training)).relu_(),
        lambda: {"drop": nn.Dropout2d()},
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name):
    body, layers = BODIES[name]
    faithful(net(body, **layers()).train())


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.reshape(-1, 4 * 4 * 4),
    ],
    ids=["view", "reshape", "flatten", "free batch"],
)
def test_heads_that_flatten(flat):
    class Flat(Net):
        def forward(self, x):
            return self.fc(flat(F.max_pool2d(F.relu(self.bn(self.conv(x)), inplace=True), 2)))

    model = Flat()
    model.fc = nn.Linear(4 * 4 * 4, 5)
    faithful(alive(model))


def test_a_head_of_one_convolution():
    class Head(Net):
        def forward(self, x):
            x = F.adaptive_avg_pool2d(F.relu(self.bn(self.conv(x))), 1)
            return self.head(self.drop(x)).flatten(1)

    module = faithful(alive(Head(head=nn.Conv2d(4, 1, 1), drop=nn.Dropout(0.3))).train())
    assert module(torch.zeros(3, 3, 8, 8)).shape == (3, 1)


def test_an_input_changed_in_place():
    class Normalising(Net):
        def forward(self, x):
            return super().forward(x.sub_(0.5).div_(0.25))

    faithful(alive(Normalising()))


def test_double_precision_and_frozen_parameters():
    model = alive(Net()).double().requires_grad_(False)
    module = faithful(model, dtype=torch.float64)
    assert module(torch.zeros(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_train_and_eval_change_nothing():
    module = faithful(net(BODIES["dropout"][0], drop=nn.Dropout2d()))
    x = torch.randn(4, 3, 8, 8, generator=stream())
    first = module.eval()(x)
    assert torch.equal(module.train()(x), first)
    assert torch.equal(module.get_buffer("bn.running_mean"), capture(module, x).get_buffer("bn.running_mean"))


def test_the_graph_owns_its_weights():
    model = alive(Net())
    module = faithful(model)
    with torch.no_grad():
        module.get_parameter("conv.weight").zero_()
    assert model.conv.weight.abs().sum() > 0


def test_a_module_under_two_names():
    model = Net()
    model.again = model.bn
    faithful(alive(model))


def test_wrapped_models_are_unwrapped():
    inner = alive(Net())
    for wrapped in (torch.compile(inner), nn.DataParallel(inner)):
        module = capture(wrapped, torch.zeros(2, 3, 8, 8))
        assert [w.name for w in weights(module)] == ["conv.weight", "fc.weight"]


# Hooks


def test_a_hook_that_looks_is_left_out():
    seen = []
    model = alive(Net())
    model.conv.register_forward_hook(lambda layer, args, out: seen.append((type(out), out.abs().max().item())))
    faithful(model)
    assert all(kind is torch.Tensor for kind, _ in seen)


def test_a_hook_that_changes_the_output_is_captured():
    model = alive(Net())
    model.bn.register_forward_hook(lambda layer, args, out: out * 2)
    model.fc.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    faithful(model)
