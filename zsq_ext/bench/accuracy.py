"""The accuracy harness: methods and controls on the embedded tasks, paired by seed, resumable row by row.

    python -m zsq_ext.bench.accuracy --table synq --out benchmarks/accuracy/resnet20.json --model resnet20
    python -m zsq_ext.bench.accuracy --table detection --out benchmarks/accuracy/detection.json

A classifier's rows have its top-1, a detector's its AP at an overlap of 0.5 and over 0.5 to 0.95. Every row is one
quantization, evaluated on the same test images as all others. Images depend on (model, seed) and not on the bits, so
the variants of a seed share them: what differs between two rows of a seed is what the variant names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq_ext import api, methods
from zsq_ext.bench.intervals import Interval, paired_interval
from zsq_ext.bench.tables import TABLES, Plan, Variant, for_network
from zsq_ext.bench.tasks import Task, TestSet
from zsq_ext.bench.timing import environment
from zsq_ext.core.progress import QUIET, Progress
from zsq_ext.core.run import write_atomically
from zsq_ext.methods import controls
from zsq_ext.methods.alternating import Alternating
from zsq_ext.methods.images import GaussianImages
from zsq_ext.methods.job import Images, hold_out
from zsq_ext.methods.recipe import ImageSource, Recipe
from zsq_ext.report.result import title

KEYS = ("task", "model", "method", "variant", "w_bits", "a_bits", "seed")


def place(model: nn.Module) -> nn.Module:
    """The model where it runs fastest: on the GPU if one is visible, channels last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


class Table:
    """Rows in a JSON file, found by their keys, so that an interrupted table goes on where it stopped."""

    def __init__(self, path: Path | None, command: str = "") -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        self.head: dict[str, Any] = {"command": command, "environment": environment()}
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text())["rows"]

    def find(self, **keys: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(key) == value for key, value in keys.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row; one with the same keys, of an older configuration, makes room."""
        self.rows = [old for old in self.rows if any(old[key] != row[key] for key in KEYS)]
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n").encode())


def run_table(
    table: Table,
    plan: Plan,
    seeds: tuple[int, ...],
    test: TestSet,
    *,
    preset: str = "smoke",
    deadline: float | None = None,
    progress: Progress = QUIET,
    config: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> None:
    """Fills a table with every (seed, variant, bits) of a plan that it lacks.

    Args:
        table: where rows go as they are finished.
        plan: the network, the variants and the bits.
        seeds: the outermost loop, so that a stopped table is still paired.
        test: of the network's task; evaluated after every epoch, it chooses nothing.
        preset: size of the runs.
        deadline: ``time.monotonic()`` after which no further row is begun.
        progress: where to report.
        config: applied to every variant's recipe, for quick tables.
    """
    name, task = plan.model, test.task
    task.require()
    model = place(task.network(name))
    teacher = {f"teacher_{figure}": value for figure, value in api.measured(model, test(), task.measure).items()}

    def recipe_of(variant: Variant) -> Recipe:
        method = methods.get(variant.method)
        recipe = method.config(preset, method.profiles[0])
        return config(variant.change(for_network(name, recipe) if preset == "smoke" else recipe))

    # the agreement of all variants is judged on one held-out set: the unchanged images of the last one's method
    judge = recipe_of(replace(plan.variants[-1], change=lambda recipe: recipe)).images
    for seed in seeds:
        sets: dict[ImageSource | str, _Set] = {}
        for variant in plan.variants:
            for w_bits, a_bits in plan.bits:
                keys: dict[str, Any] = {
                    "task": task.name, "model": name, "method": variant.method, "variant": variant.name,
                    "w_bits": w_bits, "a_bits": a_bits, "seed": seed,
                }  # fmt: skip
                settings = recipe_of(variant)
                keys["settings"] = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
                if table.find(**keys) is not None:
                    continue
                if deadline is not None and time.monotonic() > deadline:
                    return
                made = None
                if not isinstance(settings.tune, Alternating):  # which makes its images as it goes
                    source = _source(variant, settings)
                    for kind in (judge, source):
                        if kind not in sets:
                            sets[kind] = _images(kind, task, model, judge, seed, progress)
                    made = sets[source].judged_on(sets[judge])
                progress.say(f"{name} seed {seed} {variant.name} {_label(w_bits, a_bits)}")
                table.add({**keys, **teacher, **_row(model, keys, settings, made, test)})


def _row(model: nn.Module, keys: dict[str, Any], settings: Recipe, made: _Set | None, test: TestSet) -> dict[str, Any]:
    begin = time.perf_counter()
    evaluating = [0.0]

    def timed(network: nn.Module, batches: Iterable[tuple[Tensor, Any]]) -> dict[str, float]:
        since = time.perf_counter()
        found = test.task.measure(network, batches)
        evaluating[0] += time.perf_counter() - since
        return found

    result = api.quantize(
        model, keys["method"], w_bits=keys["w_bits"], a_bits=keys["a_bits"], input_spec=test.task.spec, config=settings,
        images=None if made is None else made.images, test=test, measure=timed, seed=keys["seed"], progress=QUIET,
    )  # fmt: skip
    seconds = time.perf_counter() - begin - evaluating[0]
    agreement = result.quality.agreement
    return {
        **{f"{figure}_last": value for figure, value in result.accuracy.items()},
        **{f"{figure}_best": value for figure, value in result.best_accuracy.items()},
        "agreement": None if isnan(agreement) else agreement,  # None for a detector
        "seconds": round(seconds + (0 if made is None else made.seconds), 1),  # images included, evaluation not
        **_late(result.histories.get("temporal", [])),
    }


def _late(looks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How far a generator moved between two looks, as a mean over the last half of a run (``synth.drift``)."""
    drifts = [row["drift"] for row in looks[len(looks) // 2 :] if "drift" in row]
    return {"late_drift": statistics.fmean(drifts)} if drifts else {}


@dataclass(frozen=True)
class _Set:
    """Images and what they cost."""

    images: Images
    seconds: float

    def judged_on(self, other: _Set) -> _Set:
        """The same images to tune on with another's held-out part, so that agreements can be compared."""
        held_out, labels = other.images.held_out, other.images.held_out_labels
        return replace(self, images=replace(self.images, held_out=held_out, held_out_labels=labels))


def _source(variant: Variant, recipe: Recipe) -> ImageSource | str:
    """Where a variant's images come from: what is the same for two variants is made once."""
    own = recipe.images
    if variant.images == "noise":
        return GaussianImages(own.images, own.held_out)
    return own if variant.images == "own" else variant.images


def _images(
    kind: ImageSource | str, task: Task, model: nn.Module, judge: ImageSource, seed: int, progress: Progress
) -> _Set:
    begin = time.perf_counter()
    if isinstance(kind, str):
        count = judge.images + judge.held_out
        # disjoint training images per seed
        images, truth = task.split("train").images(range(seed * count, (seed + 1) * count))
        made = hold_out(images, truth if isinstance(truth, Tensor) else None, judge.held_out)
    else:
        # the name and the tuning do not matter: a recipe says how images are made
        recipe = Recipe(kind, controls.ranges_alone("smoke"))
        made = api.synthesize(model, "synq", input_spec=task.spec, config=recipe, seed=seed, progress=progress)
    return _Set(made, time.perf_counter() - begin)


def _label(w_bits: int, a_bits: int | None) -> str:
    return f"W{w_bits}" + ("" if a_bits is None else f"A{a_bits}")


def summary(rows: list[dict[str, Any]], against: tuple[str, ...] = ("min-max", "noise")) -> str:
    """The table as Markdown: mean figures of the finished networks, and paired differences to controls.

    Where networks were tuned by epochs, the best epoch stands beside the last one. Differences are those of the last
    figure: of the AP over all overlaps, for a detector.

    Args:
        rows: of any tasks.
        against: variants to subtract, seed by seed on the same test images.
    """
    lines = []
    for model in _unique(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        figures = [key.removesuffix("_last") for key in own[0] if key.endswith("_last")]
        by_epochs = any(f"{figures[0]}_best" in row for row in own)
        teacher = ", ".join(f"{title(name)} {own[0][f'teacher_{name}']:.2f} %" for name in figures)
        lines += [f"### {model}, teacher {teacher}", ""]
        head = ["bits", "variant", "seeds"]
        for name in figures:
            head += [f"{title(name)} last", f"{title(name)} best"] if by_epochs else [title(name)]
        head += ["agreement", *(f"{title(figures[-1])} - {name}" for name in against), "s"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for bits in _unique((row["w_bits"], row["a_bits"]) for row in own):
            group = [row for row in own if (row["w_bits"], row["a_bits"]) == bits]
            for variant in _unique(row["variant"] for row in group):
                cells = [_label(*bits), variant, *_cells(group, variant, figures, by_epochs, against)]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def differences(rows: list[dict[str, Any]], first: str, second: str, figure: str = "top1") -> Interval | None:
    """Paired differences of two variants over the seeds both have; None with fewer than two."""
    by_seed = [{r["seed"]: r[f"{figure}_last"] for r in rows if r["variant"] == name} for name in (first, second)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if first == second or len(seeds) < 2:
        return None
    return paired_interval(*([values[seed] for seed in seeds] for values in by_seed))


def _cells(
    group: list[dict[str, Any]], variant: str, figures: list[str], by_epochs: bool, against: tuple[str, ...]
) -> list[str]:
    own = [row for row in group if row["variant"] == variant]
    cells = [str(len(own))]
    for name in figures:
        last = [row[f"{name}_last"] for row in own]
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        cells.append(f"{statistics.fmean(last):.2f} ± {spread:.2f}")
        if by_epochs:  # what was not tuned has one value
            best = [row.get(f"{name}_best", row[f"{name}_last"]) for row in own]
            cells.append(f"{statistics.fmean(best):.2f}")
    agreements = [row["agreement"] for row in own if row["agreement"] is not None]
    cells.append(f"{statistics.fmean(agreements):.1f}" if agreements else "")
    compared = [differences(group, variant, other, figures[-1]) for other in against]
    cells += ["" if interval is None else str(interval) for interval in compared]
    return [*cells, f"{statistics.fmean(row['seconds'] for row in own):.0f}"]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", choices=TABLES, required=True, help="what the table is about")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows that it holds are not run again")
    parser.add_argument("--model", action="append", help="only this network; all of the table by default")
    parser.add_argument("--preset", choices=methods.PRESETS, default="smoke", help="size of the runs")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these seeds, to share a table among processes")
    parser.add_argument("--images", type=int, help="only so many test images")
    parser.add_argument("--minutes", type=float, help="begin no further row after this long")
    args = parser.parse_args()
    command = "python -m zsq_ext.bench.accuracy " + " ".join(sys.argv[1:])
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    table, progress = Table(args.out, command), Progress()
    plans = [plan for plan in TABLES[args.table] if args.model is None or plan.model in args.model]
    tests = {plan.task: TestSet(args.images, task=plan.task) for plan in plans}
    for plan in plans:
        test = tests[plan.task]
        seeds = tuple(seed for seed in range(plan.seeds) if args.seeds is None or seed in args.seeds)
        run_table(table, plan, seeds, test, preset=args.preset, deadline=deadline, progress=progress)
    sys.stdout.write(summary(table.rows, tuple(plans[0].variants[i].name for i in range(3)) if plans else ()))


if __name__ == "__main__":
    main()
