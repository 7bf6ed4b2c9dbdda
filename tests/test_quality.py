"""Label-free quality: nothing lost reads as nothing lost, fewer bits as more lost, every row is its own experiment."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from zsq_ext.quant import quality
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import ActivationQuantizer, WeightQuantizer, calibrating
from zsq_ext.quant.prepare import prepare


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build():
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU6()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i) * (2 / parameter[0].numel()) ** 0.5)
        model[1].weight.fill_(1)
    return model


@pytest.fixture(scope="module")
def teacher():
    return capture(build(), torch.zeros(2, 3, 8, 8))


@pytest.fixture(scope="module")
def images():
    return normal(70, 3, 8, 8, seed=9)


def student_of(teacher, config, images):
    student = prepare(teacher, config)
    with calibrating(student), torch.no_grad():
        student(images)
    return student


def measured(teacher, images, *bits, **options):
    config = QConfig(*bits, **options)
    return quality.measure(teacher, student_of(teacher, config, images), config, images)


def kl(teacher_logits, student_logits):
    p, q = (x.double().softmax(1) for x in (teacher_logits, student_logits))
    return (p * (p / q).log()).sum(1).mean().item()


def test_nothing_lost(images):
    """Weights on the very grid of 8 bits: multiples of 1/16 that reach from -8 to 127/16 in every channel."""
    model = build()
    with torch.no_grad():
        for layer in (model[0], model[3], model[7]):
            codes = (layer.weight.flatten(1) * 40).round().clamp(-128, 127)
            codes[:, 0], codes[:, 1] = -128, 127
            layer.weight.copy_(codes.view_as(layer.weight) / 16)
    exact = capture(model, torch.zeros(2, 3, 8, 8))
    found = measured(exact, images, 8, None)
    assert (found.images, found.agreement, found.kl) == (70, 100.0, 0.0)
    assert [(row.sqnr_db, row.kl_alone) for row in found.layers] == [(math.inf, 0.0)] * 3
    assert [row["sqnr_db"] for row in found.to_dict()["layers"]] == [None] * 3
    json.dumps(found.to_dict(), allow_nan=False)


def test_every_bit_is_worth_six_decibels(teacher, images):
    found = {bits: measured(teacher, images, bits, bits) for bits in (2, 4, 8)}
    assert found[8].kl < found[4].kl < found[2].kl
    assert found[8].agreement > found[2].agreement
    for two, four, eight in zip(*(found[bits].layers for bits in (2, 4, 8)), strict=True):
        assert (four.site, four.kind, four.bits) == (eight.site, eight.kind, 4)
        assert two.sqnr_db < four.sqnr_db < eight.sqnr_db
        assert 0 < eight.kl_alone < four.kl_alone < two.kl_alone
        if four.kind == "weight":
            # 20 log10(255 / 15) = 24.6 dB for uniform errors; hundreds of values spread that by a decibel or two
            assert eight.sqnr_db - four.sqnr_db == pytest.approx(24.6, abs=3)


def test_rows_by_hand(teacher, images):
    config = QConfig(3, 3)
    student = student_of(teacher, config, images)
    found = quality.measure(teacher, student, config, images)
    with torch.no_grad():
        expected, got = teacher(images), student(images)
    assert found.kl == pytest.approx(kl(expected, got), rel=1e-6)
    assert found.agreement == pytest.approx(100 * (expected.argmax(1) == got.argmax(1)).double().mean().item())
    for row in found.layers:
        alone = copy.deepcopy(student)
        for name, module in student.named_modules():
            if isinstance(module, (WeightQuantizer, ActivationQuantizer)) and module.name != row.site:
                alone.set_submodule(name, nn.Identity())
        with torch.no_grad():
            assert row.kl_alone == pytest.approx(kl(expected, alone(images)), rel=1e-4)  # fp32 logits
    first = found.layers[0]
    path = next(name for name, module in student.named_modules() if getattr(module, "name", None) == first.site)
    weight = teacher.get_parameter("0.weight")
    noise = student.get_submodule(path)(weight) - weight
    decibels = 10 * math.log10(weight.square().sum().item() / noise.square().sum().item())
    assert first.sqnr_db == pytest.approx(decibels, abs=1e-3)


def test_printed_it_says_both_figures_and_has_a_line_per_layer(teacher, images):
    found = measured(teacher, images, 3, 3)
    head, explained, *rows = str(found).splitlines()
    assert head == f"agreement {found.agreement:.1f} %, KL {found.kl:.4f} nats on 70 held-out images"
    assert "SQNR" in explained
    assert [row.split()[0] for row in rows] == [layer.site for layer in found.layers]
    assert all(f"{layer.sqnr_db:.1f} dB" in row for row, layer in zip(rows, found.layers, strict=True))


def test_a_coarse_site_stands_out(teacher, images):
    found = measured(teacher, images, 8, 8, sites={"3.weight": 2})
    worst = max(found.layers, key=lambda row: row.kl_alone)
    assert (worst.site, worst.bits) == ("3.weight", 2)
    assert min(found.layers, key=lambda row: row.sqnr_db).site == "3.weight"


def test_a_tuned_student_is_compared_with_the_teacher(teacher, images):
    config = QConfig(8, None)
    student = student_of(teacher, config, images)
    with torch.no_grad():
        student.get_parameter("7.weight").mul_(2)
    rows = {row.site: row for row in quality.measure(teacher, student, config, images).layers}
    # the noise is the weight itself: 0 dB; quantizing the teacher's own weight costs next to nothing
    assert rows["7.weight"].sqnr_db == pytest.approx(0, abs=0.1)
    assert rows["7.weight"].kl_alone < 1e-3


def test_batches_do_not_matter(teacher, images, monkeypatch):
    student = student_of(teacher, QConfig(4, 4), images)
    whole = quality.measure(teacher, student, QConfig(4, 4), images)
    monkeypatch.setattr(quality, "BATCH", 7)
    parts = quality.measure(teacher, student, QConfig(4, 4), images)
    assert parts.agreement == whole.agreement
    # sums in double of what fp32 convolutions give at another batch size
    assert parts.kl == pytest.approx(whole.kl, rel=1e-4)
    for a, b in zip(parts.layers, whole.layers, strict=True):
        assert a.sqnr_db == pytest.approx(b.sqnr_db, abs=1e-3)
        assert a.kl_alone == pytest.approx(b.kl_alone, rel=1e-3)


def test_a_dead_layer_lost_nothing(images):
    model = build()
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.fill_(-1)
    found = measured(capture(model, torch.zeros(2, 3, 8, 8)), images, 4, 4)
    rows = {row.site: row.sqnr_db for row in found.layers}
    assert rows["3.weight"] == rows["4:hardtanh"] == math.inf
    assert not any(math.isnan(row.sqnr_db) for row in found.layers)


def test_measuring_changes_neither_network(teacher, images):
    config = QConfig(4, 4, "all_layers")
    student = student_of(teacher, config, images)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (teacher, student)]
    quality.measure(teacher, student, config, images)
    for network, state in zip((teacher, student), before, strict=True):
        assert network.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())


def test_no_images_are_refused(teacher, images):
    student = student_of(teacher, QConfig(4, 4), images)
    with pytest.raises(ValueError, match="measure: images must hold at least one image, got none"):
        quality.measure(teacher, student, QConfig(4, 4), images[:0])
