"""The command `zsq`. Each command imports what it needs when it runs, so that `zsq --help` is quick."""

from typing import Annotated

import typer

from zsq_ext import __version__
from zsq_ext.cli import demo, machine, networks
from zsq_ext.cli.common import Commands

app = typer.Typer(
    name="zsq",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zsq_ext {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Quantize a trained vision network without its training data."""


for command in (
    *(demo.demo, networks.quantize, networks.synthesize, networks.evaluate),
    *(machine.bench, machine.ops, machine.env),
):
    app.command()(command)


def main() -> None:
    """The entry point."""
    app()
