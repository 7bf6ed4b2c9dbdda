"""Reconstruction: one part of the student after the other learns to yield what the teacher's yields.

    min  mean over images and places of  sum over channels (y_q - y)^2  +  rounding * sum(1 - |2 h - 1|^beta)

over the rounding h of every weight and, where they are learned, the steps of weights and activations. A part reads what
the already quantized ones before it yield. BRECQ, Genie-M and AdaRound are settings of this loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq_ext.core.steps import Stage, State, end_stage
from zsq_ext.quant.fuse import fuse
from zsq_ext.quant.graph import attribute
from zsq_ext.quant.modules import WeightQuantizer, activation_quantizers, calibrating
from zsq_ext.tune.learn import Data, distance, learn
from zsq_ext.tune.reconstruct_config import ReconstructConfig
from zsq_ext.tune.rows import Room, Rows
from zsq_ext.tune.soft import SoftUnit
from zsq_ext.tune.units import Unit, between, quantized, units

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Reconstructed:
    """What reconstruction leaves behind besides the student itself.

    Attributes:
        history: losses of all units' steps, [{"batch": unit, "step": n, "mse": value, "rounding": value}].
        blocks: [{"step": unit, "block": name, "before": error, "after": error}], the unit's squared error on all
            images with every weight on its nearest code, and as it was learned.
    """

    history: History
    blocks: History


def reconstruct(
    stage: Stage, teacher: fx.GraphModule, student: fx.GraphModule, images: Tensor, config: ReconstructConfig
) -> Reconstructed:
    """Tunes a prepared student in place, unit by unit, and finds its activation ranges on the way.

    What comes out is a prepared network like any other: its weights lie on the grids of their quantizers, whose frozen
    ranges hold the learned steps. Batch norms and biases stay the teacher's.

    Args:
        stage: keeps every finished unit and a checkpoint of the one under way.
        teacher: the captured float network.
        student: what ``prepare(teacher, ...)`` gave with frozen weight ranges (``QConfig.w_range="lp"``).
        images: (N, C, H, W) in normalised space, on the student's device; any N >= 1.
        config: the algorithm, its lengths and rates.

    Returns:
        The losses, and every unit's error before and after.

    Raises:
        ValueError: the student's weight ranges follow the live weights, or there are no images.
        Diverged: a loss term was not finite.
        OSError: there is no room for activations beyond ``config.cache_bytes``.

    Source: BRECQ (arXiv 2102.05426), Genie (arXiv 2212.04780), AdaRound (arXiv 2004.10568), QDrop (arXiv 2203.05740).
    """
    if any(isinstance(m, WeightQuantizer) and m.lo is None for m in student.modules()):
        raise ValueError("reconstruct: w_range must be 'lp', a range that stands still, got 'minmax'")
    if len(images) == 0:
        raise ValueError("reconstruct: images must hold at least one image, got none")
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    student.requires_grad_(False)  # the soft weights stand in for them, and nothing else learns
    try:
        return _walk(stage, teacher, student, images, config)
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _walk(
    stage: Stage, teacher: fx.GraphModule, student: fx.GraphModule, images: Tensor, config: ReconstructConfig
) -> Reconstructed:
    plan = units(teacher, config.granularity)
    room = Room(config.cache_bytes, stage.run.folder)
    entry = next(node.name for node in teacher.graph.nodes if node.op == "placeholder")
    exact = {entry: Rows(images, images.device)}
    rounded = dict(exact)  # what each node yields in the student; both as long as a later unit reads it
    done: set[str] = set()
    history: History = []
    blocks: History = []

    def turn(index: int, unit: Unit) -> None:  # a function, so that what only this unit needs is gone with it
        part = replace(stage, name=f"{stage.name}-{index}", title=f"{unit.name} {index + 1}/{len(plan)}")
        task = _Task(part, student, unit, entry, done, config)
        read = [exact[name] for name in unit.inputs]
        target, _ = _stream(fuse(between(teacher, unit.inputs, unit.output)), read, room, config)
        data = Data([rounded[name] for name in unit.inputs], read, target)
        held = stage.run.load(part.name)
        found = task.restore(*held) if held else task.tune(data, learns=index > 0 or config.first_layer)
        values, after = _stream(task.network, data.rounded, room, config, target)
        if held is None:
            stage.run.save(part.name, task.tensors(), found)
            task.end()
        history.extend({"batch": index, **row} for row in found["history"])
        blocks.append({"step": index + 1, "block": unit.name, "before": found["before"], "after": after})
        done.update(task.owned)
        exact[unit.output], rounded[unit.output] = target, values

    for index, unit in enumerate(plan):
        turn(index, unit)
        later = {name for other in plan[index + 1 :] for name in other.inputs}
        for rows in (exact, rounded):
            for name in rows.keys() - later:
                del rows[name]
    return Reconstructed(history, blocks)


class _Task:
    """One unit of the student: its quantizers, and how they are set.

    Attributes:
        network: the unit as it stands in the student, whenever it is run.
        owned: nodes of the quantizers that this unit sets. Others may read them, but find them finished.
    """

    def __init__(
        self, stage: Stage, student: fx.GraphModule, unit: Unit, entry: str, done: set[str], config: ReconstructConfig
    ) -> None:
        self.stage, self.config, self._student = stage, config, student
        self._inputs = [name if name == entry else quantized(student, name) for name in unit.inputs]
        self._output = quantized(student, unit.output)
        whole = between(student, self._inputs, self._output)
        self.network = fuse(whole)
        self.owned = {node.name for node in whole.graph.nodes if node.op == "call_module"} - done
        nodes = [node for node in student.graph.nodes if node.name in self.owned]
        self._quantizers = {node: student.get_submodule(str(node.target)) for node in nodes}
        self._weights = [n for n in nodes if isinstance(self._quantizers[n], WeightQuantizer)]
        self._activations = [n for n in nodes if n not in self._weights]

    def tensors(self) -> dict[str, Tensor]:
        """What tuning changes in the student."""
        found = {str(n.args[0].target): attribute(self._student, str(n.args[0].target)) for n in self._weights}
        for node, quantizer in self._quantizers.items():
            found |= {f"{node.target}.{name}": value for name, value in quantizer.named_buffers()}
        return found

    def restore(self, tensors: dict[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
        """Puts back what ``tensors`` gave when the unit was finished."""
        State(self.tensors()).load({f"state.{name}": value for name, value in tensors.items()})
        return found

    def tune(self, data: Data, learns: bool) -> dict[str, Any]:
        """Finds ranges, learns, and writes the result into the student; its history, and the error before."""
        config = self.config
        self._calibrate(data.rounded)
        _, before = _stream(self.network, data.rounded, None, config, data.target)
        keys = torch.randint(
            2**62, (len(self._activations) + len(self._inputs), 2), generator=self.stage.stream("qdrop")
        )
        keys[:, 1] = 0
        soft = SoftUnit(
            self._student, self._inputs, self._output, self._weights, self._activations, config.qdrop,
            keys.to(data.target.device),
        )  # fmt: skip
        history: History = []
        if learns and config.joint:
            history = learn(self._part("joint"), soft, data, config, config.iterations, rounding=True, steps=True)
        elif learns:
            history = learn(self._part("rounding"), soft, data, config, config.iterations, rounding=True, steps=False)
            more = config.activation_iterations
            later = learn(self._part("steps"), soft, data, config, more, rounding=False, steps=True)
            history += [{**row, "step": row["step"] + config.iterations} for row in later]
        soft.bake()
        return {"history": history, "before": before}

    def end(self) -> None:
        """Removes the checkpoints on the way to what is now kept as a whole."""
        for name in ("joint", "rounding", "steps"):
            end_stage(self._part(name))

    def _part(self, name: str) -> Stage:
        title = f"{self.stage.title}, steps" if name == "steps" else self.stage.title
        return replace(self.stage, name=f"{self.stage.name}-{name}", title=title)

    @torch.no_grad()
    def _calibrate(self, inputs: list[Rows]) -> None:
        """Ranges of the activations on the first images, with float weights: rounding learned well comes near them."""
        own = nn.ModuleList(self._quantizers[node] for node in self._activations)
        for quantizer in activation_quantizers(own):
            quantizer.forget()
        weights = [attribute(self._student, str(node.args[0].target)) for node in self._weights]
        network: nn.Module = fuse(
            between(self._student, [*self._inputs, *(n.name for n in self._weights)], self._output)
        )
        count = min(self.config.range_images, len(inputs[0]))
        with calibrating(own):
            for begin in range(0, count, self.config.chunk):
                part = slice(begin, min(begin + self.config.chunk, count))
                network(*(rows[part] for rows in inputs), *weights)


@torch.no_grad()
def _stream(
    network: fx.GraphModule,
    inputs: list[Rows],
    room: Room | None,
    config: ReconstructConfig,
    target: Rows | None = None,
) -> tuple[Any, float]:
    """What a unit yields for all images, kept where there is room for it, and how far that is from a target."""
    values, errors = None, []
    for part in inputs[0].chunks(config.chunk):
        y = network(*(rows[part] for rows in inputs))
        if room is not None:
            values = room.like(len(inputs[0]), y) if values is None else values
            values[part] = y
        if target is not None:
            errors.append(distance(y, target[part]) * len(y))
    return values, (torch.stack(errors).sum() / len(inputs[0])).item() if errors else 0.0
