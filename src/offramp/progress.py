"""How long work reports how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on: the stage, how many of its steps or answers are completed, of how many, and a note."""

    def __call__(self, stage: str, completed: int, total: int, note: str = "") -> None: ...


def silent(stage: str, completed: int, total: int, note: str = "") -> None:
    pass
