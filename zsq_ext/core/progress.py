"""What a person sees while waiting: a bar on a terminal, plain lines in a log, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

LINE_SECONDS = 10.0
"""Without a terminal, one line per stage at most this often."""


class Meter(Protocol):
    """One piece of work that is under way."""

    def advance(self, steps: int = 1, note: str = "") -> None: ...


class Progress:
    """Reports stages of work to standard error.

    Args:
        quiet: report nothing.
        file: where to; standard error by default, so that standard output stays clean for results.
    """

    def __init__(self, quiet: bool = False, file: TextIO | None = None) -> None:
        self.quiet = quiet
        self.file = file or sys.stderr

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Meter]:
        """A stage of ``total`` steps, the first ``done`` of them from an earlier run; advance it inside the block."""
        if self.quiet or total <= 0:
            yield _Silent()
        elif self.file.isatty():
            yield from self._bar(name, total, done)
        else:
            lines = _Lines(name, total, done, self.file)
            yield lines
            lines.finish()

    def say(self, text: str) -> None:
        """One line, unless quiet."""
        if not self.quiet:
            print(text, file=self.file, flush=True)

    def _bar(self, name: str, total: int, done: int) -> Iterator[Meter]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=Console(file=self.file)) as bars:
            yield _Bar(bars, bars.add_task(name, total=total, completed=done, note=""))


QUIET = Progress(quiet=True)


class _Silent:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass


class _Bar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=steps, note=note)


class _Lines:
    def __init__(self, name: str, total: int, done: int, file: TextIO) -> None:
        self._name, self._total, self._file = name, total, file
        self._resumed_at = self._done = done  # what an earlier run did says nothing about this run's pace
        self._note = ""
        self._begin = self._last = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        self._note = note or self._note
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS and self._done < self._total:
            left = (now - self._begin) / (self._done - self._resumed_at) * (self._total - self._done)
            self._print(now, f", about {left:.0f} s left")
            self._last = now

    def finish(self) -> None:
        if self._done:
            self._print(time.monotonic(), "")

    def _print(self, now: float, left: str) -> None:
        note = f", {self._note}" if self._note else ""
        line = f"{self._name}: {self._done}/{self._total} in {now - self._begin:.0f} s{left}{note}"
        print(line, file=self._file, flush=True)
