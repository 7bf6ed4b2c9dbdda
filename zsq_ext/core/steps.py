"""The step runner that every engine shares: guarded, logged, checkpointed, exactly resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zsq_ext.core.progress import Progress
from zsq_ext.core.rng import stream
from zsq_ext.core.run import Run

READ_EVERY = 10
"""Steps between two looks at the device: loss values and not-finite flags come back in one transfer."""

Terms = dict[str, Tensor]
"""Loss terms by name, each a 0-d tensor."""


def sum_terms(terms: Terms) -> Tensor:
    """The loss: the sum of the weighted terms."""
    return torch.stack(list(terms.values())).sum()


@dataclass(frozen=True)
class Stage:
    """One named part of a run: checkpoints, random streams and the progress bar go by its name.

    ``title`` is what the progress bar says, the name by default.
    """

    run: Run
    name: str
    seed: int
    progress: Progress
    title: str = ""

    def stream(self, what: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
        """The random stream of one purpose in this stage; see ``core.rng.stream``."""
        return stream(self.seed, f"{self.name}/{what}", step, device)

    def part(self, index: int, of: int) -> Stage:
        """One of several parts that are run one after the other."""
        title = self.name if of == 1 else f"{self.name} {index + 1}/{of}"
        return replace(self, name=f"{self.name}-{index}", title=title)


class Diverged(RuntimeError):
    """A loss term stopped being a finite number."""


class State:
    """The tensors that a stage changes: what a checkpoint holds.

    Args:
        tensors: live tensors by name; they are written to in place by the stage and by ``load``.
        optimizers: torch optimizers by name; their state belongs to the stage too.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer] | None = None
    ) -> None:
        self._tensors, self._optimizers = dict(tensors), dict(optimizers or {})

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, for a checkpoint."""
        found = {f"state.{name}": tensor for name, tensor in self._tensors.items()}
        for name, optimizer in self._optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    if isinstance(value, Tensor):
                        found[f"optimizer.{name}.{index}.{slot}"] = value
        return found

    @torch.no_grad()
    def not_finite(self) -> str | None:
        """The first tensor that holds NaN or infinity, or None; one transfer from the device."""
        flags = {name: tensor.isfinite().all() for name, tensor in self.tensors().items()}
        if not flags:
            return None
        device = next(iter(flags.values())).device  # an optimizer counts its steps on the host
        fine = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
        return next((name.partition(".")[2] for name, ok in zip(flags, fine, strict=True) if not ok), None)

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Puts a checkpoint back in place.

        Raises:
            ValueError: the checkpoint does not fit, naming the tensor; nothing was changed then.
        """
        for name, tensor in self._tensors.items():
            there = saved.get(f"state.{name}")
            if there is None or there.shape != tensor.shape or there.dtype != tensor.dtype:
                got = None if there is None else f"{there.dtype} {tuple(there.shape)}"
                raise ValueError(f"checkpoint: '{name}' must be {tensor.dtype} {tuple(tensor.shape)}, got {got}")
        for name, tensor in self._tensors.items():
            tensor.copy_(saved[f"state.{name}"])
        for name, optimizer in self._optimizers.items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in saved.items():
                if key.startswith(f"optimizer.{name}."):
                    index, slot = key.removeprefix(f"optimizer.{name}.").split(".")
                    slots.setdefault(int(index), {})[slot] = value
            groups = optimizer.state_dict()["param_groups"]
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict({"state": slots, "param_groups": groups})
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate  # a rate that lives in a tensor of ours must stay that tensor


def run_steps(
    stage: Stage,
    count: int,
    step: Callable[[int], Terms],
    state: State,
    *,
    advice: str,
    after: Callable[[int], dict[str, Any] | None] | None = None,
) -> list[dict[str, Any]]:
    """Runs ``step(0) ... step(count - 1)``, continuing from the stage's checkpoint if the run holds one.

    Every ``READ_EVERY`` steps one transfer brings back the last losses and, per term, the first step at which it was
    not finite. A checkpoint is only written after such a look and a look at the state itself (a finite loss can have a
    gradient that is not), so it never holds a poisoned state. The end of a stage is a checkpoint too: a resumed run
    repeats no finished stage.

    Args:
        stage: where checkpoints go and who reports.
        count: number of steps.
        step: does one step and returns its loss terms; it must depend on the step number and ``state`` alone.
        state: what ``step`` changes.
        advice: what a person should try if the stage diverges.
        after: called behind every step; what it returns, if anything, becomes a row of the history.

    Returns:
        The history: one {"step": n, term: value} per look.

    Raises:
        Diverged: a term or the state was not finite, with the step, its name and the advice.
        ValueError: the checkpoint is damaged or belongs to another run.
    """
    run, name = stage.run, stage.name
    begin: Any = 0
    history: Any = []
    held = run.load(f"checkpoint-{name}")
    if held is not None:
        tensors, info = held
        begin, history = info.get("step"), info.get("history")
        if not isinstance(begin, int) or not 0 <= begin <= count or not isinstance(history, list):
            raise ValueError(f"checkpoint: '{name}' must hold a step, 0 to {count}, and a history, got step {begin!r}")
        state.load(tensors)
    guard = _Guard(name, advice)
    saved_at = -math.inf  # the first look is kept: whoever stops early finds something to go on from
    with stage.progress.stage(stage.title or name, count, begin) as meter:
        for n in range(begin, count):
            guard.watch(n, step(n))
            look = (n + 1) % READ_EVERY == 0 or n + 1 == count
            values = guard.read() if look else None
            if values is not None:
                history.append({"step": n + 1, **values})
            row = after(n) if after is not None else None
            if row is not None:
                history.append({"step": n + 1, **row})
            note = f"loss {sum(values.values()):.4g}" if values else ""
            meter.advance(1, note)
            last = n + 1 == count
            if last or (look and run.folder is not None and time.monotonic() - saved_at >= run.checkpoint_seconds):
                broken = state.not_finite()
                if broken is not None:
                    raise Diverged(
                        f"{name}: '{broken}' is not finite after step {n}, though every loss term was. {advice}"
                    )
                run.save(f"checkpoint-{name}", state.tensors(), {"step": n + 1, "history": history})
                saved_at = time.monotonic()
    return history


def end_stage(stage: Stage) -> None:
    """Removes a stage's checkpoint once its result is safe elsewhere."""
    stage.run.remove(f"checkpoint-{stage.name}")


class _Guard:
    """Remembers on the device which term was not finite first, and when."""

    def __init__(self, stage: str, advice: str) -> None:
        self._stage, self._advice = stage, advice
        self._names: tuple[str, ...] = ()
        self._last: Tensor | None = None
        self._first_bad: Tensor | None = None

    def watch(self, step: int, terms: Terms) -> None:
        names = tuple(terms)
        values = torch.stack([value.detach().float() for value in terms.values()])
        if names != self._names or self._first_bad is None:
            self.read()
            self._names, self._first_bad = names, torch.full_like(values, -1.0)
        self._last = values
        fresh = ~values.isfinite() & (self._first_bad < 0)
        self._first_bad = torch.where(fresh, torch.full_like(values, float(step)), self._first_bad)

    def read(self) -> dict[str, float] | None:
        """The last values by term; the one place where the host waits for the device."""
        if self._last is None or self._first_bad is None:
            return None
        values, first_bad = torch.stack([self._last, self._first_bad]).tolist()
        bad = [(int(step), name) for step, name in zip(first_bad, self._names, strict=True) if step >= 0]
        if bad:
            step, name = min(bad)
            raise Diverged(f"{self._stage}: loss term '{name}' is not finite at step {step}. {self._advice}")
        return dict(zip(self._names, values, strict=True))
