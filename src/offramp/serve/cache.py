"""A prompt cache: it keeps the memories of the beginnings of texts, for other requests to use again.

An entry is a sequence as it was after some tokens. Attention could be cut back to any shared beginning. A Mamba state
cannot, and neither can a recurrent gate. So an entry can be used for prompts that begin with all of its tokens. Entries are
made where prompts are likely to agree: at the borders of messages, and at the end of an answer.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from offramp.decode.engine import Engine
from offramp.decode.request import Talk
from offramp.decode.sampling import Choose
from offramp.decode.sequence import Sequence

Owner = tuple[Engine, object]  # an engine and, where its steppers cannot go on with each other's texts, the stepper


@dataclass(frozen=True)
class Entry:
    """A sequence that does not change any more, and the bytes of its memory."""

    sequence: Sequence
    bytes: int


class PromptCache:
    """Sequences by who can go on with them, and their tokens. Those not used for the longest time are dropped first.

    most: bytes of memory that all entries may take; 0 keeps nothing. bytes: those they take now.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._entries: OrderedDict[tuple[Owner, tuple[int, ...]], Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def talk(self, engine: Engine, ids: list[int], choose: Choose) -> tuple[Talk, int]:
        """A talk for an answer to these ids, whose tokens `choose` chooses, and how many of the ids it has taken in."""
        own, found = _owner(engine, engine.steppers.of(choose)), tuple[int, ...]()
        for (owner, kept), entry in self._entries.items():
            if owner == own and len(kept) > len(found) and entry.sequence.continued_by(ids, engine.plan.open_exits):
                found = kept
        if not found:
            return Talk(), 0
        self._entries.move_to_end((own, found))
        return Talk(self._entries[own, found].sequence.fork()), len(found)

    def keep(self, engine: Engine, talk: Talk) -> None:
        """Keep a copy of a talk as it is now, if there is room for it.

        Does nothing for a talk that has drafts or pending tokens, or that failed.
        """
        sequence = talk.sequence
        if sequence is None or not sequence.run or not sequence.whole or sequence.pending:
            return
        size = sequence.bytes
        if size > self.most:
            return
        place = _owner(engine, sequence.stepper), tuple(sequence.ids[: sequence.run])
        if place in self._entries:
            return
        while self.bytes + size > self.most:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.bytes
        copied = sequence.fork()
        copied.ids = [*place[1]]
        self._entries[place] = Entry(copied, size)
        self.bytes += size


def _owner(engine: Engine, stepper: object) -> Owner:
    """Who can go on with a text that this stepper of an engine has read."""
    return engine, None if engine.plan.steppers_share else stepper
