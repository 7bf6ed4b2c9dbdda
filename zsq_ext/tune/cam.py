"""Class activation maps of a network's last feature, and the loss that aligns a student's map with the teacher's.

Grad-CAM weighs the feature A, the output of the last convolution, by alpha_k = mean over positions of dy/dA_k, y being
the logit of one class, and shows S = ReLU(sum_k alpha_k A_k). Where only BN, a residual sum, ReLU or ReLU6, pooling and
one linear layer follow, alpha is known in closed form and costs neither a forward nor a backward pass. The weights are
constants: the gradient reaches the student through A alone, and never the teacher.

Shapes: B samples, K channels, H x W positions, C classes.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.ops import cam_map, count_active
from zsq_ext.synth.objectives import widen

NORMALISATIONS = ("minmax_upsampled", "minmax_native", "raw")
"""How two maps are made comparable, see `cam_loss`."""

CLASS_RULES = ("argmax", "label")
"""Which class a map explains, see `cam_classes`."""

ALPHA_FLOOR = 1e-10
"""SynQ's released code raises every weight to at least this, which drops the negative ones."""

SPAN_EPS = 1e-10
"""Added to a map's span before dividing by it, as released."""

FLAT = 1e-5
"""A map whose span is below this share of its largest value is constant: that much is fp32 rounding of a sum
over channels, and dividing by it would blow the rounding up to a full-scale map."""


def bn_slope(weight: Tensor, running_var: Tensor, eps: float) -> Tensor:
    """Slope of a batch norm in eval mode, weight / sqrt(running_var + eps).

    Args:
        weight, running_var: (K,), the BN's gamma and stored variance.
        eps: the BN's own.

    Returns:
        (K,).
    """
    return weight / (running_var + eps).sqrt()


def cam_classes(logits: Tensor, labels: Tensor, rule: str) -> Tensor:
    """The class whose evidence is mapped.

    Args:
        logits: (B, C) of the network whose map it is.
        labels: (B,) int64, the images' labels.
        rule: "argmax", each network's own prediction (SynQ's released code), or "label" (its equation 5).

    Returns:
        (B,) int64.

    Raises:
        ValueError: unknown rule.
    """
    if rule not in CLASS_RULES:
        raise ValueError(f'cam_classes: rule must be "argmax" or "label", got {rule!r}')
    return logits.argmax(1) if rule == "argmax" else labels


@torch.no_grad()
def closed_form_alpha(
    fc_weight: Tensor, classes: Tensor, slope: Tensor, pre_activation: Tensor, *, upper: float | None = None
) -> Tensor:
    """Grad-CAM weights of conv -> BN (eval) -> (+ identity) -> activation -> mean pooling -> linear.

        alpha_k = fc_weight[class, k] * slope_k * share_k / (H W)

    share_k is the share of positions where the activation passes the gradient: pre_activation > 0, and < upper where
    there is an upper bound. A fake-quantizer after the activation whose gradient is the identity changes nothing.

    Args:
        fc_weight: (C, K), the weights the forward pass used: quantized ones for the student.
        classes: (B,) int64, from `cam_classes`.
        slope: (K,), from `bn_slope`; of the BN that reads A.
        pre_activation: (B, K, H, W), what enters the activation, after the residual sum.
        upper: None for ReLU, 6 for ReLU6.

    Returns:
        (B, K), without gradient.

    Raises:
        ValueError: shapes that do not fit, or a 1 x 1 map.

    Source: SynQ (arXiv 2603.18423), eq. 5, differentiated by hand.
    """
    batch, channels = _check_map("closed_form_alpha", "pre_activation", pre_activation)
    if fc_weight.ndim != 2 or fc_weight.shape[1] != channels or slope.shape != (channels,):
        raise ValueError(
            f"closed_form_alpha: fc_weight must be (C, {channels}) and slope ({channels},), "
            f"got {tuple(fc_weight.shape)} and {tuple(slope.shape)}"
        )
    if classes.shape != (batch,):
        raise ValueError(f"closed_form_alpha: classes must have shape ({batch},), got {tuple(classes.shape)}")
    positions = pre_activation[0, 0].numel()
    # the count is an integer: multiplied before it is divided, or float64 weights would get an fp32 share
    return widen(fc_weight)[classes] * slope * count_active(pre_activation, upper) / positions**2


def autograd_alpha(logits: Tensor, activation: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM weights of any tail, by differentiating the chosen logits.

        alpha_k = mean over positions of d logits[class] / d activation_k

    For tails that `closed_form_alpha` does not describe. The graph is kept, so the same forward pass can
    still be trained on.

    Args:
        logits: (B, C), computed from activation, each sample from its own.
        activation: (B, K, H, W), part of the graph of logits.
        classes: (B,) int64.

    Returns:
        (B, K), without gradient.

    Raises:
        ValueError: a map of 1 x 1, or not (B, K, H, W).
    """
    _check_map("autograd_alpha", "activation", activation)
    chosen = logits.gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, activation, retain_graph=True)
    return gradient.mean((2, 3))


def min_max_normalise(maps: Tensor, extremes: Tensor | None = None) -> Tensor:
    """Each map stretched to [0, 1]; a constant one becomes zero and passes no gradient.

        (S - min S) / (max S - min S + 1e-10)

    Args:
        maps: (B, H, W), >= 0.
        extremes: (B, ...) values that hold the minimum and maximum to stretch by; None means the map's own.

    Returns:
        Same shape as maps; minimum and maximum are differentiated too.
    """
    values = (maps if extremes is None else extremes).flatten(1)
    lowest, highest = values.amin(1)[:, None, None], values.amax(1)[:, None, None]
    span = highest - lowest
    flat = (span <= FLAT * highest).detach()
    # the inner choice keeps 1 / 1e-10 out of the gradient of the branch that is not taken
    return torch.where(flat, 0, (maps - lowest) / (torch.where(flat, 1, span) + SPAN_EPS))


def cam_loss(
    student_alpha: Tensor,
    student_activation: Tensor,
    teacher_alpha: Tensor,
    teacher_activation: Tensor,
    *,
    normalise: str = "minmax_upsampled",
    size: tuple[int, int] | None = None,
    floor: float | None = ALPHA_FLOOR,
) -> Tensor:
    """Distance between the student's and the teacher's class activation maps.

    | normalise        | what is compared                                                        | profile |
    |------------------|-------------------------------------------------------------------------|---------|
    | minmax_upsampled | maps upsampled to `size` (bilinear, align_corners=False), then stretched| repo    |
    |                  | to [0, 1] per sample; mean squared error over samples and pixels        |         |
    | minmax_native    | the same on the H x W maps themselves                                   | ours    |
    | raw              | the maps as they are; squared Frobenius norm, mean over samples (eq. 5) | paper   |

    The released form is `normalise="minmax_upsampled"` with the floor, the paper's `"raw"` with `floor=None`.
    Under min-max a constant map counts as zero, so that rounding noise is never aligned.

    The upsampled maps are never formed. Upsampling is U S V^T with rows that sum to one, so it commutes with
    the stretch, and the squared error of a native difference D is <U^T U D V^T V, D>. The extremes of an
    upsampled map lie at the corners of its cells, of which there are four per native pixel. Measured on
    one CPU core, forward and backward take 1/35 of the explicit form's time from 7 x 7 to 224 x 224 (16
    samples) and 1/7 from 8 x 8 to 32 x 32 (256 samples).

    Args:
        student_alpha, teacher_alpha: weights (B, K_s) and (B, K_t), from `closed_form_alpha` or
            `autograd_alpha`.
        student_activation, teacher_activation: (B, K_s, H, W) and (B, K_t, H, W).
        normalise: a name from `NORMALISATIONS`.
        size: (H_in, W_in) of the images, needed by "minmax_upsampled" only.
        floor: raise the weights to at least this (`ALPHA_FLOOR` as released); None leaves them as the paper does.

    Returns:
        The loss, differentiable in student_activation alone.

    Raises:
        ValueError: unknown normalisation, a missing size, maps of different or of 1 x 1 size.

    Source: SynQ (arXiv 2603.18423), eq. 5, and its released code.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"cam_loss: normalise must be one of {', '.join(NORMALISATIONS)}, got {normalise!r}")
    student = _map("student", student_alpha, student_activation, floor)
    teacher = _map("teacher", teacher_alpha, teacher_activation.detach(), floor)
    if student.shape != teacher.shape:
        raise ValueError(
            "cam_loss: student and teacher maps must have one shape (B, H, W), "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if normalise == "raw":
        return (student - teacher).square().sum((1, 2)).mean()
    if normalise == "minmax_native":
        return F.mse_loss(min_max_normalise(student), min_max_normalise(teacher))
    if size is None:
        raise ValueError("cam_loss: size must be the images' (H, W) for minmax_upsampled, got None")
    return _upsampled_error(student, teacher, size)


def _map(whose: str, alpha: Tensor, activation: Tensor, floor: float | None) -> Tensor:
    _check_map("cam_loss", f"{whose}_activation", activation)
    compute = torch.float64 if activation.dtype == torch.float64 else torch.float32
    return cam_map(activation, alpha.to(compute), floor=floor)


def _upsampled_error(student: Tensor, teacher: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean squared error of the stretched upsampled maps, computed on the native ones (see `cam_loss`)."""
    batch, height, width = student.shape
    corner_rows, gram_rows = _upsampling(height, size[0], student.device, student.dtype)
    corner_columns, gram_columns = _upsampling(width, size[1], student.device, student.dtype)
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = (
            min_max_normalise(maps, corner_rows @ maps @ corner_columns.mT) for maps in (student, teacher)
        )
        difference = student - teacher
        squared = (gram_rows @ difference @ gram_columns) * difference
    return squared.sum() / (batch * size[0] * size[1])


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _upsampling(n: int, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bilinear upsampling (align_corners=False) of one axis as a matrix U, (size, n), reduced to what a loss needs.

    Kept per size and device, because a copy from the host in every step could not be captured in a CUDA graph.

    Returns:
        The rows of U that begin or end a cell, the interval between two native pixels, where alone a
        piecewise bilinear map can be extreme; and U^T U.
    """
    identity = torch.eye(n, dtype=torch.float64)[None, None]
    matrix = F.interpolate(identity, size=(size, n), mode="bilinear", align_corners=False)[0, 0]
    position = ((torch.arange(size, dtype=torch.float64) + 0.5) * n / size - 0.5).clamp(0, n - 1)
    cell = position.floor().clamp_max(max(n - 2, 0))
    turns = cell[1:] != cell[:-1]
    end = torch.ones(1, dtype=torch.bool)
    corners = torch.cat([end, turns]) | torch.cat([turns, end])
    return matrix[corners].to(device, dtype), (matrix.mT @ matrix).to(device, dtype)


def _check_map(function: str, name: str, maps: Tensor) -> tuple[int, int]:
    """Batch and channels of a (B, K, H, W) map with more than one position."""
    if maps.ndim != 4:
        raise ValueError(f"{function}: {name} must be (B, K, H, W), got shape {tuple(maps.shape)}")
    if maps.shape[2] * maps.shape[3] == 1:
        raise ValueError(
            f"{function}: {name} must have more than one position, got a 1 x 1 map: choose the last convolution before "
            "pooling, not a classifier written as a convolution"
        )
    return maps.shape[0], maps.shape[1]
