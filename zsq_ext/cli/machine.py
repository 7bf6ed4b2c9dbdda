"""The commands about this machine: ops, env, bench."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from zsq_ext.cli.common import Json, Quiet, check_writable, table, to_stdout, write_json


def ops(json: Json = None) -> None:
    """Shows every op and which backend runs it here, and why a backend is missing."""
    import torch

    from zsq_ext.ops import PUBLIC, backend

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def runs(name: str, op: str | None) -> bool:
        if op is None:  # PyTorch's own operators, whichever backend is in force
            return backend.missing(name) is None
        place = "cpu" if name == "cpu" else device
        return backend.reason_against(name, op, place, torch.float32) is None

    found = {op: {name: runs(name, registered) for name in backend.NAMES} for op, registered in PUBLIC.items()}
    missing = {name: reason for name, reason in backend.backends().items() if reason is not None}
    write_json(json, {"ops": found, "missing": missing})
    if to_stdout(json):
        return
    table(["op", *backend.NAMES], [[op, *("yes" if run else "-" for run in row.values())] for op, row in found.items()])
    for name, reason in missing.items():
        typer.echo(f"{name}: {reason}")


def env(json: Json = None) -> None:
    """Shows the versions and devices that results depend on, as JSON."""
    from zsq_ext.bench.timing import environment

    found = environment()
    write_json(Path("-"), found)
    if not to_stdout(json):
        write_json(json, found)


def bench(
    suite: Annotated[
        str, typer.Option(help="families, the ops; steps, one step of each engine; or generator, images and gradients.")
    ] = "families",
    only: Annotated[
        str | None, typer.Option(help="One family of ops, such as heads, or one op; a wrong name lists them.")
    ] = None,
    inductor: Annotated[bool, typer.Option("--inductor", help="Also time torch.compile of the eager peers.")] = False,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="How long each op is timed in each case, peers included; 0.1.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An older --json file: shows what changed beyond the noise of both runs.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw a roofline into this SVG file.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measures the ops, or the engines' steps, beside their peers on this machine."""
    from zsq_ext import bench as benches
    from zsq_ext.bench import compare as comparing
    from zsq_ext.bench import roofline
    from zsq_ext.core.progress import Progress

    if plot is not None and (plot.suffix != ".svg" or plot.is_dir()):
        raise ValueError(f"--plot must name an .svg file, got {plot}")
    check_writable("--json", json)
    check_writable("--plot", plot)
    before = None if compare is None else _result(compare)
    if before is not None:
        comparing.check(before, suite)
    result = benches.run(suite, Progress(quiet=quiet), only=only, inductor=inductor, seconds=seconds)
    compared = None if before is None else comparing.compare(before, result)
    write_json(json, result)
    if plot is not None:
        plot.write_text(roofline.draw(result, "cuda" if result["environment"]["gpu"] else "cpu"))
    if to_stdout(json):
        return
    header, *rows = benches.lines(result) if compared is None else compared.lines()
    table(header, rows)
    typer.echo(benches.legend(result) if compared is None else str(compared))


def _result(path: Path) -> Any:
    """An older result, read before anything is measured."""
    try:
        return json_module.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare must be a file that zsq bench --json wrote, got {path}: {error}") from error
