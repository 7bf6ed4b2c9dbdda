"""The command `zsq`. Each command imports what it needs when it runs, so that `zsq --help` is quick."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="zsq",
    help="Quantize a trained vision network without its training data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


def _table(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width, and nobody wants its lines cut at 80.
    console = Console()
    Console(width=console.width if console.is_terminal else 200).print(table)


@app.command()
def ops() -> None:
    """Shows every op and which backend runs it here, and why a backend is missing."""
    import torch

    import zsq_ext.ops  # noqa: F401  # defines the ops
    from zsq_ext.ops import backend

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def cell(name: str, op: str) -> str:
        place = "cpu" if name == "cpu" else device
        return "yes" if backend.reason_against(name, op, place, torch.float32) is None else "-"

    _table(["op", *backend.NAMES], [[op, *(cell(name, op) for name in backend.NAMES)] for op in backend.OPS])
    for name, reason in backend.backends().items():
        if reason is not None:
            typer.echo(f"{name}: {reason}")


@app.command()
def env() -> None:
    """Shows the versions and devices that results depend on, as JSON."""
    import json

    from zsq_ext.bench.timing import environment

    typer.echo(json.dumps(environment(), indent=1))


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="Which suite to run.")] = "families",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measures the ops, or the methods' steps, beside their peers on this machine."""
    from zsq_ext import bench as benches
    from zsq_ext.core.progress import Progress

    if suite not in benches.SUITES:
        raise typer.BadParameter(f"must be one of {', '.join(benches.SUITES)}, got {suite!r}", param_hint="--suite")
    result = benches.run(suite, Progress(quiet=quiet))
    header, *rows = benches.lines(result)
    _table(header, rows)
    if json is not None:
        benches.save(result, json)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
