"""The shipped detector, end to end: what its file says, and that 8 bits cost it next to nothing.

Broken on purpose, and which test saw it: another normalisation, weights that were not loaded
(test_the_file_says_how_good_it_is); activations of 3 bits, ranges a quarter as wide
(test_eight_bits_cost_next_to_nothing).
"""

import pytest
import torch

from zsq_ext.quant import graph
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import PLACEMENTS, QConfig
from zsq_ext.quant.modules import calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.zoo import teachers
from zsq_ext.zoo.average_precision import precision_of
from zsq_ext.zoo.shape_scenes import SPEC, ShapeScenes

pytest.importorskip("pycocotools")

IMAGES = 200


@pytest.fixture(scope="module")
def network():
    return capture(teachers.detector(), torch.zeros(2, *SPEC.shape))


@pytest.fixture(scope="module")
def scenes():
    return list(ShapeScenes("test").batches(IMAGES, 100))


@pytest.fixture(scope="module")
def float_precision(network, scenes):
    return precision_of(network, scenes)


def test_the_file_says_how_good_it_is(float_precision):
    facts = teachers.facts("fpn_small")
    assert facts["task"] == "shape_scenes, seed 0"
    for name, value in float_precision.items():
        # 200 of 1,000 images: the five such parts lie within 2.2 points of the whole
        assert value == pytest.approx(float(facts[f"{name.lower()}_test"]), abs=4)


def test_a_file_fits_into_a_wheel():
    assert (teachers.WEIGHTS / "fpn_small.safetensors").stat().st_size <= 1.5e6


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_eight_bits_cost_next_to_nothing(network, scenes, float_precision, placement):
    student = prepare(network, QConfig(8, 8, placement))
    images, _ = ShapeScenes("train").images(range(64))
    with calibrating(student), torch.no_grad():
        for chunk in images.split(16):
            student(chunk)
    assert all(path.split(".")[0] in ("classes", "boxes") for path in graph.outputs(student))
    eight = precision_of(student, scenes)
    # the same images for both, so only boxes whose overlap lies within a hair of a threshold change sides: 0.6 points
    # at most on any fifth of the test images; 4-bit weights cost 5
    for name, value in float_precision.items():
        assert eight[name] == pytest.approx(value, abs=1.5), name


def test_unknown_names():
    with pytest.raises(ValueError, match="detector: name must be one of fpn_small, got 'resnet20'"):
        teachers.detector("resnet20")
    with pytest.raises(ValueError, match="teacher: name must be one of resnet20, mobilenet_small, got 'fpn_small'"):
        teachers.teacher("fpn_small")
