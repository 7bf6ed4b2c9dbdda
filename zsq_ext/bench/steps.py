"""The suite `steps`: steps of image making and one of fine-tuning, with the ops on each backend in one run.

The peer ``eager`` is the same step on the network as it was captured, operator by operator, with the ops' reference:
what modules and hooks do. For DGH it is the plain loop of ``dgh_step.py``. ``peak_mb`` is what a step allocates at its
peak, ``peak_mb_eager`` what the peer does.

``outside_convolutions`` is the share of the step's own CPU time (or CUDA time) that is not spent in convolutions and
matrix products: what fusing the rest could win at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from zsq_ext.bench import dgh_step, timing
from zsq_ext.core.progress import Progress
from zsq_ext.core.steps import sum_terms
from zsq_ext.methods import synq
from zsq_ext.ops import backend
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.graph import batch_norms, with_taps
from zsq_ext.quant.modules import calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.synth.objectives import Statistics
from zsq_ext.synth.teacher import Context, Teacher
from zsq_ext.tune.distill import Distiller
from zsq_ext.zoo import small_nets

BATCH = 32
CLASSES = 40
MATRIX_OPS = ("conv", "mm", "addmm", "linear")


def rows(progress: Progress) -> list[dict[str, Any]]:
    """Both steps of SynQ and DGH's (smoke, released profiles, W4A4) on both embedded architectures, random weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    nets = {"resnet20": small_nets.resnet20, "mobilenet_small": small_nets.mobilenet_small}
    with progress.stage("steps", 3 * len(nets)) as stage:
        for name, build in nets.items():
            for op, (step, eager) in _steps(build(CLASSES).to(device), device).items():
                found += _rows(op, name, step, eager, device)
                stage.advance(note=f"{op} {name}")
    return found


Step = Callable[[], Any]


def _steps(model: torch.nn.Module, device: str) -> dict[str, tuple[Step, Step]]:
    """The steps and their eager forms, as functions without arguments; parameters stay as they are, so that every
    call does the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(device)
    model.train()
    model(images)  # running statistics that belong to some data
    module = capture(model, images[:2]).to(memory_format=torch.channels_last)
    qconfig = QConfig(4, 4)
    student = prepare(module, qconfig)
    with torch.no_grad(), calibrating(student):
        student(images)
    parameters = list(student.parameters())
    teacher = Teacher(module)
    objective = synq.IMAGES["smoke"].inception(teacher, None)

    def tuning(fused: bool) -> Step:
        distiller = Distiller(module, student, synq.TUNING["smoke"].distill, fused=fused)
        return lambda: torch.autograd.grad(sum_terms(distiller(images, labels)), parameters)

    def generation(observe: Callable[[Tensor, Tensor], Context]) -> Step:
        def step() -> Any:
            x = images.detach().requires_grad_(True)
            return torch.autograd.grad(sum_terms(objective(observe(x, labels))), x)

        return step

    return {
        "synq_tuning_step": (tuning(True), tuning(False)),
        "synq_generation_step": (generation(teacher.observe), generation(_hooked(module, teacher))),
        "dgh_generation_step": dgh_step.steps(model, module, BATCH, device),
    }


def _hooked(module: fx.GraphModule, teacher: Teacher) -> Callable[[Tensor, Tensor], Context]:
    """What hooks on the batch norms see: their inputs, whose statistics torch takes one reduction at a time."""
    norms = batch_norms(module)
    tapped = with_taps(module, [norm.input for norm in norms])

    def observe(images: Tensor, labels: Tensor) -> Context:
        logits, inputs = tapped(images)
        means = [u.mean((0, 2, 3)) for u in inputs]
        variances = [u.var((0, 2, 3), correction=0) for u in inputs]
        return Context(images, labels, logits, Statistics.of(means, variances))

    return observe


def _rows(op: str, net: str, step: Step, eager: Step, device: str) -> list[dict[str, Any]]:
    expected = timing.Forced("reference", step)()
    # What rounds is alike on every backend, and min-max ranges are; sums, of the losses too, differ in their last bits,
    # and a pixel whose gradient is almost zero may then be moved the other way (5e-6 was seen). On CUDA some of
    # PyTorch's own backwards add in any order.
    tolerance = 1e-3 if device == "cuda" or op == "synq_tuning_step" else 1e-5
    contenders = {}
    for name in backend.NAMES:
        interpreted = name == "triton" and device == "cpu"
        if interpreted or backend.reason_against(name, "fake_quant", device, torch.float32):
            continue
        contenders[name] = timing.Forced(name, step)
        for got, want in zip(contenders[name](), expected, strict=True):
            timing.assert_equal(f"{op} on {name}", got, want, tolerance)
    times = timing.compare({**contenders, "eager": timing.Forced("reference", eager)}, [()], device, seconds=20)
    flops, peak_eager = count_flops(step), timing.peak_mb(timing.Forced("reference", eager), device)
    case = f"{net} B={BATCH}" + ("" if op.startswith("dgh") else " W4A4")
    found = []
    for name in contenders:
        row = timing.row(
            op=op, case=case, dtype=torch.float32, device=device, backend=name, pass_="step",
            timing=times[name], bytes_=0, flops=flops, flops_per_second=timing.matmul_rate(device),
            peers={name: times[name] for name in ("reference", "eager")},
            peak=timing.peak_mb(contenders[name], device),
        )  # fmt: skip
        row["peak_mb_eager"] = peak_eager
        row["outside_convolutions"] = outside_convolutions(contenders[name], device)
        found.append(row)
    return found


def count_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of a step's convolutions and matrix products, forward and backward."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    # its tracker books operations under modules by hooks that autograd.grad does not allow; the total needs none
    counter.mod_tracker = _OneModule()  # type: ignore[assignment]
    with counter:
        step()
    return counter.get_total_flops()


def _convolution_backward_flops(
    grad_shape: Any, x_shape: Any, weight_shape: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: tuple[bool, bool, bool], **shapes: Any,
) -> int:  # fmt: skip
    """As many as the forward for each of the two gradients; torch's own count forgets the groups."""
    positions = x_shape if transposed else grad_shape
    return 2 * math.prod(positions) * math.prod(weight_shape[1:]) * (wanted[0] + wanted[1])


class _OneModule:
    """Stands in for torch's ModuleTracker: everything belongs to the whole."""

    parents = frozenset({"Global"})
    is_bw = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def outside_convolutions(step: Callable[[], Any], device: str) -> float:
    """The share of a step's own time that is not in convolutions and matrix products, 0 to 1."""
    profiler = timing.profiled(step, device)
    total = matrix = 0.0
    for event in profiler.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        total += own
        if any(word in event.key.lower() for word in MATRIX_OPS):
            matrix += own
    return 1 - matrix / total
