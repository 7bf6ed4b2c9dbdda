"""The detection table: the embedded detector, quantized with DGH's images beside noise and real scenes.

    python -m zsq_ext.bench.detection --out benchmarks/accuracy/detection.json

Every row is one quantization, by the same reconstruction, evaluated on the same test scenes as the float network. The
three kinds of images of a seed are made once and serve all bit-widths.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zsq_ext import api
from zsq_ext.bench.accuracy import Table, place
from zsq_ext.bench.intervals import paired_interval
from zsq_ext.core.progress import QUIET, Progress
from zsq_ext.methods import controls, dgh
from zsq_ext.methods.images import GaussianImages
from zsq_ext.methods.job import Images, hold_out
from zsq_ext.methods.recipe import Recipe
from zsq_ext.zoo.average_precision import precision_of
from zsq_ext.zoo.shape_scenes import SPEC, TEST_IMAGES, Objects, ShapeScenes
from zsq_ext.zoo.teachers import detector

MODEL = "fpn_small"
VARIANTS = ("DGH", "noise", "real scenes")
BITS = ((8, 8), (4, 8))


class TestScenes:
    """The first scenes of the test split, drawn once."""

    def __init__(self, count: int = TEST_IMAGES) -> None:
        self.count = count
        self._images, self._truth = ShapeScenes("test").images(range(count))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """``{"AP50": percent, "AP": percent}`` of a network that returns the detector's heads."""
        device = next(model.parameters()).device
        images = (part.to(device, memory_format=torch.channels_last) for part in self._images.split(250))
        truth = (Objects(*part) for part in zip(*(part.split(250) for part in self._truth), strict=True))
        return precision_of(model, zip(images, truth, strict=True))


def run_table(
    table: Table, seeds: tuple[int, ...], test: TestScenes, *, recipe: Recipe | None = None, progress: Progress = QUIET
) -> None:
    """Fills a table with every (seed, variant, bits) that it lacks.

    Args:
        table: where rows go as they are finished.
        seeds: the outermost loop, so that a stopped table is still paired.
        test: what every network is evaluated on; it chooses nothing.
        recipe: another than the preset ``smoke``, for quick tables.
        progress: where to report.
    """
    model = place(detector(MODEL))
    recipe = recipe or dgh.config("smoke", "repo")
    floating = test(model)
    for seed in seeds:
        for variant in VARIANTS:
            made: Images | None = None
            for w_bits, a_bits in BITS:
                keys = {
                    "task": "shape_scenes", "model": MODEL, "method": "dgh", "variant": variant,
                    "w_bits": w_bits, "a_bits": a_bits, "seed": seed,
                }  # fmt: skip
                if table.find(**keys) is not None:
                    continue
                progress.say(f"{MODEL} seed {seed} {variant} W{w_bits}A{a_bits}")
                begin = time.perf_counter()
                made = made or _images(variant, model, recipe, seed, progress)
                result = api.quantize(
                    model, "dgh", w_bits=w_bits, a_bits=a_bits, input_spec=SPEC, config=recipe, images=made, seed=seed,
                    progress=QUIET,
                )  # fmt: skip
                seconds = round(time.perf_counter() - begin, 1)
                table.add({**keys, "float": floating, **test(result.model), "seconds": seconds})


def _images(variant: str, model: nn.Module, recipe: Recipe, seed: int, progress: Progress) -> Images:
    own = recipe.images
    if variant == "real scenes":
        count = own.images + own.held_out
        scenes, _ = ShapeScenes("train").images(range(seed * count, (seed + 1) * count))  # disjoint per seed
        return hold_out(scenes, None, own.held_out)
    source = own if variant == "DGH" else GaussianImages(own.images, own.held_out)
    ranges = Recipe(source, controls.ranges_alone("smoke"))
    return api.synthesize(model, "dgh", input_spec=SPEC, config=ranges, seed=seed, progress=progress)


def summary(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown: means over seeds, and DGH's paired differences to the others."""
    head = ["bits", "images", "seeds", "AP50", "AP", "AP, DGH less this"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    if rows:
        lines.append(f"| float | | | {rows[0]['float']['AP50']:.2f} | {rows[0]['float']['AP']:.2f} | |")
    for w_bits, a_bits in BITS:
        own = {
            variant: {
                row["seed"]: row
                for row in rows
                if (row["variant"], row["w_bits"], row["a_bits"]) == (variant, w_bits, a_bits)
            }
            for variant in VARIANTS
        }
        for variant, by_seed in own.items():
            if not by_seed:
                continue
            mean = {key: statistics.fmean(row[key] for row in by_seed.values()) for key in ("AP50", "AP")}
            both = sorted(own["DGH"].keys() & by_seed.keys())
            gap = ""
            if variant != "DGH" and len(both) > 1:
                gap = str(paired_interval(*([own[name][s]["AP"] for s in both] for name in ("DGH", variant))))
            cells = [f"W{w_bits}A{a_bits}", variant, str(len(by_seed)), f"{mean['AP50']:.2f}", f"{mean['AP']:.2f}", gap]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows that it holds are not run again")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=TEST_IMAGES, help="test scenes")
    args = parser.parse_args()
    table = Table(args.out, "python -m zsq_ext.bench.detection " + " ".join(sys.argv[1:]))
    run_table(table, tuple(args.seeds), TestScenes(args.images), progress=Progress())
    sys.stdout.write(summary(table.rows))


if __name__ == "__main__":
    main()
