"""The network inside a detector: by structure, sharing its modules, and the same numbers that the whole detector sees.

Broken on purpose: maps in the order of their names, normalisation left to the caller (both
test_the_heads_are_those_of_the_whole).
"""

import collections
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zsq_ext.quant import graph
from zsq_ext.quant.capture import capture
from zsq_ext.zoo.raw_heads import RawHeads, input_spec


class Backbone(nn.Module):
    def __init__(self, lone):
        super().__init__()
        self.one, self.two, self.lone = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), lone

    def forward(self, x):
        fine = F.relu(self.one(x))
        coarse = F.relu(self.two(fine))
        return coarse if self.lone else collections.OrderedDict([("p3", fine), ("extra", coarse)])


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_logits, self.bbox_regression = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        def every(conv, columns):
            maps = [conv(level).permute(0, 2, 3, 1) for level in x]
            return torch.cat([y.reshape(y.shape[0], -1, columns) for y in maps], dim=1)

        return {"cls_logits": every(self.cls_logits, 6), "bbox_regression": every(self.bbox_regression, 4)}


class Detector(nn.Module):
    """Lists in, lists of dicts out, as torchvision's: nothing that could be one graph."""

    def __init__(self, lone=False):
        super().__init__()
        self.backbone, self.head = Backbone(lone), Head()
        self.transform = types.SimpleNamespace(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
        self.seen = None

    def forward(self, images):
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.transform.image_mean, self.transform.image_std))
        maps = self.backbone(torch.stack([(image - mean) / std for image in images]))
        self.seen = self.head([maps] if isinstance(maps, torch.Tensor) else list(maps.values()))
        scores, labels = self.seen["cls_logits"].sigmoid().max(2)
        rows = zip(self.seen["bbox_regression"], scores, labels, strict=True)
        return [{"boxes": box[score > 0.5], "labels": label[score > 0.5]} for box, score, label in rows]


@pytest.mark.parametrize("lone", [False, True])
def test_the_heads_are_those_of_the_whole(lone):
    torch.manual_seed(0)
    detector = Detector(lone).eval()
    spec = input_spec(detector, 16, 24)
    images = torch.rand(3, *spec.shape)
    detector(list(images))
    network = RawHeads(detector)
    module = capture(network, torch.zeros(2, *spec.shape))
    got = module(spec.normalise(images))
    for name, expected in detector.seen.items():
        assert torch.equal(got[name], expected)
    names = dict(detector.named_parameters())
    assert all(names[name] is parameter for name, parameter in network.named_parameters())
    assert dict(module.named_parameters()).keys() == names.keys()
    assert list(graph.outputs(module)) == ["cls_logits", "bbox_regression"]
    assert (spec.shape, spec.mean, spec.std) == ((3, 16, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    assert spec.valid_range == (0, 1)


def test_what_has_no_raw_heads():
    two_stages = Detector()
    two_stages.roi_heads = nn.Identity()
    with pytest.raises(ValueError, match="RawHeads: detector must be of a single shot, got one with 'roi_heads'"):
        RawHeads(two_stages)
    with pytest.raises(ValueError, match="RawHeads: detector must have a module 'backbone', got Linear"):
        RawHeads(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"input_spec: detector must have transform\.image_mean"):
        input_spec(nn.Linear(2, 2), 8, 8)
