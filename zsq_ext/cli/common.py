"""What all commands share: errors as one line, tables, JSON files, options."""

from __future__ import annotations

import json as json_module
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Json = Annotated[
    Path | None, typer.Option("--json", allow_dash=True, help="Also write the result to this file; - prints only that.")
]

_WIDEST = 10_000

_ON_STOP = "zsq.on_stop"


def on_stop(context: typer.Context, words: Callable[[], str]) -> None:
    """What Ctrl-C says from now on, such as how to go on; asked when it happens."""
    context.meta[_ON_STOP] = words


_UsageError: Any = typer.BadParameter.__base__  # click's, which typer keeps to itself


class Commands(TyperGroup):
    """Errors that say what to change end in one line and exit code 2, Ctrl-C in one line and exit code 130."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if not args:  # that shows the help
            return super().make_context(info_name, args, parent, **extra)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except _UsageError as error:
            raise _refusal(error) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            raise _refusal(error) from None
        except KeyboardInterrupt:
            words = ctx.meta.get(_ON_STOP, lambda: "stopped")
            typer.echo(f"zsq: {words()}", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of a pipe left; that is not an error
            raise
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            if ctx.params.get("debug") or not _explains_itself(error):
                raise
            typer.echo(f"zsq: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


def _refusal(error: Any) -> typer.Exit:
    """A wrong option or argument, in one line instead of a box."""
    typer.echo(f"zsq: {' '.join(error.format_message().split())}", err=True)
    return typer.Exit(2)


def _explains_itself(error: Exception) -> bool:
    """Whether the message is meant for the user: anything else is a defect, whose traceback is worth seeing."""
    if isinstance(error, ValueError | TypeError | NotImplementedError | OSError | ImportError):
        return True
    from zsq_ext.core.steps import Diverged  # here, because it loads torch

    return isinstance(error, Diverged)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = False) -> None:
    """Prints a table; with ``numeric`` all columns but the first are set flush right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False)
    for n, name in enumerate(header):
        drawn.add_column(name, justify="right" if numeric and n else "left")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))  # as Text, brackets in a cell are no markup
    # A pipe has no width: its lines are whole, however long, for whoever reads them by line and column.
    console = Console()
    Console(width=console.width if console.is_terminal else _WIDEST).print(drawn)


def check_writable(option: str, path: Path | None) -> None:
    """Refuses a file that cannot be written, before any work is done for it; its folder is made if missing.

    Raises:
        ValueError: it cannot, naming the option.
    """
    if path is None or str(path) == "-":
        return
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        else:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise ValueError(f"{option} must be a file that can be written, got {path}: {error}") from error


def to_stdout(json: Path | None) -> bool:
    """Whether the JSON takes the table's place on standard output."""
    return json is not None and str(json) == "-"


def write_json(json: Path | None, value: Any) -> None:
    """Writes a result where ``--json`` says, if anywhere."""
    if json is None:
        return
    # JSON has no NaN and no infinity: null takes their place
    finite = json_module.loads(json_module.dumps(value), parse_constant=lambda _: None)
    text = json_module.dumps(finite, indent=1) + "\n"
    if to_stdout(json):
        typer.echo(text, nl=False)
    else:
        check_writable("--json", json)
        json.write_text(text)
