"""Prompts that begin alike and wait to be read at the same time: their common beginning is read once."""

from __future__ import annotations

from collections.abc import Sequence as Several
from operator import itemgetter

from offramp.decode.plan import Plan
from offramp.decode.request import Request
from offramp.decode.sequence import begin_alike

ALIKE = 16  # tokens in common that are worth a pause and a copy of the memory


class Beginnings:
    """The requests that wait while another one reads the beginning of both prompts, and then go on from there.

    A request only waits for an older one, so there is no circle.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._waits: dict[Request, tuple[Request, int]] = {}  # for whom it waits, and up to which position

    def __contains__(self, request: Request) -> bool:
        """Whether a request waits."""
        return request in self._waits

    def join(self, request: Request, older: Several[Request]) -> None:
        """Let a request wait for the older one with the longest beginning in common, if that is worth it."""
        ids, run = request.sequence.ids, request.sequence.run
        useful = [one for one in older if self._may_read_for(one, request)]
        # In a sorted list of texts, neighbours have most in common.
        before = max((one for one in useful if _ids(one) <= ids), key=_ids, default=None)
        after = min((one for one in useful if _ids(one) > ids), key=_ids, default=None)
        shared = [(begin_alike([ids, _ids(one)]), one) for one in (before, after) if one]
        common, reader = max(shared, key=itemgetter(0), default=(0, request))
        while self._waits.get(reader, (reader, 0))[1] >= common > 0:  # it waits itself, for one that reads as far
            reader = self._waits[reader][0]
        if common - run >= ALIKE:
            self._waits[request] = reader, common

    def _may_read_for(self, reader: Request, request: Request) -> bool:
        """Whether a request will still read tokens that another begins with, too, and the other can go on from there."""
        theirs, own = reader.sequence, request.sequence
        same = self._plan.steppers_share or theirs.stepper is own.stepper
        return not reader.prefilled and same and theirs.ids[: theirs.run] == own.ids[: theirs.run]

    def go_on(self, requests: Several[Request]) -> None:
        """Let requests go on whose beginning has been read, oldest first. Those whose reader has left may find another."""
        if not self._waits:
            return
        waits, self._waits = self._waits, {}
        for number, request in enumerate(requests):
            reader, place = waits.get(request, (request, 0))
            if reader is request:
                continue
            if reader.sequence.run == place and reader.sequence.whole:
                request.sequence.go_on_from(reader.sequence, request.remaining)
            elif reader.sequence.run < place and reader in requests[:number]:
                self._waits[request] = reader, place
            else:
                self.join(request, requests[:number])

    def pauses(self, request: Request) -> list[int]:
        """The positions at which others wait for this request."""
        return [place for reader, place in self._waits.values() if reader is request]


def _ids(request: Request) -> list[int]:
    return request.sequence.ids
