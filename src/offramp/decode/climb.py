"""A climb: the newest tokens of a sequence on their way through the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.decode.request import Request
from offramp.decode.sequence import NO_WORK, Sequence, Work
from offramp.model.runtime import BlockInput, Step


@dataclass(eq=False)
class Climb:
    """The newest tokens of a request's sequence on their way to the top.

    h (1, n, D): hidden states of the tokens up to position `end`, after the blocks before `segment`; None before they are
    embedded. `middle`: at the top, their states after the block that read-outs read. `may_leave`: whether exits are asked.
    `counted`: whether work is counted; the work for a prompt is not. `tops`: the most probable token at each exit so far,
    for the confidence `patience`.
    """

    request: Request
    end: int
    may_leave: bool
    counted: bool = True
    h: Tensor | None = None
    middle: Tensor | None = None
    step: Step | None = None
    segment: int = 0
    work: Work = NO_WORK
    tops: list[int] = field(default_factory=list)

    @property
    def sequence(self) -> Sequence:
        """The request's sequence."""
        return self.request.sequence

    @property
    def hidden(self) -> Tensor:
        """`h`, after the embedding."""
        assert self.h is not None
        return self.h

    def deep(self, row: int) -> Tensor:
        """At the top, the states of one token that read-outs will read together with the next one: (1, 1, …)."""
        top = self.hidden[:, row][:, None]
        return top if self.middle is None else torch.cat([top, self.middle[:, row][:, None].to(top.dtype)], dim=-1)

    @property
    def part(self) -> BlockInput:
        """The arguments that the backbone needs to run the tokens."""
        assert self.step is not None
        return self.hidden, self.sequence.state, self.step

    def make_room(self, start: int, stop: int, first_tail: int) -> None:
        """Prepare the memories of blocks `start` to `stop` - 1 for the tokens. The longest tail begins at `first_tail`."""
        sequence = self.sequence
        if sequence.watched and stop > first_tail:
            # The exact states replace those that tokens put into the tails' blocks when they left early.
            sequence.state.crop(self.end - self.hidden.shape[1], max(start, first_tail), stop)

    def spend(self, flops: int) -> None:
        """Count FLOPs that were not spent in blocks."""
        if flops and self.counted:
            self.work = self.work.plus(Work(flops))
