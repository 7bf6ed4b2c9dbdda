"""The heads of a network: what feeds its outputs, back over what arranges, joins or quantizes.

Each of these turned a test red: concatenations not followed, only the first output, a search that goes on through a
ReLU.
"""

import pytest
import torch
from torch import fx, nn

from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.graph import aten, find
from zsq_ext.quant.prepare import prepare
from zsq_ext.quant.structure import heads


class Branches(nn.Module):
    """A detector's shape: two maps, each with its own convolutions, reshaped and joined."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.classes, self.boxes = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        parts = [self.classes(x), self.boxes(x)]
        joined = torch.cat([part.permute(0, 2, 3, 1).flatten(2) for part in parts], 2)
        return joined.flatten(1)[:, :100]


class Activated(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return torch.relu(self.head(x.flatten(1)))


def weight_of(module, name):
    return str(find(module, name).args[1].target)


def test_a_classifier_has_one_head(teacher, nets):
    (head,) = heads(teacher)
    assert weight_of(teacher, head) == "head.weight"
    assert find(teacher, head).target is aten.linear.default
    vgg = capture(nets.vgg(), torch.zeros(2, 3, 8, 8))
    assert [weight_of(vgg, name) for name in heads(vgg)] == ["classifier.3.weight"]


def test_a_prepared_network_has_the_same_heads(teacher):
    assert heads(prepare(teacher, QConfig(8, 8))) == heads(teacher)


def test_heads_are_found_behind_reshapes_joins_and_slices():
    module = capture(Branches().eval(), torch.zeros(2, 3, 8, 8))
    assert [weight_of(module, name) for name in heads(module)] == ["classes.weight", "boxes.weight"]


def test_several_outputs_in_any_nesting():
    """A dictionary and a list in the place of the one output; the same head under two names is one head."""
    module = capture(Branches().eval(), torch.zeros(2, 3, 8, 8))
    graph = fx.Graph()
    joined = graph.graph_copy(module.graph, copied := {})
    classes, boxes = (copied[find(module, name)] for name in heads(module))
    graph.output({"boxes": [boxes], "classes": (classes, {"again": joined}), "stride": 8})
    several = fx.GraphModule(module, graph)
    assert heads(several) == [classes.name, boxes.name]


def test_an_output_without_a_head_is_refused():
    module = capture(Activated().eval(), torch.zeros(2, 3, 2, 2))
    message = (
        r"^heads: every output must come from a linear layer or a convolution, .*, got 'relu' from 'relu' \(.*relu"
    )
    with pytest.raises(ValueError, match=message):
        heads(module)
