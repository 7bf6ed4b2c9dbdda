"""The distillation loss: which idea switches which term, what a step costs, and where gradients go."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zsq_ext.core.steps import sum_terms
from zsq_ext.methods import synq
from zsq_ext.ops import distill_head
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.fuse import fuse
from zsq_ext.quant.graph import find
from zsq_ext.quant.modules import calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.quant.structure import cam_layer, classifier_tail
from zsq_ext.tune.cam import autograd_alpha
from zsq_ext.tune.distill import DistillConfig, Distiller, _Network
from zsq_ext.tune.ideas import Agm, CamAlign, FeatureAlign, LowPass, Mix, Perturb, SoftLabels
from zsq_ext.tune.losses import feature_alignment, signed_perturbation
from zsq_ext.zoo.small_nets import mobilenet_small, resnet20

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def student_of(network, images):
    student = prepare(network, QConfig(4, 4))
    with calibrating(student), torch.no_grad():
        student(images)
    return student


@pytest.fixture(scope="module")
def student(teacher):
    return student_of(teacher, IMAGES)


@pytest.fixture(scope="module")
def vgg(nets):
    network = capture(nets.vgg(), torch.zeros(2, 3, 8, 8))
    return network, student_of(network, IMAGES)


def captured_zoo(nets, build):
    network = capture(nets.seen(build, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    return network, student_of(network, images), images


@pytest.fixture(scope="module")
def big(nets):
    return captured_zoo(nets, resnet20)


@pytest.fixture(scope="module")
def mobile(nets):
    return captured_zoo(nets, mobilenet_small)


class Everywhere:
    """A module tracker that tracks nothing: torch's own refuses gradients with respect to a leaf, such as an image."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def counting_flops():
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Everywhere()
    return counter


def terms_of(teacher, student, *ideas, images=IMAGES, labels=LABELS, **fields):
    return Distiller(teacher, student, DistillConfig(ideas=ideas, **fields))(images, labels)


def test_without_ideas_it_is_plain_distillation_bit_for_bit(teacher, student):
    terms = terms_of(teacher, student)
    logits = fuse(student)(IMAGES)
    with torch.no_grad():
        target = fuse(teacher)(IMAGES)
    head = distill_head(logits, target, LABELS, alpha=20.0, temperature=20.0, ce=0.5)
    plain = {"kd": head.kd, "ce": head.ce}
    assert terms.keys() == plain.keys()
    for name in plain:
        assert torch.equal(terms[name], plain[name]), name
    parameters = list(student.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(sum_terms(terms), parameters),
        torch.autograd.grad(torch.stack(list(plain.values())).sum(), parameters),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert "ce" not in terms_of(teacher, student, ce=0.0)


@pytest.mark.parametrize(
    ("idea", "added"),
    [
        (CamAlign(weight=50), {"cam"}),
        (FeatureAlign(weight=1000), {"fa"}),
        (Perturb(), {"kd_perturbed", "ce_perturbed"}),
        (LowPass(d0=2), set()),  # changes images, not the loss
        (SoftLabels(tau=1.0, strict=False), set()),  # trusts everyone
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_idea_switches_exactly_its_term(teacher, student, idea, added):
    plain, more = terms_of(teacher, student), terms_of(teacher, student, idea)
    assert more.keys() - plain.keys() == added
    for name in plain:
        assert torch.equal(plain[name], more[name]), name
    for name in added:
        assert more[name] > 0
    if hasattr(idea, "weight"):
        assert terms_of(teacher, student, replace(idea, weight=0)).keys() == plain.keys()
        twice = terms_of(teacher, student, replace(idea, weight=2 * idea.weight))
        for name in added:
            assert torch.equal(twice[name], 2 * more[name])  # a factor of two is exact


def test_soft_labels_change_the_cross_entropy_alone(teacher, student):
    plain, soft = terms_of(teacher, student), terms_of(teacher, student, SoftLabels(tau=0.5))
    with torch.no_grad():
        easy = 1 - teacher(IMAGES).softmax(1)[range(6), LABELS] < 0.5
        expected = distill_head(student(IMAGES), teacher(IMAGES), LABELS, ce=0.5, easy=easy).ce
    assert 0 < int(easy.sum()) < len(LABELS)  # the batch has both kinds
    assert torch.equal(soft["kd"], plain["kd"])
    assert torch.equal(soft["ce"], expected)


def test_at_the_threshold_the_profiles_differ(teacher, student):
    """tau is the difficulty of one sample: released code (strict) drops its label, the paper keeps it.

    What the head computes may be a unit in the last place beside what is computed here, so neighbours are tried.
    """
    with torch.no_grad():
        delta = 1 - fuse(teacher)(IMAGES).softmax(1)[range(6), LABELS]
    middle, differ = delta.sort().values[2], []
    for steps in range(-8, 9):
        tau = (middle + steps * 2**-24).item()
        released, paper = (
            terms_of(teacher, student, SoftLabels(tau=tau, strict=strict))["ce"] for strict in (True, False)
        )
        assert paper >= released
        differ += [tau] if paper > released else []
    assert len(differ) == 1


def test_the_perturbed_bracket_is_the_clean_one_on_moved_images(teacher, student):
    """The mask of the clean images is kept, and so is the order of the terms."""
    ideas = (SoftLabels(tau=0.5), FeatureAlign(10.0))
    for through_teacher in (False, True):
        idea = Perturb(weight=3.0, eps=0.05, through_teacher=through_teacher, feature_alignment=True)
        terms = terms_of(teacher, student, *ideas, idea)
        x = IMAGES.clone().requires_grad_()
        distiller = Distiller(teacher, student, DistillConfig(ideas=ideas))
        with torch.set_grad_enabled(through_teacher):
            target = distiller._teacher.run(x, with_grad=through_teacher)
        seen = distiller._student.run(x, with_grad=True)
        head = distill_head(seen.logits, target.logits, LABELS, alpha=20.0, ce=0.5, tau=0.5)
        clean = head.kd + head.ce + 10 * feature_alignment(target.features, seen.features)
        moved = signed_perturbation(x, torch.autograd.grad(clean, x)[0], 0.05)
        with torch.no_grad():
            hard = terms_of(teacher, student, FeatureAlign(10.0), images=moved)
            ce = distill_head(student(moved), teacher(moved), LABELS, ce=0.5, easy=head.easy).ce
        # the sign of a gradient near zero may turn on an fp32 rounding, so a few pixels may move the other way
        assert terms["kd_perturbed"].item() == pytest.approx(3 * hard["kd"].item(), rel=1e-3)
        assert terms["fa_perturbed"].item() == pytest.approx(3 * hard["fa"].item(), rel=1e-3)
        assert terms["ce_perturbed"].item() == pytest.approx(3 * ce.item(), rel=1e-3)


@pytest.mark.parametrize("network", ["residual", "vgg"])
@pytest.mark.parametrize("through", [False, True])
def test_the_direction_flows_through_the_teacher_only_when_asked(teacher, student, vgg, monkeypatch, network, through):
    """With and without CAM alignment, which keeps a graph of its own on a network without a closed form."""
    pair = (teacher, student) if network == "residual" else vgg
    directions = {}
    for cam in (False, True):
        seen = []
        monkeypatch.setattr(
            "zsq_ext.tune.distill.signed_perturbation",
            lambda x, g, eps, seen=seen: (seen.append(g), signed_perturbation(x, g, eps))[1],
        )
        ideas = (Perturb(through_teacher=through), *([CamAlign()] if cam else []))
        terms_of(*pair, *ideas)
        (directions[cam],) = seen
    assert torch.equal(directions[False], directions[True])
    x = IMAGES.clone().requires_grad_()
    target = pair[0](x)
    kd = distill_head(pair[1](x), target if through else target.detach(), alpha=20.0).kd
    ce = torch.nn.functional.cross_entropy(pair[1](x), LABELS)
    (expected,) = torch.autograd.grad(kd + 0.5 * ce, x)
    # two forwards of the student here, one there: their gradients are added in another order. Fp32, scale of the whole
    torch.testing.assert_close(directions[True], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_teacher_gets_no_gradient_and_no_hooks(teacher, student, tools):
    config = synq.TUNING["cifar"].distill
    distiller = Distiller(teacher, student, config)
    for _ in range(3):
        sum_terms(distiller(IMAGES, LABELS)).backward()
        assert tools.hooks_on(teacher) + tools.hooks_on(student) == 0
        assert tools.hooks_on(distiller._teacher._tapped) + tools.hooks_on(distiller._student._tapped) == 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    for parameter in student.parameters():
        parameter.grad = None


@pytest.mark.parametrize("profile", ["repo", "paper"])
def test_a_step_runs_each_network_twice(teacher, student, profile):
    distiller = Distiller(teacher, student, synq.config("imagenet", profile).tune.distill)
    for step in (1, 2):
        distiller(IMAGES, LABELS)
        assert distiller._student.calls == 2 * step
        assert distiller._teacher.calls == 2 * step


def test_plain_distillation_runs_each_network_once(teacher, student):
    distiller = Distiller(teacher, student, DistillConfig())
    distiller(IMAGES, LABELS)
    assert (distiller._student.calls, distiller._teacher.calls) == (1, 1)


@pytest.mark.parametrize(("profile", "limit"), [("repo", 10), ("paper", 9)])
def test_a_step_costs_no_more_than_ten_forwards(big, profile, limit):
    """Counted on ResNet-20: the released code takes 22. The paper's profile saves the teacher's input gradient."""
    network, student, images = big
    labels = torch.tensor([1, 7])
    with counting_flops() as one, torch.no_grad():
        network(images)
    # 40.8 M multiply-adds per image in the specification's table, two FLOPs each, two images
    assert one.get_total_flops() == pytest.approx(2 * 2 * 40.8e6, rel=0.01)
    distiller = Distiller(network, student, synq.config("imagenet", profile).tune.distill)
    parameters = list(student.parameters())
    with counting_flops() as step:
        torch.autograd.grad(sum_terms(distiller(images, labels)), parameters)
    passes = step.get_total_flops() / one.get_total_flops()
    assert limit - 0.5 < passes <= limit  # and nothing was left uncounted


def alphas(network, images, classes):
    """(ours, autograd's) on a captured network with a closed form."""
    seer = _Network(network, align=False, cam=True)
    assert seer._tail is not None
    x = images.clone().requires_grad_()
    seen = seer.run(x, with_grad=True, maps=True)
    return seer.alpha(seen, classes), autograd_alpha(seen.logits, seen.cam["map"], classes), seen.cam["map"]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_small"])
def test_closed_form_equals_autograd_on_teacher_and_student(big, mobile, name):
    network, student, images = big if name == "resnet20" else mobile
    for module in (network, student):
        ours, theirs, maps = alphas(module, images, torch.tensor([2, 9]))
        positions = maps.shape[2] * maps.shape[3]
        assert theirs.ne(0).float().mean() > 0.5
        # autograd averages up to H W equal numbers, each after a handful of roundings of 2^-24
        torch.testing.assert_close(ours, theirs, rtol=(positions + 8) * 2**-24, atol=0)


def test_mobilenets_map_is_its_last_feature_convolution(mobile):
    network, student, _ = mobile
    for module in (network, student):
        tail = classifier_tail(module)
        assert tail.activation == "relu6"
        assert tail.batch_norm.weight == "features.10.1.weight"
        assert tuple(find(module, tail.features).meta["val"].shape[1:]) == (256, 8, 8)


def test_a_tail_without_a_closed_form_uses_its_last_map_larger_than_one_pixel(vgg):
    network, student = vgg
    for module in vgg:
        assert classifier_tail(module) is None
        assert tuple(find(module, cam_layer(module)).meta["val"].shape[1:]) == (8, 4, 4)
    terms = terms_of(network, student, CamAlign())  # no perturbation: nothing else asks the teacher for a graph
    assert torch.isfinite(terms["cam"])
    assert terms["cam"] > 0
    gradients = torch.autograd.grad(terms["cam"], list(student.parameters()), allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in gradients)
    seer = _Network(network, align=False, cam=True)
    seen = seer.run(IMAGES, maps=True)
    assert not seen.logits.requires_grad
    classes = seen.logits.argmax(1)
    x = IMAGES.clone().requires_grad_()
    again = seer.run(x, with_grad=True, maps=True)
    assert torch.equal(seer.alpha(seen, classes), autograd_alpha(again.logits, again.cam["map"], classes))


def test_a_last_map_of_one_position_gives_way_to_an_earlier_one(nets):
    """A network for larger images: its last maps have shrunk to 1 x 1, and the first one has not."""
    module = capture(nets.residual(), torch.zeros(2, 3, 2, 2))
    assert classifier_tail(module) is not None
    student = prepare(module, QConfig(4, None))
    terms = Distiller(module, student, DistillConfig(ideas=(CamAlign(),)))(torch.randn(4, 3, 2, 2), LABELS[:4])
    assert terms["cam"] >= 0
    assert torch.isfinite(terms["cam"])


def test_networks_that_cannot_be_aligned_are_refused(nets):
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    network = capture(flat, torch.zeros(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"convolution with a map larger than 1 x 1 for CamAlign, got none; ideas="):
        Distiller(network, network, DistillConfig(ideas=(CamAlign(),)))
    with pytest.raises(ValueError, match="must have batch norms for FeatureAlign to compare, got none; ideas="):
        Distiller(network, network, DistillConfig(ideas=(FeatureAlign(),)))
    Distiller(network, network, DistillConfig(ideas=(CamAlign(0), FeatureAlign(0))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowPass(d0=0), "LowPass: d0 must be positive, got 0"),
        (lambda: LowPass(when="later"), 'LowPass: when must be "once" or "step", got \'later\''),
        (lambda: CamAlign(weight=-1), "CamAlign: weight must be at least 0, got -1"),
        (lambda: CamAlign(rule="best"), 'CamAlign: rule must be "argmax" or "label", got \'best\''),
        (lambda: CamAlign(normalise="max"), "CamAlign: normalise must be one of minmax_upsampled, raw, minmax_native"),
        (lambda: SoftLabels(tau=1.5), r"SoftLabels: tau must be in \[0, 1\], got 1.5"),
        (lambda: FeatureAlign(weight=-1), "FeatureAlign: weight must be at least 0"),
        (lambda: Perturb(eps=0), "Perturb: eps must be positive, got 0"),
        (lambda: Perturb(weight=-1), "Perturb: weight must be at least 0"),
        (lambda: Agm(weight=-1), "Agm: weight must be at least 0, got -1"),
        (lambda: Agm(form="hinge"), "Agm: form must be one of smooth_hinge, gauss, erfc, got 'hinge'"),
        (lambda: Agm(discrepancy="l1"), "Agm: discrepancy must be one of normalized, mse, got 'l1'"),
        (lambda: Agm(margin=0), "Agm: margin must be None or positive and finite, got 0"),
        (lambda: Agm(sigma=math.inf), "Agm: sigma must be None or positive and finite, got inf"),
        (lambda: Agm(margin_factor=0), "Agm: margin_factor must be positive and finite, got 0"),
        (lambda: Agm(sigma_factor=-1), "Agm: sigma_factor must be positive and finite, got -1"),
        (lambda: Agm(limit_below=2), r"Agm: limit_below must be in \[0, 1\], got 2"),
        (lambda: Mix(a=0), "Mix: a must be positive and finite, got 0"),
        (lambda: Mix(probability=1.5), r"Mix: probability must be in \[0, 1\], got 1.5"),
        (lambda: Mix(per_sample=1), "Mix: per_sample must be True or False, got 1"),
        (lambda: Mix(teacher="no"), "Mix: teacher must be True or False, got 'no'"),
    ],
)
def test_ideas_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()
