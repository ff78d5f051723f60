"""A batch measures how fast it reads prompts, and so how much a step may read while answers wait for it."""

from __future__ import annotations

HELD = 0.1  # about how many seconds answers may wait for a step
LEAST = 16  # rows that a step reads at least: most of its time goes into fetching the weights
GUESS = 20e9  # FLOPs a second, a careful guess before anything is measured


class Pace:
    """A moving estimate of the time that steps take. A row is a token of a prompt, or a request that decides."""

    def __init__(self, flops: int) -> None:
        """`flops`: those of a token at full depth."""
        self.row = flops / GUESS  # seconds

    def rows(self, deciding: int) -> int:
        """How many tokens of prompts a step may read beside so many requests that decide."""
        return max(LEAST, int(HELD / self.row) - deciding)

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a step that read. Few rows say little: most of their time went into fetching the weights."""
        if rows >= LEAST:
            self.row = (self.row + seconds / rows) / 2
