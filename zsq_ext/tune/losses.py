"""The fine-tuning losses of the data-free quantization literature, each a plain function.

Shapes: B samples, K classes, C channels. Logits in fp16 or bf16 are widened to fp32 first; the results are
0-d unless said otherwise. Nothing is detached here: some published forms let the gradient pass through the
teacher, so the caller decides.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.synth.objectives import widen, wrong_over_right

KD_SCALINGS = ("kl_mean", "kl_batchmean", "mse", "entropy")
"""What the published systems call distillation, see `kd`."""


def kd_kl(
    student: Tensor,
    teacher: Tensor,
    alpha: float = 20.0,
    temperature: float = 20.0,
    reduction: str = "batchmean",
) -> Tensor:
    """Distillation by the divergence of tempered softmaxes.

        alpha * T^2 * KL( softmax(teacher / T) || softmax(student / T) )

    At T = 20 the distributions are nearly flat and the sum over classes is about the variance over classes of
    (student - teacher) / (2 T^2): with alpha = 20 the loss is ten times that variance.

    Args:
        student, teacher: logits (B, K).
        alpha: weight.
        temperature: T, > 0.
        reduction: "batchmean" sums over classes and averages over samples, as IntraQ, HAST and SynQ do;
            "mean" also averages over classes, as GDFQ, Qimera and AIT do, and is K times smaller.

    Returns:
        The loss, >= 0.

    Raises:
        ValueError: logits of different shape or not (B, K), temperature not positive, unknown reduction.

    Source: Hinton et al. (arXiv 1503.02531); scalings from the released code of the methods named.
    """
    _check_logits("kd_kl", student, teacher)
    if not temperature > 0:
        raise ValueError(f"kd_kl: temperature must be positive, got {temperature}")
    if reduction not in ("batchmean", "mean"):
        raise ValueError(f'kd_kl: reduction must be "batchmean" or "mean", got {reduction!r}')
    log_q = (widen(student) / temperature).log_softmax(1)
    # at -80 a probability is as good as zero, and its inverse is still a float
    log_p = (widen(teacher) / temperature).log_softmax(1).clamp_min(-80)
    # e^r - 1 - r instead of -r: the same sum, because both distributions sum to one, but without the first-order
    # terms that cancel. What remains of them in fp32 is 5 % of the loss when logits differ by 0.01
    r = log_q - log_p
    each = (log_p.exp() * (torch.expm1(r) - r)).sum(1)
    kl = each.mean() if reduction == "batchmean" else each.mean() / student.shape[1]
    return alpha * temperature**2 * kl


def kd(student: Tensor, teacher: Tensor, scaling: str, alpha: float = 1.0, temperature: float = 20.0) -> Tensor:
    """Distillation in a named published scaling.

    With d = student - teacher, H the entropy and MSE the mean over samples and classes of d^2, the classes of each
    sample centred (all of them but "mse" ignore a shift of the logits):

    | scaling      | formula                                  | about, at high T | used by                    |
    |--------------|------------------------------------------|------------------|----------------------------|
    | kl_mean      | alpha T^2 mean over B and K of KL terms  | MSE / (2 K)      | GDFQ, Qimera, AIT          |
    | kl_batchmean | alpha T^2 mean over B of KL              | MSE / 2          | IntraQ, HAST, SynQ (a=20)  |
    | mse          | alpha mean over B and K of d^2           | MSE              | KMDFQ                      |
    | entropy      | -alpha T^2 mean over B of H(softmax(d/T))| MSE / 2 + const  | AdaSG, AdaDFQ              |

    So the same weight means something else in each: on 100 classes "mse" is 200 times "kl_mean".

    Args:
        student, teacher: logits (B, K).
        scaling: a name from `KD_SCALINGS`.
        alpha: weight.
        temperature: T, > 0; "mse" has none.

    Returns:
        The loss; "entropy" is lowest, -alpha T^2 log K, where the logits agree.

    Raises:
        ValueError: as `kd_kl`, or an unknown scaling.

    Example:
        >>> teacher = torch.tensor([[1.0, 0.0]])
        >>> kd(teacher + torch.tensor([[2.0, 0.0]]), teacher, "mse")
        tensor(2.)
    """
    if scaling not in KD_SCALINGS:
        raise ValueError(f"kd: scaling must be one of {', '.join(KD_SCALINGS)}, got {scaling!r}")
    if scaling.startswith("kl_"):
        return kd_kl(student, teacher, alpha, temperature, scaling.removeprefix("kl_"))
    _check_logits("kd", student, teacher)
    if scaling == "mse":
        return alpha * F.mse_loss(widen(student), widen(teacher))
    if not temperature > 0:
        raise ValueError(f"kd: temperature must be positive, got {temperature}")
    log_p = ((widen(student) - widen(teacher)) / temperature).log_softmax(1)
    return alpha * temperature**2 * (log_p.exp() * log_p).sum(1).mean()


def difficulty(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """How far the teacher is from the assigned label.

        delta = 1 - softmax(teacher_logits)[label]

    Computed from the odds, so a difficulty of 1e-20 is not rounded to zero.

    Args:
        teacher_logits: (B, K), K >= 2.
        labels: (B,) int64.

    Returns:
        (B,) in [0, 1], temperature 1.

    Source: HAST, and SynQ (arXiv 2603.18423), eq. 6.
    """
    return torch.sigmoid(wrong_over_right(teacher_logits, labels))


def easy_mask(delta: Tensor, tau: float, *, strict: bool) -> Tensor:
    """The samples whose hard label is trusted.

    Args:
        delta: difficulties (B,).
        tau: threshold in [0, 1].
        strict: delta < tau, as SynQ's released code has it, instead of delta <= tau, as its paper writes.

    Returns:
        (B,) bool.
    """
    return delta < tau if strict else delta <= tau


def masked_ce(logits: Tensor, labels: Tensor, easy: Tensor) -> Tensor:
    """Cross-entropy of the easy samples, divided by the whole batch.

        (1 / B) sum over easy i of CE_i

    The gradient is that of the released code, which replaces hard samples' logits and labels by zeros and
    keeps them in the mean. Few easy samples therefore mean a weak term, not a noisy one.

    Args:
        logits: (B, K).
        labels: (B,) int64.
        easy: (B,) bool, from `easy_mask`.

    Returns:
        The loss; 0 when no sample is easy.

    Source: SynQ (arXiv 2603.18423), eq. 6.
    """
    each = F.cross_entropy(widen(logits), labels, reduction="none")
    return torch.where(easy, each, 0).mean()


def feature_alignment(teacher_maps: Sequence[Tensor], student_maps: Sequence[Tensor]) -> Tensor:
    """Distance of the channel energies of matching layers, blind to their overall scale.

        e_l = mean over H, W of A_l^2,     sum_l  mean over B, C of (e_l^t / |e_l^t| - e_l^s / |e_l^s|)^2

    |.| is the Euclidean norm over the channels of one sample.

    Args:
        teacher_maps, student_maps: one (B, C_l, H_l, W_l) per layer, same order.

    Returns:
        The loss, unweighted (HAST's weight is 1000).

    Raises:
        ValueError: different numbers of layers, none, or layers of different shape.

    Source: HAST's feature alignment, released code.
    """
    if len(teacher_maps) != len(student_maps) or not teacher_maps:
        raise ValueError(
            "feature_alignment: teacher_maps and student_maps must have the same number of layers, at least one, "
            f"got {len(teacher_maps)} and {len(student_maps)}"
        )
    distances = []
    for layer, (teacher, student) in enumerate(zip(teacher_maps, student_maps, strict=True)):
        if teacher.shape != student.shape or teacher.ndim != 4:
            raise ValueError(
                f"feature_alignment: maps of layer {layer} must have one shape (B, C, H, W), "
                f"got {tuple(teacher.shape)} and {tuple(student.shape)}"
            )
        distances.append(F.mse_loss(_channel_energy(student), _channel_energy(teacher)))
    return torch.stack(distances).sum()


def signed_perturbation(x: Tensor, grad: Tensor, eps: float = 0.01) -> Tensor:
    """The image moved one signed step up its loss, a constant for the pass that follows.

        x + eps * sign(grad)

    Args:
        x: images, any shape.
        grad: gradient of the clean loss with respect to x, same shape.
        eps: step in units of x.

    Returns:
        The moved images, detached.

    Source: HAST's sample-difficulty promotion; SynQ (arXiv 2603.18423), appendix D.
    """
    return x.detach() + eps * grad.detach().sign()


def _channel_energy(feature: Tensor) -> Tensor:
    """(B, C) mean squares over the spatial axes, of unit norm per sample."""
    return F.normalize(widen(feature).square().mean((2, 3)), dim=1)


def _check_logits(function: str, student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"{function}: student and teacher must have one shape (B, K), "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
