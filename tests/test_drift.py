"""Temporal diagnostics: what they measure, that looking changes nothing, and their curves in the report.

Mutants tried, each red: the look before never kept; cosine without its norm; a drift in the first row; the spread
around the mean of all; totals not begun anew; a NaN counted; the norm of a single tensor; noise of the global stream;
the features left out of the checkpoint; one image per class, classes not spread over batches, or one class alone;
logits for features; 1 - cos as it stands; a look one step late; the curves drawn as losses.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zsq_ext.core.progress import QUIET
from zsq_ext.core.run import Run
from zsq_ext.core.steps import Stage, State, run_steps
from zsq_ext.quant.capture import capture
from zsq_ext.report import sections
from zsq_ext.report.temporal import HISTORY, curves, temporal
from zsq_ext.synth.drift import Drift, DriftConfig
from zsq_ext.synth.generate import GeneratorConfig, GeneratorTrainer

FEW = DriftConfig(latents=20, every_epochs=2)


def trainer_of(classes=5, run=None, seed=0):
    stage = Stage(run or Run(None, {}), "generator", seed, QUIET)
    return GeneratorTrainer(stage, classes, (3, 8, 8), GeneratorConfig(batch=6), "cpu")


def drift_of(teacher, trainer=None, config=FEW, per_epoch=1):
    return Drift(teacher, trainer or trainer_of(), config, per_epoch)


def moved(trainer, by=0.05):
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def test_a_look_every_so_many_epochs(teacher):
    drift = drift_of(teacher, per_epoch=3)
    assert [n for n in range(20) if drift.row(n) is not None] == [5, 11, 17]


class Plain(nn.Module):
    """A network whose features are easy to know: means of the channels and of their squares."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.cat([x.mean((2, 3)), x.square().mean((2, 3))], 1))


def test_drift_and_spread_are_their_definitions():
    teacher = capture(Plain().eval(), torch.zeros(2, 3, 8, 8))
    trainer = trainer_of(classes=4)
    drift = drift_of(teacher, trainer, DriftConfig(latents=40, every_epochs=1))
    phis, rows = [], []
    for n in range(3):
        rows.append(drift.row(n))
        with torch.no_grad():
            x = torch.cat([trainer.images(*p) for p in zip(drift._z.split(6), drift._labels.split(6), strict=True)])
        phis.append(torch.cat([x.mean((2, 3)), x.square().mean((2, 3))], 1).double())
        moved(trainer)
    assert drift._phi.shape == (40, 6)
    assert "drift" not in rows[0]
    for n in (1, 2):
        cosine = torch.cosine_similarity(phis[n], phis[n - 1])
        assert rows[n]["drift"] == pytest.approx((1 - cosine).mean().item(), rel=1e-3)
        assert rows[n]["drift"] > 1e-3
    for row, phi in zip(rows, phis, strict=True):
        within = [phi[drift._labels == k] - phi[drift._labels == k].mean(0) for k in range(4)]
        assert [len(w) for w in within] == [10] * 4
        expected = (torch.cat(within).square().sum() / phi.square().sum()).sqrt()
        assert row["spread"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_generator_that_stands_still_has_no_drift_and_looking_changes_nothing(teacher):
    trainer = trainer_of()
    before = [p.detach().clone() for p in trainer.parameters]
    drawn = trainer.draw(0)
    drift = drift_of(teacher, trainer, DriftConfig(latents=20, every_epochs=1))
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    assert [drift.row(n).get("drift") for n in range(3)] == [None, 0.0, 0.0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(trainer.draw(0), drawn, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, before, strict=True))
    assert all(p.grad is None for p in trainer.parameters)
    again = drift_of(teacher, trainer_of())
    assert torch.equal(again._z, drift._z)
    assert not torch.equal(drift_of(teacher, trainer_of(seed=1))._z, drift._z)
    assert not torch.equal(drift._z[:6], drawn[0])


def test_slow_drift_is_not_lost_in_rounding():
    """Features that turn by 1e-4: 1 - cos is 5e-9, below what fp32 tells from 1."""
    teacher, trainer = capture(Plain().eval(), torch.zeros(2, 3, 8, 8)), trainer_of(classes=4)
    drift = drift_of(teacher, trainer, DriftConfig(latents=16, every_epochs=1))
    drift.row(0)
    turn = torch.zeros_like(drift._phi)
    turn[:, 0] = 1e-4 * drift._phi.norm(dim=1)
    now = drift._phi.double() + turn
    expected = (1 - torch.cosine_similarity(now, drift._phi.double())).mean().item()
    drift._seen = lambda: now.float()
    assert 0 < expected < 1e-8
    assert drift.row(1)["drift"] == pytest.approx(expected, rel=0.01)


def test_what_is_noted_is_averaged_from_look_to_look(teacher):
    drift = drift_of(teacher, config=DriftConfig(latents=8, every_epochs=1), per_epoch=2)
    notes = [(3.0, 4.0, 0.5), (6.0, 8.0, math.nan), (0.0, 1.0, 0.2), (0.0, 3.0, 0.4)]
    rows = []
    for n, (a, b, median) in enumerate(notes):
        drift.note([torch.tensor([a, 0.0]), torch.tensor([[b]])], torch.tensor(median))
        rows.append(drift.row(n))
    assert (rows[1]["gradient_norm"], rows[1]["median_discrepancy"]) == pytest.approx((7.5, 0.5))
    assert (rows[3]["gradient_norm"], rows[3]["median_discrepancy"]) == pytest.approx((2.0, 0.3))
    drift.note([torch.ones(1)])
    drift.note([torch.ones(1)])
    assert drift.row(5).keys() == {"drift", "spread", "gradient_norm"}


@pytest.mark.parametrize(
    ("classes", "latents", "shown"), [(10, 512, 10), (1000, 512, 64), (100, 512, 64), (5, 20, 2), (5, 2, 1)]
)
def test_classes_are_as_many_as_have_images_to_share(classes, latents, shown):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, classes)).eval()
    drift = drift_of(capture(net, torch.zeros(2, 3, 8, 8)), trainer_of(classes), DriftConfig(latents=latents))
    counts = drift._labels.bincount(minlength=classes)
    assert (counts > 0).sum() == shown
    assert counts[counts > 0].min() >= min(8, latents)
    assert drift._phi.shape == (latents, 192)  # what the classifier reads
    assert drift._labels[:6].unique().numel() > min(2, shown - 1)  # a batch is of several classes


def test_a_network_that_ends_otherwise_is_seen_by_its_logits():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.LogSoftmax(1)).eval()
    assert drift_of(capture(net, torch.zeros(2, 3, 8, 8)))._phi.shape == (20, 5)


@pytest.mark.parametrize("stop", [10, 20])
def test_resumed_equals_unbroken(teacher, tmp_path, tools, stop):
    def train(run, until=None):
        trainer = trainer_of(run=run)
        drift = Drift(teacher, trainer, DriftConfig(latents=20, every_epochs=1), 8)
        tensors, optimizers = trainer.state()

        def step(n):
            if n == until:
                raise tools.Interrupted
            loss = trainer.images(*trainer.draw(n))[:, 0].square().mean()
            gradients = torch.autograd.grad(loss, trainer.parameters, allow_unused=True, materialize_grads=True)
            drift.note(gradients, torch.tensor(float(n)))
            trainer.step(gradients, n)
            return {"loss": loss}

        state = State({**tensors, **drift.tensors()}, optimizers)
        return run_steps(trainer.stage, 32, step, state, advice="", after=drift.row)

    whole = train(Run(None, {}))
    assert len([row for row in whole if "spread" in row]) == 4
    run = Run(tmp_path, {}, checkpoint_seconds=0)
    with pytest.raises(tools.Interrupted):
        train(run, until=stop + 3)
    assert train(run) == whole


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DriftConfig(latents=1), "DriftConfig: latents must be at least 2, got 1"),
        (lambda: DriftConfig(every_epochs=0), "DriftConfig: every_epochs must be at least 1, got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The report

ROWS = [
    {"step": 10, "spread": 0.5, "gradient_norm": 2.0},
    {"step": 20, "drift": 0.1, "spread": 0.4, "gradient_norm": 1.0},
    {"step": 30, "drift": 0.01, "spread": 0.3, "gradient_norm": 0.1},
]


def test_the_curves_of_two_runs_stand_beside_each_other():
    base, agm = (SimpleNamespace(histories={HISTORY: ROWS}) for _ in range(2))
    agm.histories[HISTORY] = [{**row, "median_discrepancy": 0.7} for row in ROWS]
    none = SimpleNamespace(histories={"tuning": [{"step": 1, "kd": 1.0}]})
    runs = curves({"GDFQ": base, "SynQ": none, "GDFQ < AGM": agm})
    assert list(runs) == ["GDFQ", "GDFQ < AGM"]
    page = temporal(runs)
    assert page.count("<h3>") == 4
    assert page.count("<polyline") == 2 * 3 + 1  # the discrepancy of one run alone
    assert page.count("GDFQ &lt; AGM") == 3
    assert "Feature drift" in page


def test_a_figure_that_no_run_has_is_left_out():
    assert temporal({"GDFQ": ROWS}).count("<h3>") == 3


def test_the_curves_are_no_losses():
    drawn = sections.losses(SimpleNamespace(histories={"tuning": [{"step": 1, "kd": 1.0}], HISTORY: ROWS}))
    assert "Tuning" in drawn
    assert HISTORY not in drawn
    assert "spread" not in drawn
