"""The rule of drafts: when `verify` makes one, and where it comes from.

A draft comes from an exit, or for nothing from the text, where it repeats itself (prompt look-up: A. Saxena, "Prompt Lookup
Decoding", 2023), and from a table of n-grams. Each draft adds a row to the chunk that full depth decides about. The row
costs something, and so does asking an exit. A draft is made if its chance to stand exceeds its cost. The chances are
estimated from the earlier drafts of the same text. No clock decides, so answers can be repeated.

Costs are in steps of full depth: passes of one row. All requests of a step share one chunk, so the cost of a row depends on
the chunk's width at that moment. Compiled code follows the same rule.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import IntEnum

from offramp.exits.exits import Exit
from offramp.exits.ngrams import Ngrams
from offramp.machine import processor
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import MOST_DRAFTS, kernels

# The costs of 0, 1, … more rows of a chunk, in steps of full depth. They were measured for smollm2 on one maker's
# processors with these kernels, by benchmarks/growth.py --formats FORMAT ("verified rows"), against a step of a compiled
# loop, which is shorter than a single one. On other processors, they are a guess.
ROW_COSTS = {
    ("AMD", "AVX-512 BF16 and VNNI"): {
        "float32": (0.0, 0.04, 0.15, 0.16, 0.17, 0.2, 0.29, 0.39),
        "bfloat16": (0.0, 0.02, 0.06, 0.1, 0.12, 0.16, 0.2, 0.25),
        "int8": (0.0, 0.08, 0.25, 0.4, 0.7, 0.9, 1.15, 1.35),
        "int4": (0.0, 0.07, 0.15, 0.25, 0.4, 0.55, 0.75, 1.0),
    },
    ("AMD", "AVX2"): {
        "float32": (0.0, 0.08, 0.15, 0.22, 0.34, 0.4, 0.47, 0.61),
        "bfloat16": (0.0, 0.11, 0.2, 0.38, 0.64, 0.83, 1.35, 1.65),
        "int8": (0.0, 0.47, 0.92, 1.4, 1.9, 2.5, 3.0, 3.25),
        "int4": (0.0, 0.57, 0.98, 1.59, 2.1, 2.67, 3.3, 3.6),
    },
    ("Intel", "AVX-512 and VNNI"): {
        "float32": (0.0, 0.02, 0.06, 0.22, 0.24, 0.26, 0.42, 0.43),
        "bfloat16": (0.0, 0.1, 0.2, 0.31, 0.42, 0.5, 0.6, 0.7),
        "int8": (0.0, 0.12, 0.27, 0.46, 0.68, 0.89, 1.05, 1.23),
        "int4": (0.0, 0.37, 0.8, 1.1, 1.4, 1.8, 2.1, 2.5),
    },
}
ELSEWHERE = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05)

LOOKED_BACK = 1024  # prompt look-up searches this many of a text's newest tokens
NEWEST, LONGEST_PAUSE = 16, 64  # drafts that a share mostly reflects; the longest pause of an exit, in rounds


def row_costs(precision: str) -> tuple[float, ...]:
    """The costs of 0 to 7 more rows of a chunk on this machine, in steps of full depth, from the table of machines.

    `precision` is that of a backbone.
    """
    for (maker, instructions), costs in ROW_COSTS.items():
        known = costs.get(precision)
        if known and maker in processor() and kernels() == instructions:
            return known
    return ELSEWHERE


class Source(IntEnum):
    """Where a draft comes from."""

    NOTHING, EXIT, TEXT, TABLE = range(4)


@dataclass
class Estimates:
    """Estimates from the drafts of one sequence. Lists have a number for each source.

    `right`: the share of a source's newest drafts that were right; `seen`: the number of these drafts (for NOTHING: the
    number of rounds behind `tokens` and `cost`); `promised`: the mean confidence of the exit's newest drafts, and the mean
    chance of the table's. `tokens` and `cost`: the means of a round. `rest` and `pause`: rounds until an exit whose drafts
    do not pay is asked again, now and next time. The estimates start as if half of a few drafts had been right.
    """

    right: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.5, 0.5])
    seen: list[int] = field(default_factory=lambda: [1, 4, 4, 4])
    promised: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.0, 0.5])
    tokens: float = 1.0
    cost: float = 1.0
    rest: int = 0
    pause: int = NEWEST

    def copy(self) -> Estimates:
        """A copy of the estimates, which learns independently."""
        return replace(self, right=[*self.right], seen=[*self.seen], promised=[*self.promised])

    def _seen(self, source: Source) -> int:
        """Count one more number of a source. Returns the count."""
        self.seen[source] = min(self.seen[source] + 1, NEWEST)
        return self.seen[source]

    def learn_draft(self, guess: Guess, chosen: int) -> None:
        """Learn from a draft, now that full depth has decided its position."""
        source, seen = guess.source, self._seen(guess.source)
        self.right[source] += ((guess.id == chosen) - self.right[source]) / seen
        if source != Source.TEXT:
            self.promised[source] += (guess.promise - self.promised[source]) / seen

    def learn_round(self, tokens: int, cost: float) -> None:
        """Learn from a round: the number of its tokens, and its cost."""
        seen = self._seen(Source.NOTHING)
        self.tokens += (tokens - self.tokens) / seen
        self.cost += (cost - self.cost) / seen


@dataclass(frozen=True)
class Guess:
    """A draft that is tried, or only the source that it is to come from.

    `promise`: the exit's confidence, or the table's chance; `sure`: the chance that the draft is right, by the promise and
    the estimates.
    """

    source: Source
    id: int = -1
    promise: float = 0.0
    sure: float = 0.0


@dataclass(frozen=True)
class DraftRule:
    """The costs and sources of the drafts of one plan.

    `rows`: the cost of 0, 1, … more rows of a chunk; `asking`: that of asking each open exit; `floor`: what a draft's
    chance to stand must exceed, the threshold of the first open exit. If the last `lookup` tokens stand earlier in the
    text, the token that followed them there may be a draft (0: no look-up), and so may what `ngrams` expects. A round has
    at most `most` drafts.
    """

    rows: tuple[float, ...]
    asking: tuple[float, ...] = ()
    floor: float = 0.0
    lookup: int = 0
    ngrams: Ngrams | None = None
    most: int = MOST_DRAFTS

    def pass_cost(self, width: int) -> float:
        """The cost of a pass with so many rows. Beyond the table, each row costs twice as much as the table's last one."""
        costs = self.rows
        beyond = max(0, width - len(costs))
        return 1 + costs[min(width, len(costs)) - 1] + 2 * beyond * (costs[-1] - costs[-2])


def asking_cost(backbone: Backbone, exit: Exit, head: int) -> float:
    """The bytes that are read to ask an exit, as a share of those of a step of full depth.

    Counted are the blocks before the exit, its tail, its read-out and the head. As in compiled code, an entry of the last
    two takes 4 bytes with float32 weights, half a byte with 4-bit ones, else 1.
    """
    runtime = backbone.runtime
    entry = {"float32": 4.0, "int4": 0.5}.get(backbone.precision, 1.0)
    blocks = [*range(exit.block), *range(backbone.n_blocks - exit.tail, backbone.n_blocks)]
    asked = sum(map(runtime.block_bytes, blocks)) + entry * (exit.adapter.flops() + head) / 2
    return asked / (sum(map(runtime.block_bytes, range(backbone.n_blocks))) + runtime.head_bytes())


class Chunk:
    """The rows that all requests of a step run to the top together: one for each request and each draft so far."""

    def __init__(self, rule: DraftRule, requests: int) -> None:
        self.rule, self.width = rule, requests
        self._requests = requests
        self.share = rule.pass_cost(requests) / requests  # cost of a request, without drafts
        self.rate = 1 / self.share  # tokens for each step of full depth, without drafts

    @property
    def row(self) -> float:
        """The cost of another row."""
        return self.rule.pass_cost(self.width + 1) - self.rule.pass_cost(self.width)

    @property
    def cost(self) -> float:
        """The cost of the pass for each request."""
        return self.rule.pass_cost(self.width) / self._requests


class Round:
    """The drafts of one sequence in one step. `chance`: that all of them stand; `guesses`: the drafts and the last try."""

    def __init__(self, chunk: Chunk, estimates: Estimates) -> None:
        self._chunk, self._rule, self._estimates = chunk, chunk.rule, estimates
        self._rate = max(chunk.rate, estimates.tokens / estimates.cost)
        self.chance, self.guesses = 1.0, list[Guess]()
        self._drafts, self._asked = 0, 0.0

    def next(self, ids: list[int]) -> Guess:
        """Where the next draft comes from, after these ids, drafts among them.

        It is the source that is likelier to be right, if its chance is high enough to pay. The exit goes on only from its
        own drafts, whose states it knows. If its drafts do not pay, the exit is asked again after some rounds.
        """
        e, number = self._estimates, len(self.guesses)
        free, right = self._free(ids), e.right[Source.EXIT]
        ask = bool(self._rule.asking) and all(guess.source == Source.EXIT for guess in self.guesses[-1:])
        if ask:
            cost = self._chunk.row + self._rule.asking[0] * self._chunk.share
            ask = self.chance * right > max(cost * self._rate, self._rule.floor)
        if self._rule.asking and number == 0:
            ask = self._rests(ask)
        if free.sure > 0 and (not ask or free.sure >= right):
            return Guess(free.source, free.id, free.promise, min(free.sure, 1.0))
        return Guess(Source.EXIT if ask else Source.NOTHING)

    def _rests(self, ask: bool) -> bool:
        """Whether the exit is asked at the beginning of a round: it is if that pays, or after a pause."""
        e = self._estimates
        e.rest -= not ask
        if ask:
            e.pause = e.rest = NEWEST
        elif e.rest <= 0:
            e.pause = e.rest = min(2 * e.pause, LONGEST_PAUSE)
            return True
        return ask

    def _free(self, ids: list[int]) -> Guess:
        """The likeliest of the drafts that cost nothing. Its estimate may be above 1."""
        e, rule = self._estimates, self._rule
        found = looked_up(ids[-LOOKED_BACK:], rule.lookup)
        text = Guess(Source.TEXT, found, 0.0, e.right[Source.TEXT]) if found is not None else Guess(Source.NOTHING)
        expected = rule.ngrams.after(ids) if rule.ngrams else None
        if expected is None:
            return text
        id, chance = expected
        table = Guess(Source.TABLE, id, chance, chance * e.right[Source.TABLE] / e.promised[Source.TABLE])
        return text if text.sure >= table.sure else table

    def asks(self, exit: int) -> None:
        """Count the cost of asking an open exit."""
        self._asked += self._rule.asking[exit] * self._chunk.share

    def keeps_free(self, guess: Guess, ends: Collection[int]) -> bool:
        """Whether a guess of the text or of the table becomes a draft. It must pay, and must not end the text."""
        return self._keeps(guess, self._rule.floor, ends)

    def keeps_exits(self, id: int, confidence: float, leaves: bool, ends: Collection[int]) -> bool:
        """Whether an exit's token becomes a draft: if it `leaves` by the policy, pays, and does not end the text."""
        e = self._estimates
        sure = min(1.0, confidence * e.right[Source.EXIT] / e.promised[Source.EXIT])
        guess = Guess(Source.EXIT, id, confidence, sure)
        return self._keeps(guess, 0.0 if leaves else float("inf"), ends)

    def _keeps(self, guess: Guess, floor: float, ends: Collection[int]) -> bool:
        self.guesses[self._drafts :] = [guess]  # an exit may have been asked for this one before
        chance = self.chance * guess.sure
        if guess.id in ends or not chance > max(self._chunk.row * self._rate, floor):
            return False
        self.chance = chance
        self._chunk.width += 1
        self._drafts += 1
        return True

    def learn(self, chosen: list[int]) -> None:
        """Learn from what full depth chose: the drafts that stand, and a token of its own. The chunk is complete."""
        for guess, id in zip(self.guesses, chosen, strict=False):  # drafts after the first wrong one teach nothing
            self._estimates.learn_draft(guess, id)
        self._estimates.learn_round(len(chosen), self._chunk.cost + self._asked)


def looked_up(ids: list[int], size: int) -> int | None:
    """The id that followed the last `size` ids when they last occurred; None if they did not, or for a size of 0."""
    if size < 1 or len(ids) <= size:
        return None
    text, last = array("q", ids).tobytes(), array("q", ids[-size:]).tobytes()
    end = len(text) - 8  # not the last ids themselves
    while (at := text.rfind(last, 0, end)) >= 0:
        if at % 8 == 0:
            return ids[at // 8 + size]
        end = at + len(last) - 1
    return None
