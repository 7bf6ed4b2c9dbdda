"""What all tests share: how a missing backend is treated, and the devices and backends there are."""

import importlib.util
import os
import sys

# Another native module than the installed one, for the scripts that build one to look at.
if another := os.environ.get("ZSQ_NATIVE_MODULE"):
    spec = importlib.util.spec_from_file_location("zsq_ext._C", another)
    sys.modules["zsq_ext._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["zsq_ext._C"])

# One of several processes has one thread: cores that threads wait for one another on cost more than they give.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn
from torch.nn import functional as F

# Without a GPU the Triton kernels run interpreted, on CPU tensors. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from zsq_ext.ops import backend

pytest_plugins = ["parity", "distill_bounds"]  # as plugins, so that pytest explains their assertions too

REQUIRED = [name for name in os.environ.get("ZSQ_REQUIRE", "").split(",") if name]

# Where each backend's tests run: the CUDA device if there is one, except for the CPU's own backend.
_GPU_OR_CPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE_OF = {"reference": _GPU_OR_CPU, "cpu": "cpu", "cuda": "cuda", "triton": _GPU_OR_CPU}


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


@pytest.fixture(params=[name for name in backend.NAMES if name != "reference"])
def fast(request):
    """(backend, device) for each backend but the reference. A missing one is skipped, unless ZSQ_REQUIRE names it."""
    name = request.param
    reason = backend.missing(name)
    if reason is not None:
        if name in REQUIRED:
            pytest.fail(f"ZSQ_REQUIRE names {name}, but {reason}")
        pytest.skip(f"{name}: {reason}")
    return name, DEVICE_OF[name]


@pytest.fixture
def poison():
    """Fills uninitialised memory with NaN, in C++ too, so that an element a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


class Residual(nn.Module):
    """Four convolutions with batch norm, one of the ReLUs written as a function, and a shortcut before the pool."""

    def __init__(self, channels=3, classes=5, width=8):
        super().__init__()
        sizes = [(channels, width, 1), (width, width, 2), (width, width, 1), (width, width, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride, 1, bias=False) for i, o, stride in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = F.relu(self.norms[0](self.convs[0](x)))
        x = F.relu(self.norms[1](self.convs[1](x)))
        y = F.relu(self.norms[2](self.convs[2](x)))
        x = F.relu(x + self.norms[3](self.convs[3](y)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Vgg(nn.Module):
    """Max-pooling and a hidden linear layer: no closed form for its class activation maps."""

    def __init__(self, channels=3, classes=5, size=(8, 8), width=8, norm=True):
        super().__init__()

        def layer(i, o):
            return [nn.Conv2d(i, o, 3, padding=1), *([nn.BatchNorm2d(o)] if norm else []), nn.ReLU(inplace=True)]

        self.features = nn.Sequential(*layer(channels, width), nn.MaxPool2d(2), *layer(width, width), nn.MaxPool2d(2))
        hidden = width * (size[0] // 4) * (size[1] // 4)
        self.classifier = nn.Sequential(nn.Linear(hidden, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, classes))

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


def seen_data(build, *shape, seed=0):
    """A network in eval mode that looks trained: its batch norms have seen data and every class is predicted."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build().train()
        with torch.no_grad():
            for layer in net.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.weight.uniform_(0.5, 1.5)
                    layer.bias.uniform_(-0.5, 0.5)
            for _ in range(3):
                net(torch.randn(16, *shape))
            net.eval()
            head = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
            logits = net(torch.randn(64, *shape))
            gain = 3 / logits.std(0)  # a trained network is sure of itself, and prefers no class
            head.bias.sub_(logits.mean(0)).mul_(gain)
            head.weight.mul_(gain[:, None])
    return net.eval()


@pytest.fixture(scope="session")
def nets():
    """Tiny networks that look trained: ``nets.residual()``, ``nets.vgg()``, ``nets.seen(build, *shape)``."""

    class Nets:
        Residual, Vgg = Residual, Vgg
        seen = staticmethod(seen_data)

        @staticmethod
        def residual(shape=(3, 8, 8), classes=5, seed=0):
            return seen_data(lambda: Residual(shape[0], classes), *shape, seed=seed)

        @staticmethod
        def vgg(shape=(3, 8, 8), classes=5, norm=True, seed=0):
            return seen_data(lambda: Vgg(shape[0], classes, shape[1:], norm=norm), *shape, seed=seed)

    return Nets


@pytest.fixture(scope="session")
def teacher(nets):
    """The residual network, captured; nothing in the package may change it."""
    from zsq_ext.quant.capture import capture

    return capture(nets.residual(), torch.zeros(2, 3, 8, 8)).to(memory_format=torch.channels_last)


def hooks_on(module):
    """How many hooks there are on a module tree."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(layer, kind)) for layer in module.modules() for kind in kinds)


class Interrupted(Exception):
    """Stands for whatever stops a run between two steps."""


@pytest.fixture
def tools():
    """Small helpers: ``tools.hooks_on(module)`` and ``tools.Interrupted``."""

    class Tools:
        pass

    Tools.hooks_on, Tools.Interrupted = staticmethod(hooks_on), Interrupted
    return Tools
