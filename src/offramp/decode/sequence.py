"""The memory of one sequence between decoding steps."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from offramp.exits.exits import Exit
from offramp.exits.parts import ExitPart, Memory
from offramp.model.compiled.session import Session
from offramp.model.runtime import AnyState

ID_BYTES = 64  # bytes of a Python integer that stands in two lists
TokenIds = TypeVar("TokenIds", list[int], tuple[int, ...])


class Follower:
    """A gate or a read-out that follows one sequence.

    `see` takes every token's hidden state at its exit, once and in order; a recurrent part runs at once. `read` gives the
    output for the newest token. Raises `TypeError` for a part that returns a memory and does not declare `recurrent`: its
    memory would be lost.
    """

    def __init__(self, part: ExitPart, run: ExitPart | None = None) -> None:
        """`run`: the same part as it is to be run, such as one with compiled products; by default `part` itself."""
        self._part = run or part
        self.flops_per_token = part.flops()
        self._memory: Memory = None
        self._newest: Tensor | None = None  # the newest token's hidden state, or the output for it if the part is recurrent

    def see(self, h: Tensor) -> int:
        """Take the hidden states h (1, T, …) of T more tokens that reached the exit. Returns the FLOPs spent."""
        if not self._part.recurrent:
            self._newest = h[:, -1:]
            return 0
        out, self._memory = self._part(h.float(), self._memory)
        self._newest = out[:, -1:]
        return h.shape[1] * self.flops_per_token

    def read(self) -> tuple[Tensor, int]:
        """The output for the newest token, (1, 1, …), and the FLOPs spent now."""
        assert self._newest is not None, "no token has reached this exit"
        if self._part.recurrent:
            return self._newest, 0
        out, memory = self._part(self._newest.float(), None)
        if memory is not None:
            raise TypeError(f"{type(self._part).__name__} returns a memory: its class must say `recurrent = True`")
        return out, self.flops_per_token

    def fork(self) -> Follower:
        """A copy of this follower, which has seen the same tokens and shares the weights."""
        twin = copy.copy(self)
        if self._memory is not None:
            window, state = self._memory
            twin._memory = window.clone(), state.clone()
        return twin

    @property
    def bytes(self) -> int:
        """The bytes of its memory."""
        return sum(part.nbytes for part in self._memory or ())


@dataclass
class OpenExit:
    """An open exit with its memory of one sequence.

    `index`: its place in the policy. `gated`: whether its gate decides. `pending`: hidden states (1, n, D) of tokens that
    left here and whose deeper blocks are still to be run, oldest first.
    """

    exit: Exit
    index: int
    gate: Follower
    readout: Follower
    gated: bool = True
    pending: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls, exit: Exit, index: int, run: Mapping[ExitPart, ExitPart] = MappingProxyType({}), gated: bool = True
    ) -> OpenExit:
        """An exit for a new sequence; `index` is its place in the policy, `run` are its parts as they are to be run."""
        gate, readout = (Follower(part, run.get(part)) for part in (exit.gate, exit.adapter))
        return cls(exit, index, gate, readout, gated)

    @property
    def block(self) -> int:
        """The number of blocks run before the exit."""
        return self.exit.block

    @property
    def tail(self) -> int:
        """How many of the model's last blocks run after the adapter."""
        return self.exit.tail

    @property
    def followers(self) -> tuple[Follower, Follower]:
        """The gate and the read-out."""
        return self.gate, self.readout

    def see(self, h: Tensor, deep: Tensor | None) -> int:
        """Take h (1, n, D) of tokens at the exit, and `deep` (1, 1, …), the deep states of the token before the newest.

        Returns the FLOPs spent.
        """
        asked = self.gate.see(h) if self.gated else 0
        reads = self.exit.adapter.reads
        if not reads:
            return asked + self.readout.see(h)
        newest, size = h[:, -1:], reads * h.shape[-1]
        known = newest.new_zeros(1, 1, size) if deep is None else deep[..., :size].to(newest.dtype)
        return asked + self.readout.see(torch.cat([newest, known], dim=-1))

    def fork(self) -> OpenExit:
        """The same exit for a second sequence with the same tokens."""
        gate, readout = (follower.fork() for follower in self.followers)
        return OpenExit(self.exit, self.index, gate, readout, self.gated, [*self.pending])


class Work(NamedTuple):
    """FLOPs, and blocks run for one token each: a chunk of three tokens through four blocks is twelve."""

    flops: int = 0
    blocks: int = 0

    def plus(self, *others: Work) -> Work:
        """The sum."""
        return Work(*map(sum, zip(self, *others, strict=True)))


NO_WORK = Work()


# What a token came from: full depth, an exit, the text (prompt look-up), or the table of n-grams; in the C library's order.
TokenSource = Literal["full", "exit", "text", "table"]
SOURCES: tuple[TokenSource, ...] = get_args(TokenSource)


@dataclass(frozen=True)
class Decision:
    """A chosen token, the number of blocks before the exit that chose it, its confidence (None at full depth), the work.

    `deep_passes` and `rejected`: the chunks of the sequence that have gone to the top so far, and the drafts that have been
    rejected. `source`: what the token came from.
    """

    id: int
    block: int
    confidence: float | None
    work: Work = NO_WORK
    deep_passes: int = 0
    rejected: int = 0
    source: TokenSource = "full"


@dataclass
class Sequence:
    """The tokens of one text, and the memory of them.

    `ids`: prompt and decided tokens. All but the last have been run through the blocks before the first exit. Tokens
    that are pending at a later exit are older than those at an earlier one.
    `deep` (1, 1, …): the top hidden state of the token before the newest, or its read-out's output if it left early; beside
    it a middle state, if read-outs read one, of the last token that full depth has run. `whole`: no step failed half-way,
    so the blocks' memory is right. `rejected`: the drafts of this answer that full depth rejected.
    """

    ids: list[int]
    state: AnyState
    exits: list[OpenExit]
    prompt: int  # number of ids in the prompt
    deep: Tensor | None = None
    run: int = 0  # number of tokens that have been run through the blocks before the first exit
    deep_passes: int = 0
    rejected: int = 0
    whole: bool = True
    watched: bool = False  # whether blocks keep what they need to forget tokens
    stepper: object = None  # which began it

    def continued_by(self, ids: list[int], open_exits: list[tuple[Exit, int]]) -> bool:
        """Whether the sequence can be used again: these ids begin with all that have been run, at the same open exits."""
        same_exits = [(exit.exit, exit.index) for exit in self.exits] == open_exits
        begins = self.run < len(ids) and self.ids[: self.run] == ids[: self.run]
        return self.whole and begins and same_exits

    def forget_what_differs(self, ids: list[int]) -> None:
        """Forget the tokens from where the text differs from these ids: tokens decided ahead that nobody took, or an edit.

        This is done only if attention alone remembers, since nothing else can forget.
        """
        length = begin_alike([self.ids, ids])
        if self.whole and 0 < length < self.run and not self.exits and self.state.can_forget(length):
            del self.ids[length:]
            self.run = length
            self.state.crop(length)

    @property
    def pending(self) -> int:
        """The number of tokens that wait at exits."""
        return sum(map(self.waits, range(len(self.exits))))

    def waits(self, exit: int) -> int:
        """The number of tokens that wait at an exit."""
        compiled = self.state.waits(exit) if isinstance(self.state, Session) else 0
        return compiled + sum(h.shape[1] for h in self.exits[exit].pending)

    @property
    def followers(self) -> list[Follower]:
        """The gates and read-outs of all open exits."""
        return [follower for exit in self.exits for follower in exit.followers]

    def settle(self) -> None:
        """Make all tokens final. While tokens are pending, the tails' blocks can still forget them."""
        if self.watched and not self.pending:
            self.state.settle()
            self.watched = False

    def watch(self, start: int, stop: int) -> None:
        """From now on, blocks `start` to `stop` - 1 can forget the tokens they take in, until `settle`."""
        self.state.watch(start, stop)
        self.watched = True

    def fork(self) -> Sequence:
        """A second sequence with the same tokens, which goes on independently of this one."""
        exits = [exit.fork() for exit in self.exits]
        state, deep = copy.deepcopy(self.state), None if self.deep is None else self.deep.clone()
        return Sequence(
            [*self.ids],
            state,
            exits,
            self.prompt,
            deep=deep,
            run=self.run,
            watched=self.watched,
            stepper=self.stepper,
        )

    def go_on_from(self, other: Sequence, remaining: int) -> None:
        """Take over another sequence's memory of a text that begins alike; `remaining` more tokens are to come."""
        twin = other.fork()
        self.state, self.exits, self.deep, self.run = twin.state, twin.exits, twin.deep, twin.run
        self.watched = twin.watched
        self.state.reserve(len(self.ids) + remaining)

    @property
    def bytes(self) -> int:
        """The bytes that a fork takes: the memories of blocks and exits, and an estimate for the ids."""
        deep = 0 if self.deep is None else self.deep.nbytes
        exits = sum(follower.bytes for follower in self.followers)
        return self.state.bytes + exits + deep + ID_BYTES * len(self.ids)


def begin_alike(prompts: Collection[TokenIds]) -> int:
    """The number of ids that all prompts begin with, such as a chat template's. At least one id of each is left out."""
    if not prompts:
        return 0
    pairs = zip(min(prompts), max(prompts), strict=False)  # in sorted order, the first and the last differ soonest
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return min(count, min(map(len, prompts)) - 1)
