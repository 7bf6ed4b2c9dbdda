"""What fine-tuning losses are made of beside the head of distillation, which is `ops.distill_head`.

Shapes: B samples, C channels. Maps in fp16 or bf16 are widened to fp32 first. Nothing is detached here: the caller
decides where a gradient passes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.synth.objectives import widen


def feature_alignment(teacher_maps: Sequence[Tensor], student_maps: Sequence[Tensor]) -> Tensor:
    """Distance of the channel energies of matching layers, blind to their overall scale.

        e_l = mean over H, W of A_l^2,     sum_l  mean over B, C of (e_l^t / |e_l^t| - e_l^s / |e_l^s|)^2

    |.| is the Euclidean norm over the channels of one sample.

    Args:
        teacher_maps, student_maps: one (B, C_l, H_l, W_l) per layer, same order; or their energies e_l, (B, C_l).

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
        if teacher.shape != student.shape or teacher.ndim not in (2, 4):
            raise ValueError(
                f"feature_alignment: maps of layer {layer} must have one shape (B, C, H, W) or (B, C), "
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
    """(B, C) mean squares over the spatial axes, or what are such already, of unit norm per sample."""
    return F.normalize(widen(feature).square().mean((2, 3)) if feature.ndim == 4 else feature, dim=1)
