"""Networks with several outputs: captured, read, prepared and judged; frozen batch norms seen as what they are.

The doubles below have the output structures, the shared heads and the frozen batch norms of torchvision's RetinaNet and
SSDLite. What was broken on purpose, and which test saw it:

    the outputs in the order of their names              test_the_structure_comes_back
    one last layer only, the last in the graph           test_every_head_has_a_last_layer
    any output is an edge, a feature map too             test_a_feature_map_on_its_way_is_no_edge
    the output's site named by the first head            test_the_outputs_are_sites_by_their_path
    a region of a pyramid closed though a head reads it  test_blocks_are_closed
    a join of levels taken as a residual unit            test_blocks_are_closed
    eps left out of the thawed batch norm                test_a_frozen_batch_norm_is_one
    thawed by its buffers' names alone                   test_what_only_looks_frozen_stays
    the first output in the place of the worst one       test_quality_of_heads
"""

import collections
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zsq_ext.quant import graph, quality, sites, structure
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import PLACEMENTS, QConfig
from zsq_ext.quant.frozen import thaw
from zsq_ext.quant.fuse import fuse, fuse_with_statistics
from zsq_ext.quant.modules import activation_quantizers, calibrating
from zsq_ext.quant.prepare import plan, prepare, weights_together
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


# Sites


def test_the_outputs_are_sites_by_their_path(modules):
    def named(name):
        return {s.name: s.node for s in sites.activations_all_layers(modules[name]) if s.name.startswith("output")}

    assert list(named("retina")) == ["output:cls_logits", "output:bbox_regression"]
    assert list(named("ssdlite")) == ["output:bbox_regression", "output:cls_logits"]
    found = named("fpn_small")
    assert list(found) == ["output:classes.0", "output:classes.1", "output:boxes.0", "output:boxes.1"]
    for path, leaf in graph.outputs(modules["fpn_small"]).items():
        assert found[f"output:{path}"] == leaf.name
    names = [s.name for s in sites.activations_all_layers(modules["retina"])]
    assert len(set(names)) == len(names)


def test_every_head_has_a_last_layer(modules):
    def edges(name, placement):
        return {s.name for s in plan(modules[name], QConfig(3, 4, placement, edge_bits=8)) if s.bits == 8}

    after = edges("fpn_small", "after_relu")
    heads = [f"{kind}.{level}" for kind in ("classes", "boxes") for level in (0, 1)]
    assert {n for n in after if n.endswith("weight")} == {"stem.conv.weight", *(f"{h}.1.weight" for h in heads)}
    assert {n.split(":")[0] for n in after if not n.endswith("weight")} == {f"{h}.0.activ" for h in heads}
    assert edges("fpn_small", "all_layers") - after == {"input", *(f"output:{h[:-2]}.{h[-1]}" for h in heads)}
    retina = edges("retina", "after_relu")
    assert {n for n in retina if n.endswith("weight")} == {
        "stem.0.weight",
        "heads.cls_logits.weight",
        "heads.bbox_regression.weight",
    }
    # the outputs are concatenations: what the last layers give on the way to them is an output too
    roles = [s.role for s in sites.activations_all_layers(modules["retina"])]
    assert roles.count("output") == 2 * (4 + 1)


def test_a_feature_map_on_its_way_is_no_edge():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            x = F.relu(self.conv(x))
            return {"features": x, "logits": self.fc(x.mean([2, 3]))}

    module = capture(Net(), torch.zeros(2, 3, 8, 8))
    found = [(s.name, s.role) for s in sites.activations_all_layers(module)]
    assert found == [
        ("input", "input"),
        ("output:features", "activation"),
        ("model:mean", "activation"),
        ("output:logits", "output"),
    ]
    assert [b.weights for b in structure.blocks(module)] == [("conv.weight",), ("fc.weight",)]


# Blocks


def closed(module, block):
    """Nothing enters between a block's two nodes but its input's values, nothing leaves but its output's."""
    nodes = {node.name: node for node in module.graph.nodes}
    fixed = graph.constants(module.graph)
    inside, todo = {nodes[block.output]}, [nodes[block.output]]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in fixed or source is nodes[block.input] or not graph.is_tensor(source) or source in inside:
                continue
            assert source.op != "placeholder", f"{block} reads the image behind its input"
            inside.add(source)
            todo.append(source)
    for node in inside - {nodes[block.output]}:
        assert all(user in inside or not graph.is_tensor(user) for user in node.users), f"{node} is read outside"
    return inside


@pytest.mark.parametrize("name", BUILD)
def test_blocks_are_closed(modules, name):
    module = modules[name]
    place = {node.name: i for i, node in enumerate(module.graph.nodes)}
    blocks, owner = structure.blocks(module), {u: w.name for w in sites.weights(module) for u in w.users}
    layers = []
    for block in blocks:
        inside = closed(module, block)
        mine = [node for node in inside if node.name in owner]
        assert {owner[node.name] for node in mine} == set(block.weights)
        layers += mine
    assert len(layers) == len(set(layers)) == len(owner)  # every layer in one block
    ends = [place[block.output] for block in blocks]
    assert ends == sorted(ends)
    for placement in PLACEMENTS:
        student = prepare(module, QConfig(4, 4, placement))
        again = structure.blocks(student)
        assert [(b.name, b.weights) for b in again] == [(b.name, b.weights) for b in blocks]
        for block, other in zip(blocks, again, strict=True):
            closed(student, other)
            for mine, theirs in ((block.input, other.input), (block.output, other.output)):
                assert graph.through_quantizer(graph.find(student, theirs)).name == mine


def test_blocks_of_the_doubles(modules):
    def names(name):
        return [block.name for block in structure.blocks(modules[name])]

    retina = names("retina")
    assert retina[:4] == ["stem.0", "layers.0", "layers.1", "layers.2"]
    assert [n for n in retina if n.startswith("inner")] == ["inner.2", "inner.1", "inner.0"]
    assert retina.count("heads.cls_logits") == retina.count("towers.cls_logits.0") == 4  # one head, four levels
    ssdlite = names("ssdlite")
    assert ssdlite[:2] == ["stem.0.0", "stages.0"]  # before the first tap: a linear bottleneck, whole
    assert len(ssdlite) == 2 + 3 + 2 * 2 * 2


# Students


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", BUILD)
def test_students_of_detectors(modules, name, placement):
    teacher = modules[name]
    student = prepare(teacher, QConfig(8, 8, placement))
    x = normal(16, 3, SIZE, SIZE)
    with calibrating(student), torch.no_grad():
        student(x)
    assert all(q.batches == 1 for q in activation_quantizers(student))
    with torch.no_grad():
        expected, got = teacher(x), student(x)
    assert list(graph.leaves(got)) == list(graph.leaves(expected))
    for one, other in zip(graph.leaves(expected).values(), graph.leaves(got).values(), strict=True):
        noise = (other - one).square().sum() / one.square().sum()
        # 8 bits over a range of 8 sigma: -37 dB from a quantizer; some tens of them in a row, added up: -20 dB
        assert 0 < noise < 1e-2
    assert equal(weights_together(student)(x), got)
    assert equal(copy.deepcopy(student)(x), got)
    # fused networks round otherwise, so only their float form is compared to the last bits
    outputs, *_ = fuse_with_statistics(teacher)(x)
    for fused in (outputs, fuse(teacher)(x)):
        for one, other in zip(graph.leaves(expected).values(), graph.leaves(fused).values(), strict=True):
            assert (other - one).abs().max() <= 1e-4 * one.abs().max()


def test_every_parameter_of_a_detector_gets_a_gradient(modules):
    student = prepare(modules["retina frozen"], QConfig(8, 8, "all_layers"))
    x = normal(4, 3, SIZE, SIZE)
    with calibrating(student), torch.no_grad():
        student(x)
    sum(leaf.square().mean() for leaf in graph.leaves(student(x)).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in student.parameters())


# Quality


def test_quality_of_heads(modules):
    teacher, config = modules["fpn_small"], QConfig(8, 8, sites={"boxes.1.1.weight": 2})
    student = prepare(teacher, config)
    images = normal(40, 3, SIZE, SIZE)
    with calibrating(student), torch.no_grad():
        student(images)
    found = quality.measure(teacher, student, config, images)
    assert math.isnan(found.agreement)
    assert math.isnan(found.kl)
    assert list(found.outputs_db) == list(graph.outputs(teacher))
    with torch.no_grad():
        pairs = zip(*(graph.leaves(network(images)).values() for network in (teacher, student)), strict=True)
    for db, (one, other) in zip(found.outputs_db.values(), pairs, strict=True):
        one, other = one.double(), other.double()
        by_hand = 10 * math.log10(one.square().sum().item() / (one - other).square().sum().item())
        assert db == pytest.approx(by_hand, abs=1e-3)
    assert min(found.outputs_db, key=found.outputs_db.get) == "boxes.1"
    rows = {row.site: row for row in found.layers}
    assert min(rows.values(), key=lambda row: row.output_db_alone).site == "boxes.1.1.weight"
    assert all(math.isnan(row.kl_alone) for row in rows.values())
    assert found == quality.measure(teacher, student, config, images)
    record = found.to_dict()
    assert (record["agreement"], record["kl"], record["layers"][0]["kl_alone"]) == (None, None, None)
    assert record["outputs_db"] == found.outputs_db
    head, explained, *lines = str(found).splitlines()
    assert head.startswith(f"SQNR of the outputs: classes.0 {found.outputs_db['classes.0']:.1f} dB, ")
    assert head.endswith("on 40 held-out images")
    assert "worst output" in explained
    assert [line.split()[0] for line in lines] == list(rows)
