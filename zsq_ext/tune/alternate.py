"""The alternating trainer of the GDFQ lineage: a generator makes the images while the quantized network learns on them.

Every iteration draws one batch and takes one step of each network:

    x = G(z, y),   f = P(x),   q = Q(x)
    G descends     what makes images the teacher's own (cross-entropy, BN statistics, ...), + AGM(f, q) where it is on
    Q descends     KD + CE on the same images, from before G's step; or on mixtures of them

Activation ranges follow the images of the first epochs and stand still from then on. The student waits for the end of
the warm-up, so that it never trains on ranges that have not settled. Where both steps want the same forward of a
network, it is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.core.steps import Stage, State, Terms, run_steps, sum_terms
from zsq_ext.quant.fuse import fuse
from zsq_ext.quant.modules import RangeTrace, activation_quantizers, calibrating
from zsq_ext.quant.prepare import weights_together
from zsq_ext.synth.adversarial import adversarial_margin, discrepancy, limited
from zsq_ext.synth.drift import Drift
from zsq_ext.synth.generate import GeneratorTrainer
from zsq_ext.synth.teacher import Context, Teacher
from zsq_ext.tune.distill import Distiller
from zsq_ext.tune.finetune import Tuned
from zsq_ext.tune.ideas import Agm, Mix
from zsq_ext.tune.margin import AgmMargin
from zsq_ext.tune.mix import Mixer
from zsq_ext.tune.sgd import Sgd, SgdConfig

ADVICE = "Try lower learning rates (tune.lr, generator.lr), more bits, or a longer warm-up."

Objective = Callable[[Context, Tensor | None], Terms]
"""What the generator descends: from what the teacher shows of a batch, and the student's logits where wanted."""


@dataclass(frozen=True)
class AlternateConfig(SgdConfig):
    """The alternating trainer. Defaults: GDFQ's for CIFAR (spec: section 3)."""

    epochs: int = 400
    lr: float = 1e-4
    lr_epochs: tuple[int, ...] = (100, 200, 300)
    range_start: int = 0  # the epoch whose images the ranges begin to follow; later on ImageNet they see better ones
    range_epochs: int = 4  # for so long; then they stand still
    warmup_epochs: int = 4  # the student is not trained
    unsettled: bool = False  # let it train on ranges that still move, as GDFQ's recursion went NaN in Qimera + AIT

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("range_start", "warmup_epochs"):
            require("AlternateConfig", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")
        require("AlternateConfig", "range_epochs", self.range_epochs, self.range_epochs >= 1, "be at least 1")
        settled = self.range_start + self.range_epochs
        least = self.range_start if self.unsettled else settled
        why = "when ranges are there" if self.unsettled else "when they stand still (unsettled=True lets them move)"
        rule = f"be at least {least}, {why}"
        require("AlternateConfig", "warmup_epochs", self.warmup_epochs, self.warmup_epochs >= least, rule)
        length = max(self.warmup_epochs, settled)
        require("AlternateConfig", "epochs", self.epochs, self.epochs >= length, f"be at least {length}, the warm-up")


@dataclass(frozen=True)
class Alternated(Tuned):
    """What the alternating trainer leaves behind besides the student and the generator.

    ``calibration`` are the ranges by batch, ``temporal`` the looks at the generator.
    """

    calibration: list[dict[str, Any]]
    temporal: list[dict[str, Any]]


def alternate(
    stage: Stage,
    student: fx.GraphModule,
    generator: GeneratorTrainer,
    teacher: Teacher,
    objective: Objective,
    distiller: Distiller,
    config: AlternateConfig,
    *,
    sees_student: bool = False,
    drift: Drift | None = None,
    filter_batch: Callable[[Tensor], Tensor] | None = None,
    evaluate: Callable[[fx.GraphModule], dict[str, Any]] | None = None,
) -> Alternated:
    """Trains generator and student in turns, both in place; the student's batch-norm statistics stand still.

    Args:
        stage: checkpoints, random streams, reporting.
        student: a prepared network whose ranges have seen nothing yet.
        generator: what makes the batches.
        teacher: the frozen network, with the statistics of its batch norms.
        objective: what the generator descends, beside AGM.
        distiller: what the student descends; AGM and mixing are among its ideas.
        config: length, ranges, warm-up, the student's optimiser.
        sees_student: whether ``objective`` wants the student's logits; otherwise it gets None.
        drift: looks at the generator every few epochs.
        filter_batch: applied to what the student trains on (SynQ's released low-pass).
        evaluate: called after every epoch in which the student learned, gives a record with at least
            {"top1": percent}; it decides nothing.

    Returns:
        The loss history, the generator's terms by ``g_<name>``, the evaluations and the diagnostics.

    Raises:
        Diverged: a loss term, or a range, was not finite.

    Source: GDFQ (Xu et al. 2020), algorithm 1; AGM's place in it is derived, see ``methods.agm``.
    """
    sgd, ranges, rounds = Sgd(student, config), _Ranges(student, config), config.steps_per_epoch
    agm, mix = distiller.config.find(Agm), distiller.config.find(Mix)
    push = None if agm is None else _Push(agm, AgmMargin(agm, config.warmup_epochs * rounds, rounds, generator.device))
    mixer = None if mix is None else Mixer(mix, stage, distiller.ask)

    def lessons(n: int, images: Tensor, labels: Tensor, answer: Tensor | None, truth: Tensor) -> Terms:
        """What the student learns from the batch; its own answer and the teacher's serve where it stays as it is."""
        x = images if filter_batch is None else filter_batch(images)
        x, y = (x, labels) if mixer is None else mixer(n, x, labels)
        if x is not images or not distiller.plain:
            return distiller(x.contiguous(memory_format=torch.channels_last), y)
        return distiller.of_logits(distiller.answer(x) if answer is None else answer, truth, y)

    def step(n: int) -> Terms:
        epoch = n // rounds
        learns = epoch >= config.warmup_epochs
        z, labels = generator.draw(n)
        images = generator.images(z, labels)
        ranges.follow(epoch, images.detach())
        seen = teacher.observe(images, labels)
        answer = distiller.answer(images) if sees_student or (push is not None and push.wants(n)) else None
        own = objective(seen, answer if sees_student else None)
        terms = {f"g_{name}": value for name, value in own.items()}
        if push is not None and answer is not None and push.wants(n):
            gradients, more = push(n, seen, answer, sum_terms(own), generator.parameters)
            terms |= more
        else:
            gradients = torch.autograd.grad(sum_terms(own), generator.parameters, retain_graph=answer is not None)
        if learns:
            taught = lessons(n, images.detach(), labels, answer, seen.logits.detach())
            sgd.step(taught, epoch)
            terms |= taught
        if drift is not None:
            drift.note(gradients, None if answer is None else discrepancy(answer.detach(), seen.logits).median())
        generator.step(gradients, n)
        return terms

    def after_epoch(n: int) -> dict[str, Any] | None:
        epoch, rest = divmod(n + 1, rounds)
        if rest:
            return None
        judged = evaluate(student) if evaluate is not None and epoch > config.warmup_epochs else None
        look = None if drift is None else drift.row(n)
        row = ({} if judged is None else {"epoch": epoch, **judged}) | ({} if look is None else {"temporal": look})
        return row or None

    tensors, optimizers = generator.state()
    parts = {**dict(student.named_parameters()), **ranges.tensors()}
    for part in (None if push is None else push.margin, drift):
        parts |= {} if part is None else part.tensors()
    state = State({**tensors, **parts}, {**optimizers, "student": sgd.optimizer})
    history = run_steps(stage, config.epochs * rounds, step, state, advice=ADVICE, after=after_epoch)
    sgd.end()
    losses = [row for row in history if not row.keys() & {"epoch", "temporal"}]
    looks = [{"step": row["step"], **row.pop("temporal")} for row in history if "temporal" in row]
    return Alternated(losses, [row for row in history if "epoch" in row], ranges.history(), looks)


class _Push:
    """AGM's part in the generator's step: the gradient that drives its images to where the networks still agree."""

    def __init__(self, idea: Agm, margin: AgmMargin) -> None:
        self._idea, self.margin = idea, margin

    def wants(self, step: int) -> bool:
        """Whether the student has to answer, to be pushed against or to find the margin by."""
        return self.margin.watches(step) or self.margin.counts(step)

    def __call__(
        self, step: int, seen: Context, answer: Tensor, own: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Terms]:
        """The gradients of the generator's own loss with AGM's, through both networks; and AGM's term."""
        idea, margin = self._idea, self.margin
        loss, median = adversarial_margin(
            answer, seen.logits, margin.margin, margin.sigma, form=idea.form, kind=idea.discrepancy
        )
        if not margin.counts(step):
            margin.watch(step, median)
            return torch.autograd.grad(own, parameters, retain_graph=True), {}
        term = idea.weight * loss
        (base,) = torch.autograd.grad(own, [seen.images], retain_graph=True)
        (extra,) = torch.autograd.grad(term, [seen.images], retain_graph=True)
        right = (seen.logits.detach().argmax(1) == seen.labels).float().mean()
        extra = limited(base, extra, right, idea.limit_below)
        return torch.autograd.grad([seen.images], parameters, [base + extra], retain_graph=True), {"g_agm": term}


class _Ranges:
    """The activation ranges: they follow the images of some epochs and stand still in all others."""

    def __init__(self, student: fx.GraphModule, config: AlternateConfig) -> None:
        self._student, self._config = student, config
        self._trace: RangeTrace | None = None
        if activation_quantizers(student):
            self._fused = fuse(weights_together(student))
            self._trace = RangeTrace(student, config.range_epochs * config.steps_per_epoch)

    @torch.no_grad()
    def follow(self, epoch: int, images: Tensor) -> None:
        """Sees the images of that epoch, if it is one to be followed."""
        start = self._config.range_start
        if self._trace is not None and start <= epoch < start + self._config.range_epochs:
            with calibrating(self._student):
                self._fused(images)
            self._trace.record()

    def tensors(self) -> dict[str, Tensor]:
        if self._trace is None:
            return {}
        buffers = {name: b for name, b in self._student.named_buffers() if name.startswith("quantizers.")}
        return {**buffers, "trace": self._trace.rows}

    def history(self) -> list[dict[str, Any]]:
        """The ranges by batch."""
        return [] if self._trace is None else self._trace.history()
