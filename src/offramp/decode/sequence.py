"""What decoding one sequence carries from step to step, and how it forgets drafts that turn out wrong."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from offramp.exits.exits import Exit
from offramp.exits.parts import Memory
from offramp.model.state import State


class Follower:
    """A gate or an adapter that follows one sequence.

    It is told of every token's hidden state at its exit, once and in order, and run when it is asked for the newest one:
    over all tokens it has not seen, if it has a memory. It can forget the tokens it was told of since `settle`.
    """

    def __init__(self, module: nn.Module, remembers: bool) -> None:
        self._module, self._remembers = module, remembers
        self.length = 0
        self._memory: Memory = None
        self._unseen: list[Tensor] = []
        self._start: tuple[int, Memory] = (0, None)
        self._seen: list[Tensor] = []  # since the start

    def tell(self, h: Tensor) -> None:
        """T more tokens have reached the exit: h (1, T, D)."""
        self.length += h.shape[1]
        self._unseen = [*self._unseen, h] if self._remembers else [h[:, -1:]]

    def read(self) -> tuple[Tensor, int]:
        """The output for the newest token, (1, 1, …), and how many tokens the module was run on."""
        h = torch.cat(self._unseen, dim=1)
        out, self._memory = self._module(h.float(), self._memory)
        if self._remembers:
            self._seen.append(h)
        self._unseen = []
        return out[:, -1:], h.shape[1]

    def catch_up(self) -> None:
        """Run the module on what it has not seen, now rather than in a later `read`."""
        if self._remembers and self._unseen:
            self.read()

    def settle(self) -> None:
        """Keep all tokens so far for good."""
        self._start = self.length - sum(h.shape[1] for h in self._unseen), self._memory
        self._seen = []

    def crop(self, length: int) -> None:
        """Forget every token from the one numbered `length` on."""
        if length >= self.length:
            return
        if self._remembers:
            first, self._memory = self._start
            kept = torch.cat([*self._seen, *self._unseen], dim=1)[:, : length - first]
            self._seen, self._unseen = [], [kept] if kept.shape[1] else []
        else:
            self._unseen = []
        self.length = length


@dataclass(frozen=True)
class Decision:
    """A token that was chosen, after how many blocks, how sure its gate was (None at full depth), and FLOPs spent."""

    id: int
    block: int
    confidence: float | None
    flops: int


@dataclass
class Sequence:
    """`ids`: prompt, decided tokens, drafts; all but the last have been run through the blocks before the first exit.

    `waiting[j]`: hidden states (1, n, D) at exit j of tokens that left there and whose deeper blocks are still to be
    run, oldest first; those of a later exit are older. `drafts`: the newest ids that are not verified yet.
    """

    ids: list[int]
    state: State
    gates: list[Follower]
    adapters: list[Follower]
    waiting: list[list[Tensor]]
    prompt: int  # ids that came with the prompt
    drafts: list[Decision] = field(default_factory=list)
    top: Tensor | None = None  # (1, 1, D): hidden state at the top of the token before the newest, or what stands for it
    run: int = 0  # tokens that have been run through the blocks before the first exit
    deep_passes: int = 0
    rejected: int = 0

    @classmethod
    def new(cls, ids: list[int], state: State, exits: list[Exit]) -> Sequence:
        gates = [Follower(exit.gate, exit.gate.recurrent) for exit in exits]
        adapters = [Follower(exit.adapter, exit.adapter.recurrent) for exit in exits]
        return cls(list(ids), state, gates, adapters, [[] for _ in exits], len(ids))

    @property
    def pending(self) -> int:
        """Tokens that wait at any exit."""
        return sum(h.shape[1] for some in self.waiting for h in some)

    def settle(self) -> None:
        """All tokens are here to stay."""
        self.drafts = []
        self.state.settle()
        for part in (*self.gates, *self.adapters):
            part.settle()

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on; none of those before may be waiting."""
        del self.ids[length:]
        self.run = min(self.run, length)
        self.state.crop(length)
        for part in (*self.gates, *self.adapters):
            part.crop(length)


def looked_up(ids: list[int], size: int, most: int) -> list[int]:
    """What came after the newest earlier place where the last `size` ids stood, at most so many; prompt look-up.

    A. Saxena, "Prompt Lookup Decoding" (2023): drafts that cost nothing, right where a text repeats itself.
    """
    if most < 1 or len(ids) <= size:
        return []
    text, last = array("q", ids).tobytes(), array("q", ids[-size:]).tobytes()
    end = len(text) - 8  # not the last ids themselves
    while (at := text.rfind(last, 0, end)) >= 0:
        if at % 8 == 0:
            after = at // 8 + size
            return ids[after : after + most]
        end = at + len(last) - 1
    return []
