"""The head of distillation: divergence, trusted cross-entropy and accuracies in one pass over both networks' logits."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq_ext.ops import backend
from zsq_ext.ops import check as checks
from zsq_ext.ops.heads_spec import TERMS, Grads, Kept, Needs, Terms, Trust
from zsq_ext.ops.layout import COMPUTE
from zsq_ext.ops.once import differentiable_once
from zsq_ext.ops.reference.heads import ROW

KD_SCALINGS = ("kl_mean", "kl_batchmean", "mse", "entropy")
"""What the published systems call distillation, see `distill_head`."""


class Distilled(NamedTuple):
    """What `distill_head` returns."""

    kd: Tensor
    ce: Tensor
    easy: Tensor
    right: Tensor
    agree: Tensor
    trusted: Tensor


def _gathered(
    student: Tensor, teacher: Tensor, labels: Tensor | None, easy: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    return student, teacher, Trust(labels, easy, *rest[4:]), Terms(*rest[:4])


def _gathered_backward(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Any, ...]:
    return student, teacher, Kept(*rest[:3]), Grads(*rest[3:5]), Terms(*rest[5:9]), Needs(*rest[9:])


def _fake(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    samples, compute = student.size(0), COMPUTE[student.dtype]
    return (
        student.new_empty((), dtype=compute),
        student.new_empty((), dtype=compute),
        student.new_empty(samples, dtype=torch.bool),
        student.new_empty(3, dtype=torch.int64),
        student.new_empty((samples, ROW), dtype=compute),
    )


def _fake_backward(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shapes = (student.shape if need else (0,) for need in rest[-2:])
    ds, dt = (student.new_empty(shape) for shape in shapes)
    return ds, dt


_op = backend.define(
    f"distill_head(Tensor student, Tensor teacher, Tensor? labels, Tensor? easy, {TERMS}, float? tau, bool strict) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    gathered=_gathered,
)
_op_backward = backend.define(
    "distill_head_backward(Tensor student, Tensor teacher, Tensor? labels, Tensor easy, Tensor rows, Tensor? grad_kd, "
    f"Tensor? grad_ce, {TERMS}, bool need_student, bool need_teacher) -> (Tensor, Tensor)",
    _fake_backward,
    gathered=_gathered_backward,
)


class _DistillHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor | None, easy: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        # A gradient that nobody sent then arrives as None, and its term is skipped; a compiler's graph has no such
        # thing as an absent gradient, and sends zeros.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        kd, ce, easy, counts, rows = _op(student, teacher, labels, easy, *rest)
        ctx.mark_non_differentiable(easy, counts)
        ctx.save_for_backward(student, teacher, labels, easy, rows)
        ctx.rest = rest[:4]
        return kd, ce, easy, counts

    @staticmethod
    @differentiable_once("distill_head")
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_kd: Tensor | None, grad_ce: Tensor | None, *counts: Any
    ) -> tuple[Tensor | None, ...]:
        if grad_kd is None and grad_ce is None:
            return (None,) * 10
        need_student, need_teacher = ctx.needs_input_grad[:2]
        need_teacher = need_teacher and grad_kd is not None
        ds, dt = _op_backward(*saved, grad_kd, grad_ce, *ctx.rest, need_student, need_teacher)
        return ds if need_student else None, dt if need_teacher else None, *(None,) * 8


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    checks.compute_dtype("distill_head", "student", student)
    if student.dim() != 2 or student.size(1) < 2:
        raise ValueError(f"distill_head: student must have shape (B, K) with K >= 2, got {tuple(student.shape)}")
    checks.beside("distill_head", "teacher", teacher, student.dtype, student.shape, student.device)


def _check_numbers(alpha: float, temperature: float, ce: float, tau: float | None) -> None:
    for name, value in (("alpha", alpha), ("temperature", temperature), ("ce", ce)):
        checks.number("distill_head", name, value)
    if not 0 < temperature < math.inf:
        raise ValueError(f"distill_head: temperature must be positive and finite, got {temperature}")
    for name, weight in (("alpha", alpha), ("ce", ce)):
        if not -math.inf < weight < math.inf:
            raise ValueError(f"distill_head: {name} must be finite, got {weight}")
    if tau is not None:
        checks.number("distill_head", "tau", tau, rule="None or a number")
        if not 0 <= tau <= 1:
            raise ValueError(f"distill_head: tau must be None or in [0, 1], got {tau}")


def _check_labels(labels: Tensor, classes: int) -> None:
    for sample, label in enumerate(labels.tolist()):
        if not 0 <= label < classes:
            raise ValueError(f"distill_head: labels must be in [0, {classes - 1}], got {label} in sample {sample}")


def distill_head(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    kd: str = "kl_batchmean",
    alpha: float = 1.0,
    temperature: float = 20.0,
    ce: float = 1.0,
    tau: float | None = None,
    strict: bool = True,
    easy: Tensor | None = None,
    check: bool = False,
) -> Distilled:
    """Distillation from a teacher, cross-entropy of the labels that the teacher trusts, and who was right.

    With d = student - teacher, T the temperature, H the entropy and KL the divergence of softmax(teacher / T) from
    softmax(student / T), and MSE the mean over samples and classes of d^2, each sample's classes centred (all but
    "mse" ignore a shift of the logits):

    | kd           | formula                                    | about, at high T | used by                     |
    |--------------|--------------------------------------------|------------------|-----------------------------|
    | kl_mean      | alpha T^2 mean over B and K of KL's terms  | MSE / (2 K)      | GDFQ, Qimera, AIT           |
    | kl_batchmean | alpha T^2 mean over B of KL                | MSE / 2          | IntraQ, HAST, SynQ (a = 20) |
    | mse          | alpha mean over B and K of d^2             | MSE              | KMDFQ                       |
    | entropy      | -alpha T^2 mean over B of H(softmax(d / T))| MSE / 2 + const  | AdaSG, AdaDFQ               |

    So the same weight means something else in each: on 100 classes "mse" is 200 times "kl_mean". The other term is

        ce * (1 / B) sum over easy i of -log softmax(student_i)[label_i]

    divided by the whole batch, as the gradient of SynQ's released code is: few easy samples mean a weak term, not a
    noisy one. A sample is easy where the teacher is near its label, in SynQ's words of a difficulty up to tau:

        delta = 1 - softmax(teacher)[label],     easy = delta < tau (strict, as released) or <= tau (as written)

    Nothing cancels: KL sums p (e^r - 1 - r) with r the log-ratio, delta and the cross-entropy come from the odds
    against the label, so that neither a KL of 1e-8 nor a delta of 1e-20 is rounding. Probabilities of the teacher
    below e^-80 count as e^-80 in KL. Sums over classes are taken in float32 (float64 for float64 logits), those over
    samples in float64 and in order, so a backend repeats its own bits, on any number of threads; backends differ by
    rounding. delta and tau are compared in float32.

    Both gradients are closed forms, one pass for any loss on kd and ce; the teacher's, through kd alone, where it is
    wanted. There is no second derivative.

    Args:
        student, teacher: logits (B, K), K >= 2, of one dtype, any strides; float32, float16, bfloat16, or float64 (on
            the reference and cpu backends).
        labels: (B,) int64, in [0, K): one outside makes ce, and that sample's gradient, NaN. None for no labels: then
            nothing is easy and ce is 0.
        kd: a name from `KD_SCALINGS`.
        alpha, ce: weights of the terms, finite.
        temperature: T, > 0; "mse" has none.
        tau, strict: as above, tau in [0, 1]; None trusts every label.
        easy: (B,) bool, instead of tau: who is easy has been decided, as for an image that was moved since.
        check: also verify that the labels are in range, which waits for the device.

    Returns:
        (kd, ce, easy, right, agree, trusted). kd and ce are 0-d, float32 (float64 for float64 logits), and NaN for an
        empty batch; easy is (B,) bool; right, agree and trusted are 0-d int64 on the device: for how many samples the
        student's largest logit is the label's, how many the two networks agree on, and how many are easy.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, name or number is not as above.
        NotImplementedError: the forced backend cannot run it; or a second derivative is asked for.

    Example:
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> student = teacher + torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> distill_head(student, teacher, torch.tensor([0, 0]), kd="mse", tau=0.5)[:3]
        (tensor(1.), tensor(0.0243), tensor([ True, False]))

    Source: Hinton et al. (arXiv 1503.02531); the scalings are from the released code of the methods named; delta is
    HAST's, and with the easy samples SynQ's (arXiv 2603.18423), eq. 6.
    """
    _check_logits(student, teacher)
    checks.one_of("distill_head", "kd", kd, KD_SCALINGS)
    _check_numbers(alpha, temperature, ce, tau)
    checks.flag("distill_head", "strict", strict)
    checks.flag("distill_head", "check", check)
    samples, classes = student.shape
    if labels is not None:
        checks.beside("distill_head", "labels", labels, torch.int64, (samples,), student.device)
        if check:
            _check_labels(labels, classes)
    if easy is not None:
        checks.beside("distill_head", "easy", easy, torch.bool, (samples,), student.device)
        if labels is None or tau is not None:
            rule = "labels" if labels is None else "no tau"
            raise ValueError(f"distill_head: easy must come with {rule}, got {None if labels is None else tau}")
    number = None if tau is None else float(tau)
    args = student, teacher, labels, easy, kd, float(alpha), float(temperature), float(ce), number, strict
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        total_kd, total_ce, easy, counts = _DistillHead.apply(*args)
    else:
        total_kd, total_ce, easy, counts, _ = _op(*args)
    return Distilled(total_kd, total_ce, easy, *counts.unbind())
