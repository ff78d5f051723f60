"""The answers to one request while they are on their way to the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from offramp.decode.request import Token
from offramp.decode.sampling import Choose
from offramp.serve.scheduler import Job


@dataclass(eq=False)
class Choice:
    """One answer on its way: its job, and the tokens that have arrived."""

    shows_ids: bool
    used: dict[str, Any] | None  # what a calibration's guarantee depends on; None where there can be none
    job: Job
    logprobs: Recorder | None
    tokens: list[Token] = field(default_factory=list)
    first: float = 0.0  # when the first token came
    last: float = 0.0  # when the newest came

    def take(self, token: Token) -> int:
        """Take in a token that has come. Returns its place."""
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.tokens.append(token)
        return len(self.tokens) - 1

    def note(self, token: Token) -> dict[str, Any]:
        """What the exits did for a token."""
        return {
            "block": token.exit_block, "confidence": token.confidence, "drafted": token.drafted, "source": token.source,
        }  # fmt: skip

    @property
    def reason(self) -> str:
        """Why the answer ended, in OpenAI's words."""
        return "length" if self.job.outcome == "length" else "stop"


Arrived = tuple[int, Token | Exception | None]  # of which answer, and what: a token, what ended it too early, or its end


class Choices(list[Choice]):
    """The answers to a request, on their way. `arrived` is where they come in."""

    def __init__(self, choices: Iterable[Choice], arrived: asyncio.Queue[Arrived]) -> None:
        super().__init__(choices)
        self._arrived, self._open = arrived, len(self)
        self._error: Exception | None = None

    async def more(self) -> list[tuple[int, int | None]]:
        """Wait for tokens, and return all that have come: each one's answer and place there, or None at the answer's end.

        Returns nothing after the end of all answers. Raises the error that ended an answer too early.
        """
        found: list[tuple[int, int | None]] = []
        while self._open and not self._error and (not found or not self._arrived.empty()):
            index, what = await self._arrived.get()
            if isinstance(what, Exception):
                self._error = what
                break
            self._open -= what is None
            found.append((index, None if what is None else self[index].take(what)))
        if self._error and not found:
            raise self._error
        return found


class Recorder:
    """A `Choose` that records log probabilities at each position: of the `most` likeliest tokens, and of the chosen one."""

    def __init__(self, choose: Choose, most: int) -> None:
        self._choose, self._most = choose, most
        self.reads_all = getattr(choose, "reads_all", False)
        self.found: dict[int, tuple[int, float, list[tuple[int, float]]]] = {}

    def __call__(self, logits: Tensor, ids: list[int]) -> int:
        id = self._choose(logits, ids)
        nats = logits.float().log_softmax(-1)
        best = nats.topk(max(1, self._most))
        alternatives = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))[: self._most]
        self.found[len(ids)] = id, float(nats[id]), alternatives
        return id
