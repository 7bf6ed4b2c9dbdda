"""The commands about this machine: ops, env, bench."""

from __future__ import annotations

from typing import Annotated

import typer

from zsq_ext.cli.common import Json, Quiet, table, to_stdout, write_json


def ops(json: Json = None) -> None:
    """Shows every op and which backend runs it here, and why a backend is missing."""
    import torch

    import zsq_ext.ops  # noqa: F401  # defines the ops
    from zsq_ext.ops import backend

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def runs(name: str, op: str) -> bool:
        place = "cpu" if name == "cpu" else device
        return backend.reason_against(name, op, place, torch.float32) is None

    found = {op: {name: runs(name, op) for name in backend.NAMES} for op in backend.OPS}
    missing = {name: reason for name, reason in backend.backends().items() if reason is not None}
    write_json(json, {"ops": found, "missing": missing})
    if to_stdout(json):
        return
    table(["op", *backend.NAMES], [[op, *("yes" if run else "-" for run in row.values())] for op, row in found.items()])
    for name, reason in missing.items():
        typer.echo(f"{name}: {reason}")


def env(json: Json = None) -> None:
    """Shows the versions and devices that results depend on, as JSON."""
    from pathlib import Path

    from zsq_ext.bench.timing import environment

    found = environment()
    write_json(Path("-"), found)
    if not to_stdout(json):
        write_json(json, found)


def bench(
    suite: Annotated[str, typer.Option(help="Which suite to run.")] = "families",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measures the ops, or the methods' steps, beside their peers on this machine."""
    from zsq_ext import bench as benches
    from zsq_ext.core.progress import Progress

    result = benches.run(suite, Progress(quiet=quiet))
    write_json(json, result)
    if not to_stdout(json):
        header, *rows = benches.lines(result)
        table(header, rows)
