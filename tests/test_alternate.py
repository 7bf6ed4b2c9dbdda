"""The alternating trainer: it is GDFQ's loop, written out plainly here; what it shares, freezes and leaves be.

Broken on purpose, each turned a test here red: AGM's gradient through the student or the teacher alone, without the
generator's own, without its limit, or in the epoch that finds its margin; a weight of 0 that still asks the
student; the teacher's answers to the unmixed images; a second forward where one serves both steps; ranges that
follow on; a student that learns in the warm-up; either learning rate that does not fall; a checkpoint without the
ranges, the margin or either optimizer.
"""

import copy
from dataclasses import replace

import pytest
import torch

from zsq_ext.core.progress import QUIET
from zsq_ext.core.run import Run
from zsq_ext.core.steps import Stage
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import activation_quantizers, calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.synth.adversarial import adversarial_margin, discrepancy, entropy_band, gaussian_margin
from zsq_ext.synth.drift import Drift, DriftConfig
from zsq_ext.synth.generate import GeneratorConfig, GeneratorTrainer, generator_terms
from zsq_ext.synth.teacher import Teacher
from zsq_ext.tune.alternate import AlternateConfig, alternate
from zsq_ext.tune.distill import DistillConfig, Distiller
from zsq_ext.tune.ideas import Agm, CamAlign, FeatureAlign, Mix, Perturb, SoftLabels
from zsq_ext.tune.mix import draw

GENERATOR = GeneratorConfig(batch=6, latent=7, steps_per_epoch=5, lr_epochs=(3,))
TRAIN = AlternateConfig(
    epochs=5, steps_per_epoch=5, range_epochs=1, warmup_epochs=2, lr=1e-5, lr_epochs=(3,), weight_decay=1e-4
)
KD = DistillConfig(kd="mse", alpha=1.0, ce=1.0)


class Watched(Distiller):
    """Counts the student's forwards."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.answers = 0

    def answer(self, images):
        self.answers += 1
        return super().answer(images)


class Game:
    """Both networks and what trains them, from the same seeds."""

    def __init__(self, teacher, distill=KD, train=TRAIN, run=None, bits=(4, 4)):
        self.stage = Stage(run or Run(None, {}, checkpoint_seconds=0), "training", 0, QUIET)
        self.teacher, self.train = Teacher(teacher), train
        self.student = prepare(teacher, QConfig(*bits))
        self.generator = GeneratorTrainer(self.stage, 5, (3, 8, 8), GENERATOR, "cpu")
        self.distiller = Watched(teacher, self.student, distill)
        self.seen = 0
        observe = self.teacher.observe

        def counted(*args):
            self.seen += 1
            return observe(*args)

        self.teacher.observe = counted

    def terms(self, seen, student):
        assert student is None
        return generator_terms(seen, self.teacher.target, GENERATOR)

    def play(self, objective=None, **more):
        return alternate(
            self.stage,
            self.student,
            self.generator,
            self.teacher,
            objective or self.terms,
            self.distiller,
            self.train,
            **more,
        )

    def tensors(self):
        return {**self.generator.state()[0], **self.student.state_dict()}


def same(one, two):
    a, b = one.tensors(), two.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plainly(teacher, distill, *, margin=None, mix=None, band=None):
    """GDFQ's loop, step by step, nothing shared: every loss has its own forwards."""
    game = Game(teacher, distill)
    student, generator, frozen = game.student, game.generator, game.teacher
    sgd = torch.optim.SGD(student.parameters(), lr=TRAIN.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    adam = torch.optim.Adam(generator.parameters, lr=GENERATOR.lr, betas=(0.5, 0.999))
    for n in range(25):
        epoch = n // 5
        for optimizer, lr in ((sgd, TRAIN.lr), (adam, GENERATOR.lr)):
            optimizer.param_groups[0]["lr"] = lr * (0.1 if epoch >= 3 else 1.0)
        z, labels = generator.draw(n)
        before = copy.deepcopy(generator.generator)
        if epoch < 1:
            with torch.no_grad(), calibrating(student):
                student(generator.images(z, labels))
        images = generator.images(z, labels)
        seen = frozen.observe(images, labels)
        loss = sum(generator_terms(seen, frozen.target, GENERATOR).values())
        if band is not None:
            loss = loss + entropy_band(student(images), seen.logits, *band)
        if margin is not None and epoch >= 2:
            d = discrepancy(student(images), seen.logits)
            loss = loss + 2.0 * gaussian_margin(d, *margin).mean()
        adam.zero_grad()
        loss.backward(inputs=list(generator.parameters))
        adam.step()
        if epoch < 2:
            continue
        with torch.no_grad():
            images = before(z, labels)
        if mix is not None:
            mixing = draw(game.stage, n, 6, mix, torch.device("cpu"))
            images, labels = mixing.of(images), mixing.labels(labels)
        sgd.zero_grad()
        sum(game.distiller(images.contiguous(memory_format=torch.channels_last), labels).values()).backward()
        sgd.step()
    return game


def distance(one, two):
    """Of what the generators make of one latent and of the students, each relative to its size."""
    with torch.no_grad():
        images = [game.generator.images(*game.generator.draw(99)) for game in (one, two)]
    weights = [torch.cat([p.detach().flatten() for p in game.student.parameters()]) for game in (one, two)]
    return max(((a - b).norm() / b.norm()).item() for a, b in (images, weights))


def assert_plain(game, plain, base):
    """It is this and not the base, but for rounding, which Adam blows up where a gradient is nearly zero."""
    assert distance(game, plain) < 0.1 * distance(game, base)


def test_gdfqs_loop(teacher):
    game = Game(teacher)
    game.play()
    assert_plain(game, plainly(teacher, KD), plainly(teacher, KD, margin=(0.5, 0.25)))
    assert (game.seen, game.distiller.answers) == (25, 15)  # one forward each, the student's behind the warm-up


def test_the_loop_with_agm(teacher):
    game = Game(teacher, replace(KD, ideas=(Agm(weight=2.0, margin=0.5, sigma=0.25, limit_below=0.0),)))
    game.play()
    assert_plain(game, plainly(teacher, KD, margin=(0.5, 0.25)), plainly(teacher, KD))
    assert (game.seen, game.distiller.answers) == (25, 15)  # one forward serves both steps


def test_the_loop_with_agm_and_mixing(teacher):
    mix = Mix()
    game = Game(teacher, replace(KD, ideas=(Agm(weight=2.0, margin=0.5, sigma=0.25, limit_below=0.0), mix)))
    game.play()
    pushed = plainly(teacher, KD, margin=(0.5, 0.25))
    assert_plain(game, plainly(teacher, KD, margin=(0.5, 0.25), mix=mix), pushed)
    assert game.distiller.answers == 15  # mixed images have their own forwards


def test_the_loop_with_an_entropy_band(teacher):
    """AdaDFQ's generator learns from the student from the first step on."""
    game = Game(teacher)

    def terms(seen, student):
        own = generator_terms(seen, game.teacher.target, GENERATOR)
        return {**own, "band": entropy_band(student, seen.logits, 0.1, 0.8)}

    found = game.play(terms, sees_student=True)
    assert_plain(game, plainly(teacher, KD, band=(0.1, 0.8)), plainly(teacher, KD))
    assert game.distiller.answers == 25
    assert {"g_ce", "g_bns", "g_band", "kd", "ce"} == found.history[-1].keys() - {"step"}


def test_without_weight_and_mixing_it_is_the_base_bit_for_bit(teacher):
    base, off = Game(teacher), Game(teacher, replace(KD, ideas=(Agm(weight=0.0), Mix(probability=0.0))))
    histories = base.play().history, off.play().history
    assert same(base, off)
    assert histories[0] == histories[1]
    on = Game(teacher, replace(KD, ideas=(Agm(weight=1e-3, margin=1.0),)))
    on.play()
    assert not same(base, on)


def test_the_margin_is_found_in_the_first_epoch_of_tuning_and_agm_waits_for_it(teacher):
    game = Game(teacher, replace(KD, ideas=(Agm(),)))
    found = game.play()
    terms = {row["step"]: row.keys() for row in found.history}
    assert "g_agm" not in terms[10]
    assert "g_agm" in terms[20]
    base = Game(teacher, train=replace(TRAIN, epochs=3))
    base.play()
    third = Game(teacher, replace(KD, ideas=(Agm(),)), train=replace(TRAIN, epochs=3))
    third.play()
    for name, tensor in base.generator.state()[0].items():
        assert torch.equal(tensor, third.generator.state()[0][name]), name  # nothing is pushed while it is looked for


def test_a_push_goes_through_both_networks_to_the_generator_alone(teacher):
    """P4: the gradient is that of the loss through teacher and student, and neither has one of its own."""
    game = Game(teacher, replace(KD, ideas=(Agm(margin=0.5, sigma=0.25, limit_below=0.0),)))
    game.play()
    assert all(p.grad is None for p in game.student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    z, labels = game.generator.draw(99)
    images = game.generator.images(z, labels)
    through = {}
    for name in ("both", "teacher", "student"):
        student, truth = game.distiller.answer(images), game.teacher.observe(images, labels).logits
        student = student.detach() if name == "teacher" else student
        truth = truth.detach() if name == "student" else truth
        (through[name],) = torch.autograd.grad(adversarial_margin(student, truth, 0.5, 0.25).loss, [images])
    assert through["both"].norm() > 0
    torch.testing.assert_close(through["both"], through["teacher"] + through["student"])


def test_where_the_teacher_loses_sight_the_push_is_no_longer_than_the_base(teacher):
    """Untrained images have a right share of about a fifth, so the limit holds; an enormous weight shows it."""
    pushed = {}
    for limit in (0.0, 1.0):
        game = Game(teacher, replace(KD, ideas=(Agm(weight=1e6, margin=0.5, sigma=0.25, limit_below=limit),)))
        norms, original = [], game.generator.step

        def step(gradients, n, original=original, norms=norms):
            norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
            original(gradients, n)

        game.generator.step = step
        game.play()
        pushed[limit] = max(norms[10:]) / max(norms[:10])
    assert pushed[0.0] > 1e3
    assert pushed[1.0] < 10


def test_what_stands_still(teacher):
    """Ranges behind their epochs, the student in the warm-up, every batch norm's statistics, the teacher."""
    own = {name: t.clone() for name, t in teacher.state_dict().items()}
    short = Game(teacher, train=replace(TRAIN, epochs=2))
    short.play()
    assert all(torch.equal(p, own[name]) for name, p in short.student.named_parameters())
    game = Game(teacher, replace(KD, ideas=(Mix(),)))
    found = game.play()
    for one, two in zip(activation_quantizers(short.student), activation_quantizers(game.student), strict=True):
        assert one.batches == two.batches == 5
        assert torch.equal(one.hi, two.hi)
    assert len(found.calibration) == 5
    moved = {name for name, p in game.student.named_parameters() if not torch.equal(p, own[name])}
    assert moved == dict(game.student.named_parameters()).keys()
    for name, buffer in game.student.named_buffers():
        assert name.startswith("quantizers.") or torch.equal(buffer, own[name]), name
    assert all(torch.equal(t, own[name]) for name, t in teacher.state_dict().items())


def test_ranges_can_wait_for_better_images(teacher):
    late = Game(teacher, train=replace(TRAIN, range_start=1))
    late.play()
    early = Game(teacher)
    early.play()
    one, two = (activation_quantizers(game.student)[0] for game in (early, late))
    assert one.batches == two.batches == 5
    assert not torch.equal(one.hi, two.hi)


@pytest.mark.parametrize("ideas", [(SoftLabels(),), (FeatureAlign(),), (CamAlign(),), (Perturb(),)], ids=str)
def test_synqs_switches_work_here_too(teacher, ideas):
    game = Game(teacher, replace(KD, ideas=(*ideas, Agm(margin=1.0), Mix())))
    found = game.play()
    plain = Game(teacher, replace(KD, ideas=(Agm(margin=1.0), Mix())))
    plain.play()
    assert not same(game, plain)
    assert found.history[-1]["step"] == 25


def test_weights_alone(teacher):
    game = Game(teacher, replace(KD, ideas=(Agm(),)), bits=(3, None))
    assert game.play().calibration == []


def test_evaluations_begin_behind_the_warm_up(teacher):
    seen = []

    def evaluate(student):
        seen.append(student)
        return {"top1": 12.5}

    found = Game(teacher).play(evaluate=evaluate)
    assert [(row["epoch"], row["step"], row["top1"]) for row in found.evaluations] == [
        (e, 5 * e, 12.5) for e in (3, 4, 5)
    ]
    assert all("top1" not in row for row in found.history)


def test_looking_at_the_generator_changes_nothing(teacher):
    game, watched = Game(teacher, replace(KD, ideas=(Agm(),))), Game(teacher, replace(KD, ideas=(Agm(),)))
    plain = game.play()
    drift = Drift(teacher, watched.generator, DriftConfig(latents=12, every_epochs=2), 5)
    found = watched.play(drift=drift, evaluate=lambda student: {"top1": 1.0})
    assert same(game, watched)
    assert found.history == plain.history
    assert [row["step"] for row in found.temporal] == [10, 20]
    assert [row["epoch"] for row in found.evaluations] == [3, 4, 5]
    assert "median_discrepancy" not in found.temporal[0]  # nobody asked the student in the warm-up
    assert found.temporal[1].keys() == {"step", "drift", "spread", "gradient_norm", "median_discrepancy"}
    assert plain.temporal == []


@pytest.mark.parametrize("stop", [11, 16, 21])
def test_a_stopped_run_goes_on_bit_for_bit(teacher, tmp_path, stop):
    """While the margin is looked for, and behind; checkpoints are taken at every tenth step."""
    distill = replace(KD, ideas=(Agm(), Mix()))

    def looks(game):
        return Drift(teacher, game.generator, DriftConfig(latents=12, every_epochs=1), 5)

    unbroken = Game(teacher, distill)
    whole = unbroken.play(drift=looks(unbroken))

    class Stop(Exception):
        pass

    broken = Game(teacher, distill, run=Run(tmp_path, {}, checkpoint_seconds=0))
    draw_ = broken.generator.draw

    def stopping(n, *more):
        if n == stop:
            raise Stop
        return draw_(n, *more)

    broken.generator.draw = stopping
    with pytest.raises(Stop):
        broken.play(drift=looks(broken))
    resumed = Game(teacher, distill, run=Run(tmp_path, {}, resume=True, checkpoint_seconds=0))
    assert resumed.play(drift=looks(resumed)) == whole
    assert resumed.seen < 25
    assert same(resumed, unbroken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 1}, "epochs must be at least 2, the warm-up, got 1"),
        ({"range_epochs": 0}, "range_epochs must be at least 1, got 0"),
        ({"range_start": -1}, "range_start must be at least 0, got -1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
        (
            {"range_epochs": 3},
            r"warmup_epochs must be at least 3, when they stand still \(unsettled=True lets them move\), got 2",
        ),
        ({"unsettled": True, "range_start": 3}, "warmup_epochs must be at least 3, when ranges are there, got 2"),
    ],
)
def test_schedules_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=f"^AlternateConfig: {message}"):
        replace(TRAIN, **values)


def test_ranges_may_move_while_the_student_learns_if_asked_to(teacher):
    game = Game(teacher, train=replace(TRAIN, unsettled=True, warmup_epochs=0, range_epochs=4))
    game.play()
    assert activation_quantizers(game.student)[0].batches == 20
    assert game.distiller.answers == 25
