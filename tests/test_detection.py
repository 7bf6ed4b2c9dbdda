"""The shipped detector, end to end: what its file says, and that 8 bits cost it nothing that its scenes could tell.

AP of a sample of scenes has a spread, and so has the difference of two networks on them. Both are estimated from the
sample itself by leaving out one tenth of the scenes after the other (the delete-a-group jackknife): with AP_i the
figure without tenth i, se^2 = 9/10 sum (AP_i - mean)^2, and a deviation of more than t se, Student's t with 9 degrees
of freedom, has another cause than chance.

Broken on purpose, and which test saw it: another normalisation, weights that were not loaded
(test_the_file_says_how_good_it_is); activations of 3 bits, ranges a quarter as wide
(test_eight_bits_cost_nothing_that_can_be_told_from_chance); a spread that is ten times as wide
(test_four_bits_cost_what_can_be_told_from_chance).
"""

import statistics
from math import sqrt

import pytest
import torch

from zsq_ext.quant import graph
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.zoo import teachers
from zsq_ext.zoo.average_precision import average_precision
from zsq_ext.zoo.shape_scenes import SPEC, Objects, ShapeScenes
from zsq_ext.zoo.small_detector import decode

pytest.importorskip("pycocotools")

IMAGES, GROUPS = 200, 10
T_999 = 4.781  # Student's t, 9 degrees of freedom: chance alone goes further once in a thousand times


@pytest.fixture(scope="module")
def network():
    return capture(teachers.detector(), torch.zeros(2, *SPEC.shape))


@pytest.fixture(scope="module")
def scenes():
    return ShapeScenes("test").images(range(IMAGES))


def precisions(network, scenes):
    """By figure, its value on all scenes, and without each tenth of them."""
    images, truth = scenes
    with torch.no_grad():
        found = decode(network(images), SPEC.shape[1:])
    rows = [average_precision(found, truth)]
    for group in range(GROUPS):
        kept = [i for i in range(IMAGES) if i % GROUPS != group]
        rows.append(average_precision([found[i] for i in kept], Objects(*(part[kept] for part in truth))))
    return {figure: [row[figure] for row in rows] for figure in rows[0]}


def resolution(values):
    """How far chance takes a figure, from its values without each tenth: t se."""
    mean = statistics.fmean(values)
    return T_999 * sqrt((GROUPS - 1) / GROUPS * sum((value - mean) ** 2 for value in values))


def costs(network, scenes, whole, config):
    """By figure, what quantization costs and what of that chance could be; the same scenes for both."""
    student = prepare(network, config)
    images, _ = ShapeScenes("train").images(range(64))
    with calibrating(student), torch.no_grad():
        for chunk in images.split(16):
            student(chunk)
    assert all(path.split(".")[0] in ("classes", "boxes") for path in graph.outputs(student))
    quantized = precisions(student, scenes)
    differences = {name: [a - b for a, b in zip(whole[name], quantized[name], strict=True)] for name in whole}
    return {name: (cost, resolution(others)) for name, (cost, *others) in differences.items()}


@pytest.fixture(scope="module")
def float_precision(network, scenes):
    return precisions(network, scenes)


def test_the_file_says_how_good_it_is(float_precision):
    facts = teachers.facts("fpn_small")
    assert facts["task"] == "shape_scenes, seed 0"
    for name, (value, *others) in float_precision.items():
        # 200 of the 1,000 images that the file's figures are of
        assert value == pytest.approx(float(facts[f"{name.lower()}_test"]), abs=resolution(others)), name


def test_a_file_fits_into_a_wheel():
    assert (teachers.WEIGHTS / "fpn_small.safetensors").stat().st_size <= 1.5e6


def test_eight_bits_cost_nothing_that_can_be_told_from_chance(network, scenes, float_precision):
    """With every layer's output rounded, the heads' and the image too: the other placements round less."""
    for name, (cost, chance) in costs(network, scenes, float_precision, QConfig(8, 8, "all_layers")).items():
        assert abs(cost) < chance, name


def test_four_bits_cost_what_can_be_told_from_chance(network, scenes, float_precision):
    """So many scenes are enough to see a loss."""
    for name, (cost, chance) in costs(network, scenes, float_precision, QConfig(4, 8)).items():
        assert cost > chance, name


def test_unknown_names():
    with pytest.raises(ValueError, match="detector: name must be one of fpn_small, got 'resnet20'"):
        teachers.detector("resnet20")
    with pytest.raises(ValueError, match="teacher: name must be one of resnet20, mobilenet_small, got 'fpn_small'"):
        teachers.teacher("fpn_small")
