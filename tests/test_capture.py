"""Capture: the graph computes what the model computes, bit for bit on a CPU, and the model never notices."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks

from zsq_ext.quant.capture import capture
from zsq_ext.quant.graph import batch_norms
from zsq_ext.quant.sites import weights
from zsq_ext.zoo.small_nets import mobilenet_small, resnet20
from zsq_ext.zoo.torchvision_nets import mobilenet_v2, resnet18, vgg11_bn


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


# What is refused: one sentence that names the module


def refused(model, kind, match, shape=(3, 8, 8)):
    example = torch.zeros(2, *shape)
    with untouched(model, example), pytest.raises(kind, match=match) as caught:
        capture(model, example)
    assert "\n" not in str(caught.value)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_control_flow_on_values_names_the_module_and_the_line(capsys):
    model = net(lambda self, x: self.gate(F.relu(x)), gate=Branching())
    refused(
        model,
        NotImplementedError,
        r"module 'gate' \(Branching\) cannot be captured .*, at .*test_capture.py:\d+ \(.*if .*\); .* depend on values",
    )
    assert "def forward" not in capsys.readouterr().err  # torch's own report of it, a whole graph


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_computes_is_refused():
    model = net(lambda self, x: F.relu(x))
    nn.utils.weight_norm(model.conv)  # sets a plain tensor before every forward
    with torch.no_grad():
        model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(
        NotImplementedError, match=r"module 'conv' computes the weight of its conv2d .*remove_weight_no"
    ):
        capture(model.eval(), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("product", [lambda x, w: x @ w, lambda x, w: torch.einsum("nk,kj->nj", x, w)])
def test_a_layer_written_as_a_product_is_refused(product):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return product(x.mean((2, 3)), self.weight)[:, :, None, None]

    refused(
        net(lambda self, x: self.head(x), head=Head()), NotImplementedError, r"'head' multiplies by a parameter with"
    )


def large_batches_apart(self, x):
    return F.relu(x) * 2 if x.size(0) > 8 else F.relu(x)


@pytest.mark.parametrize(
    ("body", "rule"),
    [(lambda self, x: F.relu(x).view(2, 4, 8, 8), r"constant \(2\)"), (large_batches_apart, r"size\(\)\[0\] <= 8")],
)
def test_a_model_that_minds_the_batch_size(body, rule):
    refused(net(body), NotImplementedError, rf"must work alike at every batch size.*use x.size\(0\) or -1.*{rule}")


def aside(self, x):
    view = x.view(x.size(0), -1)
    x.relu_()
    return x + view.sum()


def beneath(self, x):
    x.view(x.size(0), -1).mul_(2)
    x[:, 0] = 0
    return F.relu(x)


def split(self, x):
    left, right = x.chunk(2, 1)
    left.relu_()
    return torch.cat([left, right], 1) + x


def after_dropout(self, x):
    dropped = F.dropout(x, 0.5, self.training).flatten(1)
    x.relu_()
    return dropped.view_as(x)


@pytest.mark.parametrize("body", [aside, beneath, split, after_dropout])
def test_a_change_behind_a_view(body):
    refused(net(body), NotImplementedError, r"the model changes a tensor in place by \w+_ and reads it later")


def test_a_change_that_no_view_outlives_is_fine():
    faithful(net(lambda self, x: x.flatten(1).relu_().view(-1, 4, 8, 8)))


def test_batch_norms_without_statistics():
    model = net(lambda self, x: F.relu(self.free(x)), free=nn.BatchNorm2d(4, track_running_stats=False))
    refused(model, NotImplementedError, r"batch norm 'free' normalises by batch statistics \(track_running_stats=False")


def test_a_batch_norm_that_never_runs():
    refused(alive(Net(spare=nn.BatchNorm2d(4))), NotImplementedError, "batch norm 'spare' is never run")


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (lambda x: x.argmax(1), "logits, or dicts, lists and tuples of floating-point tensors, got torch.int64"),
        (lambda x: {"logits": x, "aux": [x, None]}, "floating-point tensors, got NoneType at 'aux.1'"),
        (lambda x: {"logits": (x, {3})}, "floating-point tensors, got set at 'logits.1'"),
        (lambda x: x.mean([1, 2, 3]), r"first dimension is the batch \(2\), .* got \(2,\)"),
        (lambda x: [x, x.mean([2, 3]).t()], r"first dimension is the batch \(2\), .* got \(4, 2\) at '1'"),
        (lambda x: {"heads": []}, "at least one tensor, got none"),
    ],
)
def test_an_output_that_holds_something_else(head, match):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    model.forward = lambda x, run=model.forward: head(run(x))
    with pytest.raises(ValueError, match=f"capture: the model must return .*{match}"):
        capture(model, torch.zeros(2, 3, 8, 8))


def test_outputs_of_one_path():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.forward = lambda x, run=model.forward: {"a.0": run(x), "a": [run(x)]}
    with pytest.raises(ValueError, match=r"a path of its own, got 'a\.0' twice"):
        capture(model, torch.zeros(2, 3, 8, 8))


def test_an_input_that_the_model_rejects_names_the_module():
    refused(
        alive(Net()), ValueError, r"rejects an input of shape \(2, 1, 8, 8\) in module 'conv' \(Conv2d\)", (1, 8, 8)
    )


def test_models_that_are_not():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        capture(portrait, torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="model must have parameters to quantize, got none"):
        capture(nn.Flatten(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"example must be a floating-point tensor, got torch.uint8"):
        capture(Net(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"a batch of two or more, got shape \(1, 3, 8, 8\)"):
        capture(Net(), torch.zeros(1, 3, 8, 8))


def test_a_model_that_cannot_be_copied():
    model = Net()
    model.cache = model.conv.weight * 2  # not a leaf: deepcopy refuses it
    refused(model, ValueError, "the model cannot be copied: Only Tensors created explicitly")


def test_a_weight_that_is_computed():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.conv)
    refused(model, NotImplementedError, r"'conv[^']*' computes the weight of its conv2d while it runs")
    nn.utils.parametrize.remove_parametrizations(model.conv, "weight")
    faithful(alive(model))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda self, x: F.dropout(F.relu(x), 0.5), "the model applies dropout in eval mode"),
        (lambda self, x: x + torch.randn_like(x), "draws random numbers in eval mode"),
    ],
)
def test_a_random_model(body, match):
    with torch.random.fork_rng(), pytest.raises(NotImplementedError, match=match):
        capture(net(body), torch.zeros(2, 3, 8, 8))


def test_an_autocast_region():
    def body(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.inner(x)
        return x.float()

    refused(net(body, inner=pointwise(4, 4)), NotImplementedError, "under wrap_with_autocast")
