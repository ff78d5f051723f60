"""The function that long work calls to report its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A call names the stage, how many of its steps or answers are completed, how many there are, and a note."""

    def __call__(self, stage: str, completed: int, total: int, note: str = "") -> None: ...


def silent(stage: str, completed: int, total: int, note: str = "") -> None:
    """Report nothing."""
