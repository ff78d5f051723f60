"""The rule of drafts: when `verify` makes one, and where it comes from.

A draft comes from an exit, or for nothing from the text, where it repeats itself (prompt look-up: A. Saxena, "Prompt Lookup
Decoding", 2023), or from a table of n-grams. The more tokens are alike, the likelier the text is right. Each draft adds a
row to the chunk that full depth decides about. The row costs something, and so does asking an exit. A draft is made if its
chance to stand is worth `WORTH` times its cost. The chances are what sources promise, corrected by the earlier drafts of
the same text. No clock decides, so answers can be repeated.

Costs are in steps of full depth: passes of one row. All requests of a step share one chunk, so the cost of a row depends on
the chunk's width at that moment. Compiled code follows the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np

from offramp.errors import CorruptFile
from offramp.exits.exits import Exit, Exits
from offramp.exits.ngrams import Ngrams
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import DEPTHS, MOST_DRAFTS

LOOKED_BACK = 8192  # prompt look-up searches this many of a text's newest tokens
# The chance that a token follows if the last 1, 2, … tokens stood before it earlier in the text: the shares in own answers
# of SmolLM2 to general prompts and of Qwen2.5-Coder-0.5B to those for code, which differ by less than 0.05.
REPEATED = (0.2, 0.5, 0.62, 0.7, 0.74, 0.78, 0.81, 0.84, 0.86, 0.88, 0.9, 0.91, 0.92, 0.93, 0.94, 0.97)
DOUBT = 2.0  # that share counts as much as so many other places in the text
MOST_ASKED = 7  # drafts of a round for which exits are asked
WIDEST = 64  # rows of a pass; more if there are so many requests that each could not have `MOST_ASKED` drafts
NEWEST, LONGEST_PAUSE = 16, 64  # drafts that a share mostly reflects; the longest pause of an exit, in rounds
FEW = 4  # drafts of each source that count as seen when a text begins
LEAST_DOUBT = 0.01  # no draft is more certain, and none more hopeless
WORTH = 1.3  # a draft must be worth so many times its cost, since the chances that look best are often too high


class Source(IntEnum):
    """Where a draft comes from."""

    NOTHING, EXIT, TEXT, TABLE = range(4)


@dataclass
class Estimates:
    """Estimates from the drafts of one sequence. Lists have a number for each source.

    `right`: the share of a source's newest drafts that were right; `seen`: the number of these drafts (for NOTHING: the
    number of rounds behind `tokens` and `cost`); `promised`: the mean of what their source promised. `tokens` and `cost`:
    the means of a round. `rest` and `pause`: rounds until an exit whose drafts do not pay is asked again, now and next
    time. At first, `FEW` drafts of a source count as made: of the exit's, the share that was right in its training is
    right, or one half if that is unknown; of another source's, the share that its first draft promises.
    """

    right: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.5, 0.5])
    seen: list[int] = field(default_factory=lambda: [1, FEW, 0, 0])
    promised: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.5, 0.5])
    tokens: float = 1.0
    cost: float = 1.0
    rest: int = 0
    pause: int = NEWEST

    def copy(self) -> Estimates:
        """A copy of the estimates, which learns independently."""
        return replace(self, right=[*self.right], seen=[*self.seen], promised=[*self.promised])

    def expect(self, accepted: tuple[float, ...]) -> None:
        """Begin with what an exit's training says, if nothing has been drafted yet."""
        if self.seen[Source.NOTHING] == 1 and accepted and accepted[0]:
            self.right[Source.EXIT] = self.promised[Source.EXIT] = accepted[0]

    def sure(self, source: Source, promise: float) -> float:
        """The chance that a draft is right, by its promise and by what came true of its source's promises.

        What is scaled are odds: a factor for the chance itself would make drafts certain after a few lucky ones.
        """
        p, right, promised = (
            min(max(share, LEAST_DOUBT), 1 - LEAST_DOUBT) for share in (promise, self.right[source], self.promised[source])
        )
        likely, unlikely = p * right * (1 - promised), (1 - p) * promised * (1 - right)
        return likely / (likely + unlikely)

    def _seen(self, source: Source) -> int:
        """Count one more number of a source. Returns the count."""
        self.seen[source] = min(self.seen[source] + 1, NEWEST)
        return self.seen[source]

    def learn_draft(self, guess: Guess, chosen: int) -> None:
        """Learn from a draft, now that full depth has decided its position."""
        source = guess.source
        if not self.seen[source]:
            self.right[source], self.promised[source], self.seen[source] = guess.promise, guess.promise, FEW
        seen = self._seen(source)
        self.right[source] += ((guess.id == chosen) - self.right[source]) / seen
        self.promised[source] += (guess.promise - self.promised[source]) / seen

    def learn_round(self, tokens: int, cost: float) -> None:
        """Learn from a round: the number of its tokens, and its cost."""
        seen = self._seen(Source.NOTHING)
        self.tokens += (tokens - self.tokens) / seen
        self.cost += (cost - self.cost) / seen


@dataclass(frozen=True)
class Guess:
    """A draft that is tried, or only the source that it is to come from.

    `promise`: the exit's confidence, or the chance by the text or the table; `sure`: the chance that the draft is right,
    by the promise and the estimates.
    """

    source: Source
    id: int = -1
    promise: float = 0.0
    sure: float = 0.0


@dataclass(frozen=True)
class DraftRule:
    """The costs and sources of the drafts of one plan.

    `rows`: the cost of 0, 1, … more rows of a chunk; `asking`: that of asking each open exit; `floor`: what a draft's
    chance to stand must exceed, the threshold of the first open exit. If the last `lookup` tokens or more stand earlier in
    the text, the token that followed them there may be a draft (0: no look-up), and so may what `ngrams` expects. A round
    has at most `most` drafts. `accepted`: the shares of an exit's first, second and later drafts that were right in its
    training, `DEPTHS` of them; none if that is unknown.
    """

    rows: tuple[float, ...]
    asking: tuple[float, ...] = ()
    floor: float = 0.0
    lookup: int = 0
    ngrams: Ngrams | None = None
    most: int = MOST_DRAFTS
    accepted: tuple[float, ...] = ()

    def later(self, number: int) -> float:
        """How often an exit's draft `number` (from 0) of a round is right, as a share of the first."""
        return self.accepted[min(number, DEPTHS - 1)] / self.accepted[0] if self.accepted and self.accepted[0] else 1.0

    def pass_cost(self, width: int) -> float:
        """The cost of a pass with so many rows. Beyond the table, each row costs as much as the table's last one."""
        costs = self.rows
        beyond = max(0, width - len(costs))
        return 1 + costs[min(width, len(costs)) - 1] + beyond * (costs[-1] - costs[-2])


def accepted_by(exits: Exits, exit: Exit, with_table: bool = False) -> tuple[float, ...]:
    """The shares of the exit's first, second and later drafts that were right on held-out text, by its training's record.

    `with_table`: of the exit's and the table's, where the record has them. Empty if the record does not say. Raises
    `CorruptFile` for a damaged record.
    """
    try:
        held: dict[str, Any] = next((row for row in exits.validation if row["block"] == exit.block), {})
        own = held.get("acceptance") or ([held["agreement"]] if held else [])
        known = (held.get("with_table") if with_table else None) or own
        shares = [float(share) for share in known]
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"shares of {shares}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # a stranger's record may hold anything
        raise CorruptFile(f"The exits' record of their training is damaged: {error!r}.", "Train them again.") from error
    return tuple(shares + shares[-1:] * (DEPTHS - len(shares)))[:DEPTHS]


def asking_cost(backbone: Backbone, exit: Exit, head: int) -> float:
    """The bytes that are read to ask an exit, as a share of those of a step of full depth.

    Counted are the blocks before the exit, its tail, its read-out and the head. As in compiled code, an entry of the last
    two takes 4 bytes with float32 weights, half a byte with 4-bit ones, else 1.
    """
    runtime = backbone.runtime
    entry = {"float32": 4.0, "int4": 0.5}.get(backbone.precision, 1.0)
    blocks = [*range(exit.block), *range(backbone.n_blocks - exit.tail, backbone.n_blocks)]
    asked = sum(map(runtime.block_bytes, blocks)) + entry * (exit.adapter.flops() + head) / 2
    return asked / backbone.step_bytes


class Chunk:
    """The rows that all requests of a step run to the top together: one for each request and each draft so far.

    `beside`: rows that only read in this step. They make a pass wide, and a row of a wide pass may cost more.
    """

    def __init__(self, rule: DraftRule, requests: int, beside: int = 0) -> None:
        self.rule, self.width, self._beside = rule, requests, beside
        self._requests, self._widest = requests, max(WIDEST, (MOST_ASKED + 1) * requests)
        self.share = rule.pass_cost(requests) / requests  # cost of a request, without drafts
        self.rate = 1 / self.share  # tokens for each step of full depth, without drafts

    def row(self, chance: float) -> float:
        """The price of another row, for a draft with this chance to be right; infinite if there is no room for it.

        Some rows are dear because the pass reads the weights once more, and the rows after them are cheap. The rows that
        are likely to follow share that cost: if each stands with this chance, 1 / (1 - chance) rows are likely, up to the
        first that fails. The price is the lowest mean cost of 1 to that many rows.
        """
        run = min(1 / (1 - chance), MOST_DRAFTS) if chance < 1 else MOST_DRAFTS
        width, room = self.width + self._beside, min(int(run), self._widest - self.width)
        now = self.rule.pass_cost(width)
        return min(((self.rule.pass_cost(width + n) - now) / n for n in range(1, room + 1)), default=math.inf)

    @property
    def cost(self) -> float:
        """The cost of the pass for each request."""
        return self.rule.pass_cost(self.width) / self._requests


class Round:
    """The drafts of one sequence in one step. `chance`: that all of them stand; `guesses`: the drafts and the last try."""

    def __init__(self, chunk: Chunk, estimates: Estimates) -> None:
        self._chunk, self._rule, self._estimates = chunk, chunk.rule, estimates
        estimates.expect(self._rule.accepted)
        self._rate = WORTH * max(chunk.rate, estimates.tokens / estimates.cost)
        self.chance, self.guesses = 1.0, list[Guess]()
        self._drafts, self._asked = 0, 0.0

    def next(self, ids: list[int]) -> Guess:
        """Where the next draft comes from, after these ids, drafts among them.

        It is the source that is likelier to be right; an exit is asked only if its chance is high enough to pay. The exit
        goes on only from its own drafts, whose states it knows. If its drafts do not pay, the exit is asked again after
        some rounds.
        """
        e, number = self._estimates, len(self.guesses)
        free, right = self._free(ids), e.right[Source.EXIT] * self._rule.later(number)
        ask = bool(self._rule.asking) and all(guess.source == Source.EXIT for guess in self.guesses[-1:])
        ask = ask and number < MOST_ASKED
        if ask:
            cost = self._chunk.row(right) + self._rule.asking[0] * self._chunk.share
            ask = self.chance * right > max(cost * self._rate, self._rule.floor)
        if self._rule.asking and number == 0:
            ask = self._rests(ask)
        if free.sure > 0 and (not ask or free.sure >= right):
            return free
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
        """The likeliest of the drafts that cost nothing."""
        found = {
            Source.TEXT: looked_up(ids[-LOOKED_BACK:], self._rule.lookup),
            Source.TABLE: self._rule.ngrams.after(ids) if self._rule.ngrams else None,
        }
        guesses = [Guess(source, *each, self._estimates.sure(source, each[1])) for source, each in found.items() if each]
        return max(guesses, key=lambda guess: guess.sure, default=Guess(Source.NOTHING))

    def asks(self, exit: int) -> None:
        """Count the cost of asking an open exit."""
        self._asked += self._rule.asking[exit] * self._chunk.share

    def keeps_free(self, guess: Guess, ends: Collection[int]) -> bool:
        """Whether a guess of the text or of the table becomes a draft. It must pay, and must not end the text."""
        return self._keeps(guess, self._rule.floor, ends)

    def keeps_exits(self, id: int, confidence: float, leaves: bool, ends: Collection[int]) -> bool:
        """Whether an exit's token becomes a draft: if it `leaves` by the policy, pays, and does not end the text."""
        guess = Guess(Source.EXIT, id, confidence, self._estimates.sure(Source.EXIT, confidence))
        return self._keeps(guess, 0.0 if leaves else float("inf"), ends)

    def _keeps(self, guess: Guess, floor: float, ends: Collection[int]) -> bool:
        self.guesses[self._drafts :] = [guess]  # an exit may have been asked for this one before
        chance = self.chance * guess.sure
        if guess.id in ends or not chance > max(self._chunk.row(guess.sure) * self._rate, floor):
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


def looked_up(ids: list[int], least: int) -> tuple[int, float] | None:
    """The id that followed where the ids before were most like the last ones, and its chance.

    At least so many must be alike (0: no look-up); more than `REPEATED` has chances for are not compared. Of equally
    good places, the newest gives the id. Its chance is higher if the same id followed at the others, unless as many are
    alike as `REPEATED` compares: after examples of questions and answers, the beginning of an answer is often repeated, but
    something else follows.
    """
    text, found = np.array(ids), None
    places = np.arange(len(ids) - 1) if least else np.arange(0)  # of ids before which the text may be alike
    for alike, chance in enumerate(REPEATED, 1):
        places = places[places >= alike - 1]
        places = places[text[places - alike + 1] == text[-alike]] if len(places) else places
        if not len(places):
            break
        newest = ids[places[-1] + 1]
        others = text[places[:-1] + 1] if alike < len(REPEATED) else np.arange(0)
        if alike >= least:
            found = newest, (int((others == newest).sum()) + DOUBT * chance) / (len(others) + DOUBT)
    return found
