"""Networks to read graphs of: published ones, and small ones that each have one thing to tell apart."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from zsq_ext.quant.capture import capture
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
