"""The pieces of a training step never wait for the device: no value is read back and no shape depends on data."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from zsq_ext.bench import timing
from zsq_ext.bench.families import FAMILIES
from zsq_ext.core.progress import QUIET
from zsq_ext.core.run import Run
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import Stage
from zsq_ext.ops import KD_SCALINGS, channel_sums, distill_head, statistics_of
from zsq_ext.ops.backend import reason_against
from zsq_ext.quant import graph, ranges
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.quant.structure import heads
from zsq_ext.synth import adversarial, augment, filters, objectives
from zsq_ext.synth.generate import GeneratorConfig, GeneratorTrainer, generator_terms
from zsq_ext.synth.generator import KINDS
from zsq_ext.synth.objectives import Statistics
from zsq_ext.synth.pixels import Plateau
from zsq_ext.synth.set_objectives import set_statistics_loss, stretching_loss
from zsq_ext.synth.stored import StoredConfig, View
from zsq_ext.synth.teacher import Teacher
from zsq_ext.synth.whole_set import RunningTotals, SetTeacher
from zsq_ext.tune import cam, learn, losses
from zsq_ext.tune.ideas import Agm
from zsq_ext.tune.margin import AgmMargin
from zsq_ext.tune.mix import Mixing
from zsq_ext.tune.reconstruct_config import GENIE_M
from zsq_ext.tune.rows import Rows
from zsq_ext.tune.soft import SoftUnit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# what a CUDA tensor could only answer after the device has caught up
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), f"{name} by a mask waits"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting():
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoWaiting():
            yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def range_updates():
    x = normal(8, 16, 4)
    one = torch.ones(1, device=DEVICE)
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def run():
        state = ranges.ema_update(one, one, step, *ranges.min_max(x))
        ranges.ema_update_legacy(one, one, step, *ranges.percentile(x, 99))
        ranges.affine_params(*ranges.ema_value(*state), 4, signed=False, include_zero=True)
        ranges.lp_search(x, 4, axis=0, signed=True, include_zero=False, ratios=(1.0, 0.9))

    return run


def image_objectives():
    inputs = [normal(4, 6, 5, 5).requires_grad_() for _ in range(4)]
    mu, var = [torch.zeros(6, device=DEVICE)] * 4, [torch.ones(6, device=DEVICE)] * 4
    target = Statistics.of(mu, var)
    logits, labels = normal(4, 10).requires_grad_(), torch.arange(4, device=DEVICE)

    def run():
        found = [statistics_of(*channel_sums(u, m), 100, m) for u, m in zip(inputs, mu, strict=True)]
        found = Statistics.of(*zip(*found, strict=True))
        total = objectives.focal_ce(logits, labels) + objectives.cross_entropy(logits, labels)
        for form in ("mean_var", "mean_std"):
            total = total + objectives.bn_statistics_loss(found, target, form=form)
        total = total + objectives.layered_bn_statistics_loss(found, target)
        (total + objectives.calibration_centre_loss(found, target)).backward()

    return run


def whole_set(teacher):
    """A step of the stored-image engine, all but the optimizer, which on the CPU counts its steps on the host."""
    module = copy.deepcopy(teacher).to(DEVICE)
    watched = SetTeacher(module, heads=heads(module))
    spec = InputSpec((3, 8, 8), valid_range=(-2.0, 2.0))
    view = View(spec, StoredConfig(border=2), torch.device(DEVICE))
    x = normal(6, 3, 10, 10).requires_grad_()
    totals = RunningTotals([6, 4], len(watched.places), torch.device(DEVICE))
    plan = Plateau(1.0, 0.5, 2, 0.1, torch.device(DEVICE), reset=True)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def run():
        seen = watched.observe(view.random(x, generator))
        loss = set_statistics_loss(watched.statistics(totals.with_batch(0, seen.sums)), watched.target)
        loss = loss + stretching_loss(seen.heads, seen.last, watched.last)
        loss.backward()
        plan.step(loss.detach().float())
        totals.replace(0, seen.sums)
        view.final(x)

    return run


def generator_step(teacher):
    """A step of the generator engine, and images for keeps; torch's Adam counts its steps on the host."""
    frozen, pieces = Teacher(copy.deepcopy(teacher).to(DEVICE)), []
    for kind in KINDS:
        stage = Stage(Run(None, {}), "generator", 0, QUIET)
        pieces.append(GeneratorTrainer(stage, 5, (3, 8, 8), GeneratorConfig(batch=4, kind=kind), DEVICE))
        pieces[-1].optimizer.step = lambda: None

    def run():
        for trainer in pieces:
            z, labels = trainer.draw(0)
            terms = generator_terms(frozen.observe(trainer.images(z, labels), labels), frozen.target, trainer.config)
            trainer.step(torch.autograd.grad(sum(terms.values()), trainer.parameters), 0)
            trainer.sample(6)

    return run


def image_pipeline():
    x = normal(4, 3, 16, 16).requires_grad_()
    low = filters.LowPass((16, 16), 4).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    return lambda: low(augment.random_resized_crop_flip(x, generator)).sum().backward()


def tuning_losses():
    student, teacher, labels = normal(4, 10).requires_grad_(), normal(4, 10), torch.arange(4, device=DEVICE)
    feature, maps = normal(4, 6, 5, 5).requires_grad_(), normal(4, 6, 5, 5)

    def run():
        heads = [distill_head(student, teacher, labels, kd=kd, tau=0.5) for kd in KD_SCALINGS]
        heads.append(distill_head(student, teacher, labels, easy=heads[0].easy))
        total = sum(head.kd + head.ce for head in heads) + losses.feature_alignment([maps], [feature])
        total.backward()
        losses.signed_perturbation(maps, feature.grad)

    return run


def adversarial_losses():
    """AGM's loss with its guards, its margin as it is found, the entropy band, and a mixed batch."""
    student, teacher, labels = normal(4, 10).requires_grad_(), normal(4, 10), torch.arange(4, device=DEVICE)
    images, margin = normal(4, 3, 8, 8), AgmMargin(Agm(), 0, 2, torch.device(DEVICE))
    mixing = Mixing(torch.tensor([1, 0, 3, 2], device=DEVICE), torch.tensor(0.3, device=DEVICE))

    def run():
        for step, form in enumerate(adversarial.MARGIN_FORMS[:2]):
            found = adversarial.adversarial_margin(student, teacher, margin.margin, margin.sigma, form=form)
            band = adversarial.entropy_band(student, teacher, 0.1, 0.8)
            for term in (adversarial.disagreement, adversarial.agreement):
                band = band + term(student, teacher, labels)
            (gradient,) = torch.autograd.grad(found.loss + band, student)
            adversarial.limited(gradient, 2 * gradient, found.median)
            margin.watch(step, found.median)
        mixing.of(images)
        mixing.labels(labels)

    return run


def class_activation_maps():
    feature, maps = normal(4, 6, 5, 5).requires_grad_(), normal(4, 6, 5, 5)
    weight, slope = normal(10, 6), normal(6)
    logits = normal(4, 10)
    labels = torch.arange(4, device=DEVICE)

    def run():
        alphas = [
            cam.closed_form_alpha(weight, cam.cam_classes(logits, labels, rule), slope, before, upper=upper)
            for rule, before, upper in (("argmax", feature, None), ("label", maps, 6.0))
        ]
        total = sum(
            cam.cam_loss(alphas[0], feature, alphas[1], maps, normalise=normalise, size=(20, 20))
            for normalise in cam.NORMALISATIONS
        )
        total.backward()

    return run


@pytest.mark.parametrize(
    "piece",
    [
        range_updates,
        image_objectives,
        whole_set,
        generator_step,
        adversarial_losses,
        image_pipeline,
        tuning_losses,
        class_activation_maps,
    ],
)
def test_a_step_never_waits(piece, teacher):
    run = piece(teacher) if piece in (whole_set, generator_step) else piece()
    run()  # constants are made and kept on the first call
    with no_waiting():
        run()


@pytest.mark.parametrize(("rounding", "steps"), [(True, True), (True, False), (False, True)])
def test_a_step_of_reconstruction_never_waits(monkeypatch, rounding, steps):
    """Soft weights with their regulariser, learned steps, dropped elements; torch's Adam itself only on a GPU."""
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    teacher = capture(nn.Sequential(*layers).eval(), torch.zeros(2, 3, 8, 8)).to(DEVICE)
    student = prepare(teacher, QConfig(4, 4, w_range="lp")).requires_grad_(False)
    x, kept = normal(6, 3, 8, 8), []
    with calibrating(student):
        student(x)
    weight, activation = (graph.find(student, f"quantizers_{name}") for name in ("_0_weight", "relu"))
    keys = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    entry = next(node.name for node in student.graph.nodes if node.op == "placeholder")
    unit = SoftUnit(student, [entry], activation.name, [weight], [activation], 0.5, keys)
    exact, rounded, target = (Rows(t, x.device) for t in (x, x + 0.1, normal(6, 4, 6, 6)))
    monkeypatch.setattr(learn, "run_steps", lambda stage, count, step, *rest, **more: kept.append(step))
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    stage = Stage(Run(None, {}), "unit", 0, QUIET)
    data = learn.Data([rounded], [exact], target)
    learn.learn(stage, unit, data, GENIE_M, 10, rounding=rounding, steps=steps)
    (step,) = kept
    step(4)
    with no_waiting():
        terms = step(5)
    assert terms.keys() == ({"mse", "rounding"} if rounding else {"mse"})


def test_the_watch_sees_waiting():
    x = normal(3)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.any()), lambda: x.nonzero()):
        with pytest.raises((AssertionError, RuntimeError)), no_waiting():
            wait()


# GPU only


def on_gpu():
    """(backend, subject) for every op that the bench times: each op's forward, and its backward."""
    for name in ("cuda", "triton"):
        for family in FAMILIES.values():
            for subject in family("cuda"):
                runs = subject.runs or subject.op
                if subject.runs is not None and not reason_against(name, runs, "cuda", subject.dtype):
                    yield name, subject


@pytest.mark.gpu
def test_no_op_waits_for_the_device():
    for name, subject in on_gpu():
        run, inputs = timing.Forced(name, subject.ours), subject.inputs()
        run(*inputs)  # compiled, and tuned
        torch.cuda.synchronize()
        with no_waiting():
            run(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_all_weights_take_two_launches(name):
    subject = next(s for s in FAMILIES["fake_quant_minmax"]("cuda") if s.case == "weights_resnet18")
    run, inputs = timing.Forced(name, subject.ours), subject.inputs()
    run(*inputs)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(*inputs)
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.name.startswith("Mem")]
    assert len(kernels) <= 2, [e.name for e in kernels]
