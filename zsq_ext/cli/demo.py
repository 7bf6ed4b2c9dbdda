"""The command demo: a whole data-free quantization beside its controls, on what ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zsq_ext.cli.common import Json, Quiet, check_writable, on_stop, table, to_stdout, write_json


def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Where the report and the quantized networks go.")] = Path("runs/demo"),
    test_images: Annotated[int, typer.Option(help="Measure on the first so many of 10,000 test images.")] = 5_000,
    seed: Annotated[int, typer.Option(help="Of every random stream.")] = 0,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantizes the embedded ResNet-20 without its data, beside its controls, in a few minutes."""
    from zsq_ext.bench import demo as engine
    from zsq_ext.core.progress import Progress

    check_writable("--json", json)
    on_stop(ctx, lambda: "stopped; the demo begins anew next time")
    shown = engine.demo(Progress(quiet=quiet), out, test_images=test_images, seed=seed)
    write_json(json, shown.to_dict())
    if to_stdout(json):
        return
    header, *rows = shown.lines()
    table(header, rows, numeric=True)
    typer.echo(f"top-1 (%) after the last epoch on {shown.test_images} test images, seed {seed}")
    typer.echo(", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in shown.seconds.items()))
    typer.echo(str(shown.report))
