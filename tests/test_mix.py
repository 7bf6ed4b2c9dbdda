"""Linear interpolation: what is drawn, what a mixed batch is, its loss, and fine-tuning on it.

Mutants tried, each red: lam and 1 - lam exchanged in images or in labels; a draw that ignores the step, or follows a
global seed; the coin turned round; one share for all samples; the trust of the first label taken for both; the weight
of the cross-entropy left out for shares per sample; the teacher asked although its answers were mixed; the clean
batch's trust forgotten in the perturbed one; mixing before the filter; Agm let through where nothing is generated.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from recipes import changed

import zsq_ext as zsq
from zsq_ext.core.progress import QUIET
from zsq_ext.core.run import Run
from zsq_ext.core.steps import Stage, sum_terms
from zsq_ext.methods import synq
from zsq_ext.ops import distill_head
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.synth.pixels import PixelConfig
from zsq_ext.tune.distill import DistillConfig, Distiller
from zsq_ext.tune.finetune import TuneConfig, finetune
from zsq_ext.tune.ideas import Agm, CamAlign, FeatureAlign, Mix, Perturb, SoftLabels
from zsq_ext.tune.mix import MixedLabels, Mixer, Mixing, draw

CPU = torch.device("cpu")
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
ORDER = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])


@pytest.fixture(scope="module")
def student(teacher):
    student = prepare(teacher, QConfig(4, 4))
    with calibrating(student), torch.no_grad():
        student(IMAGES)
    return student


def stage(run=None, seed=0):
    return Stage(run or Run(None, {}), "tuning", seed, QUIET)


def mixing(share):
    return Mixing(ORDER, torch.as_tensor(share))


# The draw


def test_a_draw_depends_on_seed_and_step_alone():
    def shares(seed, idea=None):
        torch.manual_seed(len(seen))
        return [
            (m.order.tolist(), m.share.tolist())
            for m in (draw(stage(seed=seed), n, 8, idea or Mix(), CPU) for n in range(6))
        ]

    seen = []
    seen.append(shares(0))
    assert shares(0) == seen[0]
    assert shares(1) != seen[0]
    assert len({str(one) for one in seen[0]}) == 6
    assert shares(0, Mix(probability=1 - 1e-9)) != seen[0]  # a coin was thrown
    assert all(sorted(order) == list(range(8)) for order, _ in seen[0])


@pytest.mark.parametrize("a", [0.2, 1.0, 5.0])
def test_shares_are_beta_distributed(a):
    shares = draw(stage(), 0, 40_000, Mix(a=a, per_sample=True), CPU).share
    assert shares.dtype == torch.float32
    assert shares.shape == (40_000,)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares.var().item() == pytest.approx(0.25 / (2 * a + 1), rel=0.03)  # Beta(a, a)'s
    assert draw(stage(), 0, 4, Mix(a=a), CPU).share.shape == ()


def test_the_probability_is_of_mixing_at_all():
    mixed = [draw(stage(), n, 4, Mix(probability=0.3), CPU) is not None for n in range(2000)]
    assert sum(mixed) / 2000 == pytest.approx(0.3, abs=0.04)
    assert all(draw(stage(), n, 4, Mix(probability=0), CPU) is None for n in range(50))
    assert all(draw(stage(), n, 4, Mix(), CPU) is not None for n in range(50))


# The batch


@pytest.mark.parametrize("share", [0.3, torch.linspace(0, 1, 8)], ids=["batch", "samples"])
def test_a_batch_is_mixed_with_itself(share):
    m = mixing(share)
    each = m.share.expand(8)
    for x in (IMAGES, IMAGES.to(memory_format=torch.channels_last), IMAGES.flatten(1)):
        expected = torch.stack([each[i] * x[i] + (1 - each[i]) * x[ORDER[i]] for i in range(8)])
        torch.testing.assert_close(m.of(x), expected)
    labels = m.labels(LABELS)
    assert torch.equal(labels.first, LABELS)
    assert torch.equal(labels.second, LABELS[ORDER])
    soft = each[:, None] * F.one_hot(labels.first, 5) + (1 - each[:, None]) * F.one_hot(labels.second, 5)
    assert soft.sum(1).tolist() == pytest.approx([1] * 8)
    assert torch.equal(labels.larger, torch.where(each >= 0.5, LABELS, LABELS[ORDER]))


def test_at_share_one_nothing_is_mixed(teacher, student):
    m = mixing(1.0)
    assert torch.equal(m.of(IMAGES), IMAGES)
    assert torch.equal(mixing(torch.ones(8)).of(IMAGES), IMAGES)
    assert torch.equal(mixing(0.0).of(IMAGES), IMAGES[ORDER])
    for ideas in ((), (SoftLabels(0.5),), (SoftLabels(0.5), CamAlign(), FeatureAlign(), Perturb())):
        distiller = Distiller(teacher, student, DistillConfig(ideas=ideas))
        plain, mixed = distiller(IMAGES, LABELS), distiller(m.of(IMAGES), m.labels(LABELS))
        assert plain.keys() == mixed.keys()
        assert all(torch.equal(plain[name], mixed[name]) for name in plain)
        for a, b in zip(
            *(torch.autograd.grad(sum_terms(terms), list(student.parameters())) for terms in (plain, mixed)),
            strict=True,
        ):
            assert torch.equal(a, b)


# The loss


@pytest.mark.parametrize("share", [0.3, torch.linspace(0, 1, 8)], ids=["batch", "samples"])
@pytest.mark.parametrize("tau", [None, 0.5])
def test_the_cross_entropy_is_the_soft_labels(teacher, student, share, tau):
    """Each label by its share, over the samples that the teacher trusts it on, divided by the whole batch."""
    m = mixing(share)
    ideas = () if tau is None else (SoftLabels(tau),)
    distiller = Distiller(teacher, student, DistillConfig(ce=0.5, ideas=ideas))
    x, labels = m.of(IMAGES), m.labels(LABELS)
    terms = distiller(x, labels)
    q, f = student(x), teacher(x)
    each = m.share.expand(8)
    expected = 0
    trusts = []
    for portion, own in ((each, labels.first), (1 - each, labels.second)):
        trusted = 1 - f.softmax(1)[range(8), own] < (2 if tau is None else tau)
        trusts.append(trusted)
        expected = expected + portion * trusted * F.cross_entropy(q, own, reduction="none")
    if tau is not None:
        assert any(one.any() and not one.all() for one in trusts)
        assert not torch.equal(*trusts)
    # two networks, fused here and not there: their logits differ in the last bits
    torch.testing.assert_close(terms["ce"], 0.5 * expected.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["kd"], distill_head(q, f, alpha=20.0).kd, rtol=1e-3, atol=1e-5)
    bias = list(student.parameters())[-1]
    ours, theirs = (torch.autograd.grad(ce, bias, retain_graph=True)[0] for ce in (terms["ce"], 0.5 * expected.mean()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if tau is None:
        soft = each[:, None] * F.one_hot(labels.first, 5) + (1 - each[:, None]) * F.one_hot(labels.second, 5)
        torch.testing.assert_close(terms["ce"], 0.5 * F.cross_entropy(q, soft), rtol=1e-4, atol=1e-6)


def test_without_cross_entropy_only_the_divergence_is_left(teacher, student):
    m = mixing(0.3)
    terms = Distiller(teacher, student, DistillConfig(ce=0.0))(m.of(IMAGES), m.labels(LABELS))
    assert terms.keys() == {"kd"}


def test_the_perturbed_bracket_keeps_both_labels_trust(teacher, student, monkeypatch):
    m, asked = mixing(0.4), []

    def watching(*args, **more):
        asked.append((more["tau"], more["easy"]))
        return distill_head(*args, **more)

    monkeypatch.setattr("zsq_ext.tune.distill.distill_head", watching)
    Distiller(teacher, student, DistillConfig(ideas=(SoftLabels(0.5), Perturb())))(m.of(IMAGES), m.labels(LABELS))
    assert [tau for tau, _ in asked] == [0.5, 0.5, None, None]
    f = teacher(m.of(IMAGES)).softmax(1)
    for (_, easy), own in zip(asked[2:], (LABELS, LABELS[ORDER]), strict=True):
        assert torch.equal(easy, 1 - f[range(8), own] < 0.5)


def test_logits_computed_elsewhere_give_the_same_terms(teacher, student):
    m = mixing(0.3)
    distiller = Distiller(teacher, student, DistillConfig(ideas=(SoftLabels(0.5),)))
    assert distiller.plain
    for x, labels in ((IMAGES, LABELS), (m.of(IMAGES), m.labels(LABELS))):
        whole = distiller(x, labels)
        terms = distiller.of_logits(distiller._student.run(x, with_grad=True).logits, distiller.ask(x), labels)
        assert terms.keys() == whole.keys()
        assert all(torch.equal(terms[name], whole[name]) for name in terms)
    assert not distiller.ask(IMAGES).requires_grad


@pytest.mark.parametrize("idea", [CamAlign(), FeatureAlign(), Perturb()], ids=lambda idea: type(idea).__name__)
def test_ideas_that_need_more_than_logits(teacher, student, idea):
    distiller = Distiller(teacher, student, DistillConfig(ideas=(idea,)))
    assert not distiller.plain
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="of_logits: ideas must need logits alone, got ones that need maps or images"):
        distiller.of_logits(logits, logits, LABELS[:2])
    with pytest.raises(ValueError, match=f"Mix: teacher must be True beside {type(idea).__name__}, got False"):
        Distiller(teacher, student, DistillConfig(ideas=(idea, Mix(teacher=False))))
    Distiller(teacher, student, DistillConfig(ideas=(idea, Mix())))


def test_the_teachers_answers_mixed_or_asked_for(teacher, student):
    distillers = {how: Distiller(teacher, student, DistillConfig(ideas=(Mix(teacher=how),))) for how in (True, False)}
    losses = {}
    for how, distiller in distillers.items():
        mixer = Mixer(Mix(teacher=how), stage(), distiller.ask)
        x, labels = mixer(0, IMAGES, LABELS)
        losses[how] = distiller(x, labels)["kd"]
        assert distiller._teacher.calls == 1
        m = draw(stage(), 0, 8, Mix(), CPU)
        assert torch.equal(x, m.of(IMAGES))
        answers = distiller.ask(IMAGES)
        assert (labels.answers is None) if how else torch.equal(labels.answers, m.of(answers))
        f = answers if how else m.of(answers)
    torch.testing.assert_close(losses[False], distill_head(student(x), f, alpha=20.0).kd, rtol=1e-3, atol=1e-5)
    assert (losses[True] - losses[False]).abs() > 0.01 * losses[True]


# Fine-tuning

QUICK = TuneConfig(epochs=2, steps_per_epoch=6, batch=4, lr=1e-5, lr_epochs=(1,))


def tune(teacher, student, idea=None, run=None, loss=None, **more):
    config = DistillConfig(ideas=() if idea is None else (idea,))
    distiller = Distiller(teacher, student, config)
    own = stage(run)
    mix = None if idea is None else Mixer(idea, own, distiller.ask)
    return finetune(own, student, IMAGES, LABELS, loss or distiller, QUICK, mix=mix, **more)


def test_probability_zero_is_fine_tuning_without_mixing(teacher, student):
    plain, off, on = (copy.deepcopy(student) for _ in range(3))
    assert tune(teacher, plain).history == tune(teacher, off, Mix(probability=0)).history
    tune(teacher, on, Mix())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, off.state_dict()[name]), name
    assert any(not torch.equal(value, on.state_dict()[name]) for name, value in plain.named_parameters())
    for name, value in student.named_buffers():  # ranges and statistics never see a mixed batch
        assert torch.equal(value, on.state_dict()[name]), name


def test_what_is_mixed_is_the_augmented_and_filtered_batch(teacher, student):
    seen, filtered = [], []

    def loss(x, labels):
        seen.append((x, labels))
        return {"loss": (next(own.parameters()) * 0).sum()}

    own = copy.deepcopy(student)
    tune(teacher, own, Mix(), loss=loss, filter_batch=lambda x: (filtered.append(x), x)[1])
    for n, ((x, labels), before) in enumerate(zip(seen, filtered, strict=True)):
        m = draw(stage(), n, 4, Mix(), CPU)
        assert torch.equal(x, m.of(before))
        assert isinstance(labels, MixedLabels)
        assert torch.equal(labels.second, labels.first[m.order])


def test_resumed_equals_unbroken(teacher, student, tmp_path, tools):
    whole, broken, resumed = (copy.deepcopy(student) for _ in range(3))
    idea = Mix(probability=0.7, per_sample=True, teacher=False)
    history = tune(teacher, whole, idea).history
    distiller, calls = Distiller(teacher, broken, DistillConfig()), []

    def stopping(x, labels):
        if len(calls) == 11:
            raise tools.Interrupted
        calls.append(1)
        return distiller(x, labels)

    run = Run(tmp_path, {}, checkpoint_seconds=0)
    with pytest.raises(tools.Interrupted):
        tune(teacher, broken, idea, run, stopping)
    assert tune(teacher, resumed, idea, run).history == history
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


# The front door


def quantize(model, *ideas, out=None):
    recipe = changed(
        synq.config("smoke", "repo"),
        images=12,
        held_out=4,
        pixels=PixelConfig(batch=8, iterations=3),
        finetune=TuneConfig(epochs=1, steps_per_epoch=3, batch=6, lr=1e-4),
        range_steps=2,
    )
    bits = {"w_bits": 4, "a_bits": 4}
    return zsq.quantize(
        model, "synq", **bits, input_shape=(3, 8, 8), config=recipe, ideas=ideas, progress=QUIET, out=out
    )


def test_synqs_images_are_mixed_too(nets, tmp_path):
    model = nets.residual()
    plain, mixed = quantize(model), quantize(model, Mix(a=0.2), out=tmp_path)
    assert torch.equal(plain.images, mixed.images)
    assert any(not torch.equal(a, b) for a, b in zip(plain.model.parameters(), mixed.model.parameters(), strict=True))
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    ideas = {idea["idea"]: idea for idea in config["hyperparameters"]["tune"]["distill"]["ideas"]}
    assert ideas["Mix"] == {"idea": "Mix", "a": 0.2, "probability": 1.0, "per_sample": False, "teacher": True}


def test_agm_is_refused_where_nothing_is_generated(nets):
    with pytest.raises(ValueError, match=r"^quantize: ideas must not hold Agm where images stand still"):
        quantize(nets.residual(), Agm())
    quantize(nets.residual(), Agm(weight=0))
