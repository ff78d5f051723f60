"""Progress on stderr: a spinner, bars, and what Ctrl-C says about work that can be resumed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from offramp.errors import OfframpError

if TYPE_CHECKING:
    from offramp.progress import Progress


class Interrupted(OfframpError):
    """The user stopped work that can be resumed."""


@contextmanager
def status(message: str) -> Iterator[Progress]:
    """A spinner with a message, while the context is open. Work that reports progress gets bars in its place."""
    from rich.console import Console

    with ExitStack() as after, Console(stderr=True).status(message) as spinner:
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
    """A bar for each stage of the work; `transient` bars are wiped away at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=transient) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, completed: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note="")
            bars.update(tasks[stage], completed=completed, total=total, note=note)

        yield report


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
