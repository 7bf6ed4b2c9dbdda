"""Models to capture, and whether a capture is faithful and leaves its model untouched."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks

from zsq_ext.quant.capture import capture


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def alive(model, seed=1):
    """Weights and statistics drawn at random, large enough that a wrong operator changes the output."""
    draw = stream(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=draw)
            if name.endswith("running_var"):
                noise = noise.abs() + 0.5
            elif tensor.ndim > 1:
                noise = noise * (2 / tensor[0].numel()) ** 0.5
            tensor.copy_(noise)
    return model


def portrait(model):
    """Everything about a model that capture must leave as it was."""
    return {
        "state": {name: (id(t), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "flags": [(p.requires_grad, p.grad) for p in model.parameters()],
        "modules": [
            (name, id(m), m.training, sorted(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
        "global hooks": [len(module_hooks._global_forward_hooks), len(module_hooks._global_forward_pre_hooks)],
        "random": torch.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
    }


def alike(before, after):
    def same(a, b):
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        return a == b

    return [key for key in before if not same(before[key], after[key])]


@contextlib.contextmanager
def untouched(model, example):
    """The model and the example are the same afterwards, whether or not the body raises."""
    kept, before = example.clone(), portrait(model)
    try:
        yield
    finally:
        assert alike(before, portrait(model)) == []
        assert torch.equal(example, kept)


def faithful(model, shape=(3, 8, 8), dtype=torch.float32):
    """The captured model, once it is shown that it computes the same and that nothing was touched."""
    example = torch.zeros(2, *shape, dtype=dtype)
    with untouched(model, example):
        module = capture(model, example)
    training = [m.training for m in model.modules()]
    model.eval()
    # the same operators run in the same order, in blocks that depend on batch and layout: their sums round differently
    tolerance = 64 * torch.finfo(dtype).eps
    with torch.no_grad():
        for batch, memory in ((1, None), (2, None), (5, None), (3, torch.channels_last)):
            x = torch.randn(batch, *shape, generator=stream(batch), dtype=dtype)
            expected = model(x.clone())  # as it is: a model that calls view() rejects channels_last, its graph must not
            assert not torch.equal(expected, model(x.flip(0, 3))), "the output ignores the image"
            if memory is not None:
                module = module.to(memory_format=memory)
                x = x.contiguous(memory_format=memory)
            got = module(x.clone())
            scale = expected.abs().max()
            assert scale > 0
            torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=tolerance)
    for m, flag in zip(model.modules(), training, strict=True):
        m.training = flag
    for node in module.graph.nodes:
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            assert schema is None or not schema.is_mutable
            assert not any(word in str(node.target) for word in ("dropout", "assert"))
    assert set(module.state_dict()) <= set(model.state_dict())
    assert not any(p.requires_grad for p in module.parameters())
    return module


class Net(nn.Module):
    """conv -> BN -> body -> global mean -> linear; a test gives the body."""

    def __init__(self, channels=3, width=4, classes=5, **layers):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.body(self.bn(self.conv(x))).mean([2, 3]))

    def body(self, x):
        return F.relu(x)


def net(body, **options):
    """A Net whose body is ``body(self, x)``."""
    return alive(type("Bodied", (Net,), {"body": body})(**options))


def pointwise(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 1, **options)
