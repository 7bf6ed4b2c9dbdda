"""Networks with several outputs, prepared and judged: sites, blocks, students, quality.

What was broken on purpose, and which test saw it:

    one last layer only, the last in the graph           test_every_head_has_a_last_layer
    any output is an edge, a feature map too             test_a_feature_map_on_its_way_is_no_edge
    the output's site named by the first head            test_the_outputs_are_sites_by_their_path
    a region of a pyramid closed though a head reads it  test_blocks_are_closed
    a join of levels taken as a residual unit            test_blocks_are_closed
    the first output in the place of the worst one       test_quality_of_heads
"""

import copy
import math

import heads_nets
import pytest
import torch
import torch.nn.functional as F
from heads_nets import BUILD, SIZE, equal, normal
from torch import nn

from zsq_ext.quant import graph, quality, sites, structure
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import PLACEMENTS, QConfig
from zsq_ext.quant.fuse import fuse, fuse_with_statistics
from zsq_ext.quant.modules import activation_quantizers, calibrating
from zsq_ext.quant.prepare import plan, prepare, weights_together

models = heads_nets.models
modules = heads_nets.modules


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
