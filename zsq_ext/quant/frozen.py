"""Frozen batch norms, which detectors are trained with, as the batch norms that they equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


def thaw(model: nn.Module) -> nn.Module:
    """Puts a batch norm in eval mode in the place of every frozen one, such as torchvision's ``FrozenBatchNorm2d``.

    That module computes x s + (bias - mean s), s = weight / sqrt(var + eps), from four buffers by hand, so nothing in a
    graph says that it is a batch norm. It is recognised by what it holds and does, not by its name: exactly those four
    buffers, no parameter, no part, and the values of the batch norm on a probe.

    Args:
        model: changed in place; it must be a copy of our own.

    Returns:
        The model, or the batch norm if the model itself was a frozen one.
    """
    instead = {id(layer): norm for layer in model.modules() if (norm := _batch_norm(layer)) is not None}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in instead:
                parent._modules[name] = instead[id(child)]
    return instead.get(id(model), model)


def _batch_norm(layer: nn.Module) -> nn.BatchNorm2d | None:
    """The batch norm that computes what the layer computes, if the layer is a frozen one."""
    if layer._buffers.keys() != _BUFFERS or layer._parameters or layer._modules:
        return None
    stored = {name: tensor for name, tensor in layer._buffers.items() if tensor is not None and tensor.ndim == 1}
    mean = stored.get("running_mean")
    if mean is None or len(stored) != 4 or any(tensor.shape != mean.shape for tensor in stored.values()):
        return None
    norm = nn.BatchNorm2d(len(mean), eps=float(getattr(layer, "eps", 0.0)), device=mean.device, dtype=mean.dtype)
    norm.load_state_dict(stored, strict=False)  # it counts no batches
    norm.eval()
    return norm if _same(layer, norm, stored) else None


@torch.no_grad()
def _same(layer: nn.Module, norm: nn.BatchNorm2d, stored: dict[str, Tensor]) -> bool:
    mean, var = (stored[name][:, None, None] for name in ("running_mean", "running_var"))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, len(mean), 3, 3, generator=generator).to(mean) * var.sqrt() + mean
    try:
        got = layer(probe.clone())
    except (RuntimeError, ValueError, TypeError):
        return False
    if not isinstance(got, Tensor) or got.shape != probe.shape:
        return False
    # two orders of the same few operations; terms of a channel may cancel, so its largest one is the measure
    slope, shift = (stored[name].abs()[:, None, None] for name in ("weight", "bias"))
    terms = slope / (var + norm.eps).sqrt() * torch.maximum(probe.abs(), mean.abs()) + shift
    return bool(((got - norm(probe)).abs() <= 16 * torch.finfo(mean.dtype).eps * terms).all())
