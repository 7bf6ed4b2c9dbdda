"""Doubles with the output structures, shared heads and frozen batch norms of torchvision's RetinaNet and SSDLite."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zsq_ext.quant import graph
from zsq_ext.quant.capture import capture
from zsq_ext.zoo.small_detector import fpn_small


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class FrozenNorm(nn.Module):
    """What torchvision's FrozenBatchNorm2d holds and computes: four buffers, by hand, no parameter."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        w, b, rv, rm = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


def conv_norm(inputs, outputs, kernel=3, stride=1, norm=nn.BatchNorm2d, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, norm(outputs))


class Unit(nn.Module):
    """A residual unit."""

    def __init__(self, inputs, outputs, stride, norm):
        super().__init__()
        self.one, self.two = conv_norm(inputs, outputs, 3, stride, norm), conv_norm(outputs, outputs, 3, 1, norm)
        self.downsample = conv_norm(inputs, outputs, 1, stride, norm)

    def forward(self, x):
        return F.relu(self.two(F.relu(self.one(x))) + self.downsample(x))


class RetinaDouble(nn.Module):
    """RetinaNet's backbone and head: frozen batch norms, an FPN in an OrderedDict, one head for all levels.

    Each level's map is permuted to (N, H W A, K), and the levels are concatenated, as RetinaNetHead does.
    """

    ANCHORS = 3

    def __init__(self, classes=4, width=8, norm=FrozenNorm):
        super().__init__()
        self.stem = conv_norm(3, width, 3, 2, norm)
        self.layers = nn.ModuleList(Unit(width, width, stride, norm) for stride in (1, 2, 2))
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in self.layers)
        self.outer = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.layers)
        self.extra = nn.Conv2d(width, width, 3, 2, 1)
        self.towers, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, outputs in (("cls_logits", classes), ("bbox_regression", 4)):
            self.towers[name] = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
            self.heads[name] = nn.Conv2d(width, self.ANCHORS * outputs, 3, padding=1)

    def features(self, x):
        x = F.relu(self.stem(x))
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        inner = self.inner[-1](maps[-1])
        found = [self.outer[-1](inner)]
        for i in range(len(maps) - 2, -1, -1):
            lateral = self.inner[i](maps[i])
            inner = lateral + F.interpolate(inner, size=lateral.shape[-2:], mode="nearest")
            found.insert(0, self.outer[i](inner))
        found.append(self.extra(found[-1]))
        return collections.OrderedDict((str(i), level) for i, level in enumerate(found))

    def forward(self, x):
        levels = list(self.features(x).values())
        return {name: self.head(name, levels) for name in self.heads}

    def head(self, name, levels):
        every = []
        for level in levels:
            y = self.heads[name](self.towers[name](level))
            n, _, height, width = y.shape
            y = y.view(n, self.ANCHORS, -1, height, width).permute(0, 3, 4, 1, 2)
            every.append(y.reshape(n, height * width * self.ANCHORS, -1))
        return torch.cat(every, 1)


class SsdLiteDouble(nn.Module):
    """SSDLite: linear bottlenecks, taps on the way, per level its own depthwise head; boxes first in the dict."""

    def __init__(self, classes=4, width=8):
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, width, 3, 2), nn.ReLU6())
        self.stages = nn.ModuleList()
        for _ in range(2):
            inside = [
                conv_norm(width, 2 * width, 1),
                nn.ReLU6(),
                conv_norm(2 * width, 2 * width, 3, 2, groups=2 * width),
            ]
            self.stages.append(nn.Sequential(*inside, nn.ReLU6(), conv_norm(2 * width, width, 1)))
        self.heads = nn.ModuleDict()
        for name, outputs in (("bbox_regression", 4), ("cls_logits", classes)):
            self.heads[name] = nn.ModuleList(
                nn.Sequential(conv_norm(width, width, 3, groups=width), nn.ReLU6(), nn.Conv2d(width, 2 * outputs, 1))
                for _ in self.stages
            )
        self.columns = {"bbox_regression": 4, "cls_logits": classes}

    def forward(self, x):
        x, levels = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        results = {}
        for name, heads in self.heads.items():
            rows = []
            for head, level in zip(heads, levels, strict=True):
                y = head(level).permute(0, 2, 3, 1)
                rows.append(y.reshape(y.shape[0], -1, self.columns[name]))
            results[name] = torch.cat(rows, dim=1)
        return results


def alive(model, seed=1):
    """Weights and statistics drawn at random, so that a wrong operator or a wrong order changes an output."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=draw)
            if name.endswith("running_var"):
                noise = noise.abs() + 0.5
            elif name.endswith(("norm.weight", "1.weight")) and tensor.ndim == 1:
                noise = noise * 0.1 + 1
            elif tensor.ndim > 1:
                noise = noise * (2 / tensor[0].numel()) ** 0.5
            tensor.copy_(noise)
    return model.eval()


BUILD = {
    "retina": lambda: RetinaDouble(norm=nn.BatchNorm2d),
    "retina frozen": RetinaDouble,
    "ssdlite": SsdLiteDouble,
    "fpn_small": lambda: fpn_small(4),
}
SIZE = 32


@pytest.fixture(scope="module")
def models():
    return {name: alive(build()) for name, build in BUILD.items()}


@pytest.fixture(scope="module")
def modules(models):
    return {name: capture(model, torch.zeros(2, 3, SIZE, SIZE)) for name, model in models.items()}


def equal(a, b):
    a, b = graph.leaves(a), graph.leaves(b)
    return list(a) == list(b) and all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
