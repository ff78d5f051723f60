"""Progress on stderr: a spinner, bars or lines, and what Ctrl-C says about work that can be resumed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from offramp.cli.shown import console, say
from offramp.errors import OfframpError
from offramp.progress import silent

if TYPE_CHECKING:
    from rich.console import Console

    from offramp.progress import Progress


class Interrupted(OfframpError):
    """The user stopped work that can be resumed."""


@contextmanager
def status(message: str) -> Iterator[Progress]:
    """A spinner with a message, while the context is open. Work that reports progress gets bars in its place."""
    with ExitStack() as after, console(stderr=True).status(message) as spinner:
        bars: list[Progress] = []

        def report(stage: str, completed: int, total: int, note: str = "") -> None:
            if not bars:
                spinner.stop()
                bars.append(after.enter_context(progress_bars()))
            bars[0](stage, completed, total, note)

        yield report


@contextmanager
def resumable() -> Iterator[None]:
    """Around work that can be resumed: turns Ctrl-C into `Interrupted`, which says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("Stopped.", "Nothing is lost: the same command goes on from here.") from None


@contextmanager
def progress_bars(transient: bool = False) -> Iterator[Progress]:
    """A bar for each stage of the work in a terminal, else a line when the stage ends. `transient`: nothing stays."""
    errors = console(stderr=True)
    if errors.is_interactive:
        with _bars(errors, transient) as report:
            yield report
    elif transient:
        yield silent
    else:
        with _lines() as report:
            yield report


@contextmanager
def _bars(console: Console, transient: bool) -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", table_column=Column(overflow="fold")),  # it gives way, so that no name is cut
    )
    with Progress(*columns, console=console, transient=transient) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, completed: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note="")
            bars.update(tasks[stage], completed=completed, total=total, note=note)

        yield report


@contextmanager
def _lines() -> Iterator[Progress]:
    """For a log or a pipe: one whole line for each stage, when it ends. Stages follow one another."""
    since, running = time.monotonic(), ("", "")  # the stage that has not ended, and its line so far

    def end() -> None:
        nonlocal since, running
        say(running[1], stream=sys.stderr)
        since, running = time.monotonic(), ("", "")

    def report(stage: str, completed: int, total: int, note: str = "") -> None:
        nonlocal running
        if running[0] not in ("", stage):
            end()
        count = f"{completed:,}" if completed >= total else f"{completed:,} of {total:,}"
        running = stage, f"{stage}: {count} in {time.monotonic() - since:.1f} s{f', {note}' if note else ''}"
        if completed >= total:
            end()

    try:
        yield report
    finally:
        if running[0]:
            end()


@contextmanager
def reading_bar() -> Iterator[Progress]:
    """A bar while a long prompt is read. It comes with the first report, and is gone when everything is read."""
    with ExitStack() as shown:
        bars: list[Progress] = []

        def report(stage: str, completed: int, total: int, note: str = "") -> None:
            if not bars:
                bars.append(shown.enter_context(progress_bars(transient=True)))
            bars[0](stage, completed, total, note)
            if completed == total:
                shown.close()
                bars.clear()

        yield report


def command_line() -> str:
    """The command as the user typed it, for records."""
    return " ".join(["offramp", *sys.argv[1:]])
