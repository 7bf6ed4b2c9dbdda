"""The demo: SynQ beside its controls on an embedded teacher, in minutes and with nothing downloaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zsq_ext import api
from zsq_ext.bench.accuracy import place
from zsq_ext.bench.tasks import TestSet
from zsq_ext.core import machine
from zsq_ext.core.progress import Progress
from zsq_ext.core.steps import Diverged
from zsq_ext.report import Accuracy, write_report
from zsq_ext.zoo.teachers import facts, teacher
from zsq_ext.zoo.textured_shapes import SPEC, TEST_IMAGES

MODEL = "resnet20"
BITS = ((4, 4), (3, 3))
METHODS = {"min-max": "minmax", "noise": "noise", "SynQ": "synq"}
BATCH = 250
"""Test images per forward: activations of larger batches leave the cache."""


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        rows: the teacher first, then every method at every bit-width, top-1 of the last epoch.
        seconds: wall time by stage.
        test_images: how many images were tested.
        seed: of the run.
        report: the report's path.
    """

    rows: list[Accuracy]
    seconds: dict[str, float]
    test_images: int
    seed: int
    report: Path

    def lines(self) -> list[list[str]]:
        """The one table, header first: a row per method, a column per bit-width."""
        bits = list(dict.fromkeys(row.bits for row in self.rows if row.bits != "float"))
        table = [["", *bits, "seconds"]]
        for method in dict.fromkeys(row.method for row in self.rows):
            own = {row.bits: row for row in self.rows if row.method == method}
            if "float" in own:
                table.append([f"{method} (float)", *[own["float"].shown] * len(bits), ""])
            else:
                took = sum(row.seconds or 0 for row in own.values())
                table.append([method, *(own[b].shown for b in bits), f"{took:.0f}"])
        return table

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "rows": [asdict(row) for row in self.rows],
            "seconds": self.seconds,
            "test_images": self.test_images,
            "seed": self.seed,
            "machine": machine.describe(),
            "report": str(self.report),
        }


def demo(
    progress: Progress, out: str | Path, *, test_images: int = TEST_IMAGES, seed: int = 0, preset: str = "smoke"
) -> Demo:
    """Quantizes the embedded ResNet-20 by SynQ and by two controls, and tests all of them.

    Min-max and SynQ share one set of synthetic images at both bit-widths; the control ``noise`` is tuned on Gaussian
    noise. Each network is tested once, after its last epoch, so the test data can have chosen nothing.

    Args:
        progress: where to report.
        out: a folder for ``report.html`` and SynQ's networks; what it holds of an earlier demo is overwritten.
        test_images: how many of the 10,000 test images to measure on.
        seed: of every random stream.
        preset: size of the runs.

    Raises:
        FileNotFoundError: the teacher's weights are not installed.
        ValueError: ``test_images`` is out of its range.
        Diverged: SynQ's own tuning did; a control that does is shown as such.
    """
    if not 1 <= test_images <= TEST_IMAGES:
        raise ValueError(f"demo: test_images must be from 1 to {TEST_IMAGES}, got {test_images}")
    network = place(teacher(MODEL))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    test = TestSet(test_images, batch=BATCH, on_draw=lambda: progress.say(f"drawing {test_images} test images"))
    with clock("testing"):
        rows = [Accuracy("teacher", "float", _top1(network, test, "testing the teacher", progress))]
    with clock("making images"):
        made = api.synthesize(network, "synq", input_spec=SPEC, preset=preset, seed=seed, progress=progress)
    shown = {}
    for w_bits, a_bits in BITS:
        for title, method in METHODS.items():
            bits = f"W{w_bits}A{a_bits}"
            progress.say(f"{title} {bits}")
            images = None if method == "noise" else made
            try:
                with clock("quantizing"):
                    result = api.quantize(
                        network,
                        method,
                        w_bits=w_bits,
                        a_bits=a_bits,
                        input_spec=SPEC,
                        preset=preset,
                        images=images,
                        seed=seed,
                        progress=progress,
                    )
            except Diverged as error:
                if method == "synq":
                    raise
                progress.say(str(error))  # a control that fails is a finding, not the end of the demo
                rows.append(Accuracy(title, bits, None))
                continue
            with clock("testing"):
                top1 = _top1(result.model, test, f"testing {title} {bits}", progress)
            rows.append(Accuracy(title, bits, top1, seconds=result.seconds))
            if method == "synq":
                result.save(folder / f"{MODEL}-synq-{bits.lower()}.safetensors")
                shown[f"{title} {bits}"] = result
    measured_on = f"the first {test_images} test images of the embedded task, textured shapes"
    with clock("writing the report"):
        path = write_report(
            folder,
            title="ResNet-20 at 4 and 3 bits, without its data",
            results=shown,
            accuracy=rows,
            measured_on=measured_on,
            notes={
                "network": MODEL,
                "making the shared images": f"{clock.spent['making images']:.0f} s",
                **{f"teacher's {name}": value for name, value in facts(MODEL).items()},
            },
        )
    return Demo(rows, {name: round(spent, 1) for name, spent in clock.spent.items()}, test_images, seed, path)


class _Clock:
    """Adds up wall time by stage."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spent[stage] = self.spent.get(stage, 0.0) + time.perf_counter() - begin


def _top1(network: nn.Module, test: TestSet, title: str, progress: Progress) -> float:
    def watched() -> Iterator[tuple[Tensor, Tensor]]:
        with progress.stage(title, test.count) as stage:
            for images, labels in test():
                yield images, labels
                stage.advance(len(labels))

    return api.evaluate(network, watched())
