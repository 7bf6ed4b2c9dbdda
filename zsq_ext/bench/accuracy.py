"""The accuracy harness: methods and controls on the embedded task, paired by seed, resumable row by row.

    python -m zsq_ext.bench.accuracy --table synq --out benchmarks/accuracy/resnet20.json --model resnet20

Every row is one quantization, evaluated on the same test images as all others. Images depend on (model, seed) and not
on the bits, so the variants of a seed share them: what differs between two rows of a seed is what the variant names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq_ext import api, methods
from zsq_ext.bench.intervals import Interval, paired_interval
from zsq_ext.bench.tables import TABLES, Plan, Variant, for_network
from zsq_ext.bench.timing import environment
from zsq_ext.core.progress import QUIET, Progress
from zsq_ext.core.run import write_atomically
from zsq_ext.methods import controls
from zsq_ext.methods.images import GaussianImages
from zsq_ext.methods.job import Images, hold_out
from zsq_ext.methods.recipe import ImageSource, Recipe
from zsq_ext.zoo.teachers import teacher
from zsq_ext.zoo.textured_shapes import SPEC, TEST_IMAGES, TexturedShapes

TASK = "textured_shapes"
KEYS = ("task", "model", "method", "variant", "w_bits", "a_bits", "seed")


class TestSet:
    """The first images of a split, drawn when they are first asked for and kept as bytes."""

    def __init__(
        self,
        count: int = TEST_IMAGES,
        split: str = "test",
        batch: int = 500,
        on_draw: Callable[[], None] = lambda: None,
    ) -> None:
        self.count, self.split, self.batch, self._on_draw = count, split, batch, on_draw

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        self._on_draw()
        return TexturedShapes(self.split).pixels(range(self.count))

    def __call__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in zip(*(part.split(self.batch) for part in self._drawn), strict=True):
            yield SPEC.normalise(pixels.float().div_(255)), labels


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
        return next((row for row in self.rows if all(row[key] == value for key, value in keys.items())), None)

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
        test: evaluated after every epoch; it chooses nothing.
        preset: size of the runs.
        deadline: ``time.monotonic()`` after which no further row is begun.
        progress: where to report.
        config: applied to every variant's recipe, for quick tables.
    """
    name = plan.model
    model = place(teacher(name))
    top1 = api.evaluate(model, test())

    def recipe_of(variant: Variant) -> Recipe:
        recipe = methods.get(variant.method).config(preset, "repo")
        return config(variant.change(for_network(name, recipe) if preset == "smoke" else recipe))

    # the agreement of all variants is judged on one held-out set: the unchanged images of the last one's method
    judge = recipe_of(replace(plan.variants[-1], change=lambda recipe: recipe)).images
    for seed in seeds:
        sets: dict[ImageSource | str, _Set] = {}
        for variant in plan.variants:
            for w_bits, a_bits in plan.bits:
                keys: dict[str, Any] = {
                    "task": TASK, "model": name, "method": variant.method, "variant": variant.name,
                    "w_bits": w_bits, "a_bits": a_bits, "seed": seed,
                }  # fmt: skip
                settings = recipe_of(variant)
                keys["settings"] = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
                if table.find(**keys) is not None:
                    continue
                if deadline is not None and time.monotonic() > deadline:
                    return
                source = _source(variant, settings)
                for kind in (judge, source):
                    if kind not in sets:
                        sets[kind] = _images(kind, model, judge, seed, progress)
                made = sets[source].judged_on(sets[judge])
                progress.say(f"{name} seed {seed} {variant.name} {_label(w_bits, a_bits)}")
                table.add({**keys, "teacher_top1": top1, **_row(model, keys, settings, made, test)})


def _row(model: nn.Module, keys: dict[str, Any], settings: Recipe, made: _Set, test: TestSet) -> dict[str, Any]:
    begin = time.perf_counter()
    evaluating = [0.0]

    def timed_test() -> Iterator[tuple[Tensor, Tensor]]:
        since = time.perf_counter()
        yield from test()
        evaluating[0] += time.perf_counter() - since

    result = api.quantize(
        model, keys["method"], w_bits=keys["w_bits"], a_bits=keys["a_bits"], input_spec=SPEC, config=settings,
        images=made.images, test=timed_test, seed=keys["seed"], progress=QUIET,
    )  # fmt: skip
    seconds = time.perf_counter() - begin - evaluating[0]
    return {
        "top1_last": result.top1_last,
        "top1_best": result.top1_best,
        "agreement": result.quality.agreement,
        "seconds": round(seconds + made.seconds, 1),  # images included, evaluation not
    }


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


def _images(kind: ImageSource | str, model: nn.Module, judge: ImageSource, seed: int, progress: Progress) -> _Set:
    begin = time.perf_counter()
    if isinstance(kind, str):
        count = judge.images + judge.held_out
        # disjoint training images per seed
        images, labels = TexturedShapes("train").images(range(seed * count, (seed + 1) * count))
        made = hold_out(images, labels, judge.held_out)
    else:
        # the name and the tuning do not matter: a recipe says how images are made
        recipe = Recipe(kind, controls.ranges_alone("smoke"))
        made = api.synthesize(model, "synq", input_spec=SPEC, config=recipe, seed=seed, progress=progress)
    return _Set(made, time.perf_counter() - begin)


def _label(w_bits: int, a_bits: int | None) -> str:
    return f"W{w_bits}" + ("" if a_bits is None else f"A{a_bits}")


def summary(rows: list[dict[str, Any]], against: tuple[str, ...] = ("min-max", "noise")) -> str:
    """The table as Markdown: mean top-1 of the last epoch, best epoch beside it, paired differences to controls.

    Args:
        rows: of one task.
        against: variants to subtract, seed by seed on the same test images.
    """
    lines = []
    for model in _unique(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += [f"### {model}, teacher {own[0]['teacher_top1']:.2f} %", ""]
        head = ["bits", "variant", "seeds", "last", "best", "agreement", *(f"last - {name}" for name in against), "s"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for bits in _unique((row["w_bits"], row["a_bits"]) for row in own):
            group = [row for row in own if (row["w_bits"], row["a_bits"]) == bits]
            for variant in _unique(row["variant"] for row in group):
                lines.append("| " + " | ".join(_cells(group, variant, bits, against)) + " |")
        lines.append("")
    return "\n".join(lines)


def differences(rows: list[dict[str, Any]], first: str, second: str) -> Interval | None:
    """Paired last-epoch differences of two variants over the seeds both have; None with fewer than two."""
    by_seed = [{r["seed"]: r["top1_last"] for r in rows if r["variant"] == name} for name in (first, second)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if first == second or len(seeds) < 2:
        return None
    return paired_interval(*([values[seed] for seed in seeds] for values in by_seed))


def _cells(
    group: list[dict[str, Any]], variant: str, bits: tuple[int, int | None], against: tuple[str, ...]
) -> list[str]:
    own = [row for row in group if row["variant"] == variant]
    mean = {
        key: statistics.fmean(row[key] for row in own) for key in ("top1_last", "top1_best", "agreement", "seconds")
    }
    spread = statistics.stdev(row["top1_last"] for row in own) if len(own) > 1 else 0.0
    compared = [differences(group, variant, other) for other in against]
    return [
        _label(*bits),
        variant,
        str(len(own)),
        f"{mean['top1_last']:.2f} ± {spread:.2f}",
        f"{mean['top1_best']:.2f}",
        f"{mean['agreement']:.1f}",
        *("" if interval is None else str(interval) for interval in compared),
        f"{mean['seconds']:.0f}",
    ]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", choices=TABLES, required=True, help="the method that the table is about")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows that it holds are not run again")
    parser.add_argument("--model", action="append", help="only this network; all of the table by default")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these seeds, to share a table among processes")
    parser.add_argument("--images", type=int, default=TEST_IMAGES, help="test images")
    parser.add_argument("--minutes", type=float, help="begin no further row after this long")
    args = parser.parse_args()
    command = "python -m zsq_ext.bench.accuracy " + " ".join(sys.argv[1:])
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    table, test, progress = Table(args.out, command), TestSet(args.images), Progress()
    plans = [plan for plan in TABLES[args.table] if args.model is None or plan.model in args.model]
    for plan in plans:
        seeds = tuple(seed for seed in range(plan.seeds) if args.seeds is None or seed in args.seeds)
        run_table(table, plan, seeds, test, deadline=deadline, progress=progress)
    sys.stdout.write(summary(table.rows, tuple(plans[0].variants[i].name for i in range(3)) if plans else ()))


if __name__ == "__main__":
    main()
