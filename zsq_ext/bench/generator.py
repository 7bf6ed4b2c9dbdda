"""The suite `generator`: images from noise and all gradients, at the published sizes.

The peer ``plain`` is the same generator with upsampling and convolution as two steps. ``flops`` are a call's, and
``flops_plain`` the peer's; ``peak_mb`` is what a call allocates at its peak, ``peak_mb_plain`` what the peer does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.bench import timing
from zsq_ext.bench.steps import count_flops
from zsq_ext.core.progress import Progress
from zsq_ext.synth.generator import Generator

# (kind, side, classes, batch): CIFAR-100 at AdaDFQ's and at GDFQ's batch, and one between; ImageNet, whose batch of 16
# takes a CPU of two cores half a minute to measure
CASES = (
    ("embedding", 32, 100, 16),
    ("embedding", 32, 100, 64),
    ("embedding", 32, 100, 200),
    ("conditional", 224, 1000, 16 if torch.cuda.is_available() else 4),
)

# In fp32 a batch norm of 10^5 values and more errs by 1e-5 and more of its result
_TOLERANCE = 1e-3


def rows(progress: Progress) -> list[dict[str, Any]]:
    """Every case, the images alone and with the gradients of all parameters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    with progress.stage("generator", len(CASES)) as stage:
        for case in CASES:
            found += [_row(case, pass_, device) for pass_ in ("forward", "forward+backward")]
            stage.advance(note=f"{case[1]} px, batch {case[3]}")
    return found


def _row(case: tuple[str, int, int, int], pass_: str, device: str) -> dict[str, Any]:
    kind, side, classes, batch = case
    ours, plain = _calls(kind, side, classes, batch, pass_, device)
    timing.assert_equal(f"generator, {side} px", ours(), plain(), _TOLERANCE)
    times = timing.compare({"ours": ours, "plain": plain}, [()], device, seconds=3)
    row = timing.row(
        op="generator", case=f"{kind} {side} px B={batch}", dtype=torch.float32, device=device, backend="torch",
        pass_=pass_, timing=times["ours"], bytes_=0, flops=count_flops(ours),
        flops_per_second=timing.matmul_rate(device), peers={"plain": times["plain"]},
        peak=timing.peak_mb(ours, device),
    )  # fmt: skip
    return {**row, "flops_plain": count_flops(plain), "peak_mb_plain": timing.peak_mb(plain, device)}


def _calls(
    kind: str, side: int, classes: int, batch: int, pass_: str, device: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The generator and its plain form, of the same parameters, as functions without arguments."""
    shape = 3, side, side
    ours, plain = (Generator(classes, shape, kind=kind, plain=p).to(device) for p in (False, True))
    plain.load_state_dict(ours.state_dict())
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(batch, 100, generator=draw).to(device)
    labels = torch.randint(classes, (batch,), generator=draw).to(device)
    grad = torch.randn(batch, *shape, generator=draw).to(device, memory_format=torch.channels_last)

    def call(generator: Generator) -> Callable[[], Tensor]:
        if pass_ == "forward":
            return torch.no_grad()(lambda: generator(z, labels))
        parameters = list(generator.parameters())

        def both() -> Tensor:
            gradients = torch.autograd.grad(generator(z, labels), parameters, grad)
            return torch.cat([gradient.flatten()[:4096] for gradient in gradients])

        return both

    return call(ours), call(plain)
