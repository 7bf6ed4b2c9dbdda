"""One step of DGH's image making, and the same as it is written without the ops: hooks, and a reduction at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from zsq_ext.bench import timing
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods import dgh
from zsq_ext.quant.structure import heads
from zsq_ext.synth.stored import ImageSet
from zsq_ext.synth.whole_set import SetTeacher

BATCHES = 8  # as published: 1024 images, 128 at a time
SPEC = InputSpec((3, 32, 32), valid_range=(-2.0, 2.0))

# So small a rate moves no pixel, so that every call does the same. One view for all of a batch, as released, because
# torch has no crop for each; smoothed, as all published images are.
CONFIG = dgh.images("smoke", "repo")
CONFIG = replace(CONFIG, stored=replace(CONFIG.stored, lr=1e-30, one_view=True, sigma=1.25))

Step = Callable[[], list[Tensor]]


def steps(model: nn.Module, module: fx.GraphModule, batch: int, device: str) -> tuple[Step, Step]:
    """Ours and the plain one, from view to updated pixels and statistics; both give the step's loss terms.

    Args:
        model: the network as its author wrote it.
        module: the same, captured.
        batch: images of a step; the set has ``BATCHES`` times as many.
        device: where both are.

    Raises:
        RuntimeError: their losses differ.
    """
    config = replace(CONFIG, stored=replace(CONFIG.stored, batch=batch))
    teacher = SetTeacher(module, heads=heads(module))
    start = torch.Generator().manual_seed(0)
    images = ImageSet(teacher, BATCHES * batch, SPEC, config.objective(teacher), config.stored, start)

    def ours() -> list[Tensor]:
        return list(images.step(0, torch.Generator(device).manual_seed(0)).values())

    plain = _Plain(model, [chunk.detach().clone() for chunk in images.batches], config, device)
    for got, want in zip(ours(), plain(), strict=True):
        timing.assert_equal("dgh_generation_step without the ops", got, want, 1e-4)
    return ours, plain


class _Plain:
    """The released step without its mistakes: weights frozen, no wait for the device, nothing computed twice."""

    def __init__(self, model: nn.Module, batches: list[Tensor], config: dgh.DghImages, device: str) -> None:
        self.network = copy.deepcopy(model).eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norms = [layer for layer in self.network.modules() if isinstance(layer, nn.BatchNorm2d)]
        self.inputs: dict[nn.Module, Tensor] = {}
        for norm in self.norms:
            norm.register_forward_pre_hook(lambda norm, args: self.inputs.update({norm: args[0]}))
        self.config, self.device = config, device
        self.low, self.high = (torch.full((3, 1, 1), end, device=device) for end in SPEC.valid_range or ())
        taps = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * (config.stored.sigma or 1.0) ** 2))
        taps = taps / taps.sum()
        self.kernel = (taps[:, None] * taps).expand(3, 1, 3, 3).to(device)
        # what the engine draws; one look at it, before any clock runs
        draws = torch.rand(1, 3, generator=torch.Generator(device).manual_seed(0), device=device)
        self.draw = draws[0].tolist()
        zeros = torch.zeros(3, device=device)
        self.targets: list[tuple[Any, Any]] = [
            (zeros, zeros + 1),
            *((n.running_mean, n.running_var) for n in self.norms),
        ]
        self.batch = batches[0].requires_grad_(True)
        self.optimizer = torch.optim.RAdam([self.batch], lr=config.stored.lr, capturable=device == "cuda")
        with torch.no_grad():
            self.table = [self._moments(self._view(chunk, None))[1] for chunk in batches]

    def _view(self, stored: Tensor, draw: list[float] | None) -> Tensor:
        border, (_, height, width) = self.config.stored.border, SPEC.shape
        top, left, flip = border // 2, border // 2, False
        if draw is not None:
            top, left = (int(draw[i] * (border + 1)) for i in (0, 1))
            flip = draw[2] < self.config.stored.flip
        x = F.conv2d(stored.flip(3) if flip else stored, self.kernel, padding=1, groups=3)
        x = x[:, :, top : top + height, left : left + width]
        with torch.no_grad():
            x.clamp_(self.low, self.high)  # the gradient passes straight through
        return x

    def _moments(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        logits = self.network(x)
        inputs = [x, *(self.inputs[norm] for norm in self.norms)]
        return logits, [(u.mean((0, 2, 3)), u.square().mean((0, 2, 3))) for u in inputs]

    def __call__(self) -> list[Tensor]:
        logits, mine = self._moments(self._view(self.batch, self.draw))
        used = [mine, *self.table[1:]]
        bns: Any = 0.0
        for layer, (mu, var) in enumerate(self.targets):
            mean, second = (torch.stack([batch[layer][i] for batch in used]).mean(0) for i in (0, 1))
            gap = (second - mean.square() + 1e-6).sqrt() - (var + 1e-6).sqrt()
            bns = bns + ((mean - mu).square().mean() + self.config.std_factor * gap.square().mean()) / len(self.targets)
        last, (mu, var) = self.inputs[self.norms[-1]], self.targets[-1]
        gaps = (last.mean((2, 3)) - mu, (last.var((2, 3)) + 1e-6).sqrt() - (var + 1e-6).sqrt())
        hinges = sum((gap.square().mean(1) - (self.config.margin or 0.0)).clamp_min(0) for gap in gaps)
        output = self.config.output * (hinges - (logits.max(1).values - logits.min(1).values)).mean()
        (self.batch.grad,) = torch.autograd.grad(bns + output, [self.batch])
        self.optimizer.step()
        with torch.no_grad():
            image = self._view(self.batch, None)
            first = (image.mean((0, 2, 3)), image.square().mean((0, 2, 3)))
        self.table[0] = [first, *((mean.detach(), second.detach()) for mean, second in mine[1:])]
        return [bns.detach(), output.detach()]
