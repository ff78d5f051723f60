"""Requests that are decoded side by side. A batch chooses which of them read or decide in a step; steppers do the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Unpack

import torch

from offramp.decode.beginnings import Beginnings
from offramp.decode.detokenizer import Detokenizer
from offramp.decode.pace import Pace
from offramp.decode.plan import Plan
from offramp.decode.request import Decided, Event, Finished, Limits, Prefilled, Reading, Request, Talk
from offramp.decode.sampling import Choose
from offramp.decode.sequence import Decision, OpenExit, Sequence
from offramp.decode.stepper import Stepper, Steppers
from offramp.errors import BadInput
from offramp.progress import Progress, silent

# The most tokens that one step reads of one prompt, and of all prompts. More would be no faster, and progress would be
# rare.
PIECE = MOST_READ = 512


class Batch:
    """Requests that are decoded side by side. Make it with `Engine.batch`.

    Requests join with `add` and leave with `cancel` between steps, or when they finish. Each sequence has its own memory,
    exits and drafts, and nothing is padded. Compiled blocks read the weights once for all sequences; in the library's
    blocks, sequences take turns.
    """

    def __init__(self, plan: Plan, steppers: Steppers, choose: Choose) -> None:
        """`choose`: how requests choose tokens that bring no way of their own."""
        self.plan, self._steppers, self._choose = plan, steppers, choose
        self.requests: list[Request] = []
        self.pace = Pace(plan.costs.full(1))
        self.seconds = {"prefill": 0.0, "decode": 0.0}  # seconds that steps have taken
        self._beginnings = Beginnings(plan)

    def add(
        self, ids: list[int], talk: Talk | None = None, choose: Choose | None = None, **limits: Unpack[Limits]
    ) -> Request:
        """Add a request to continue these token ids; the next step starts on it.

        A `talk` keeps what is computed for this request; if it already holds the beginning of the text, the request goes on
        from there. `choose` replaces the batch's own. Raises `BadInput` for an empty prompt, for one that leaves no room in
        the context, for ids that are no tokens, for `max_tokens` below 1, and for a talk that
        another request is using.
        """
        backbone, max_tokens = self.plan.backbone, limits.get("max_tokens", 128)
        _check_limits(limits)
        backbone.prompts.check(ids)
        remaining = min(max_tokens, backbone.context - len(ids))
        self.plan.check_use(remaining)
        choose = choose or self._choose
        sequence = self._sequence(ids, remaining, talk or Talk(), self._steppers.of(choose))
        detokenizer = Detokenizer(backbone.tokenizer, limits.get("stop", ()))
        end_ids = limits.get("end_ids", backbone.stop_ids)
        request = Request(sequence, remaining, end_ids, detokenizer, choose, self.plan.fill.verifies)
        self._beginnings.join(request, self.requests)
        self.requests.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Drop a request: no more of its tokens are decoded. Does nothing for a request that is not in the batch."""
        if request in self.requests:
            self.requests.remove(request)
            request.finish_reason = "cancelled"

    def run(self, progress: Progress = silent) -> Iterator[Event]:
        """Step until every request has finished, and yield the events of all requests that were not cancelled.

        `progress` is told how many tokens have been read of the prompts that take several steps. The error of a request
        ends all of them, and is raised.
        """
        read: dict[Request, tuple[int, int]] = {}  # of the prompts that take several steps: the tokens read, and all tokens
        while self.requests:
            for event in self.step():
                if isinstance(event, Reading):
                    read[event.request] = event.tokens, event.total
                elif isinstance(event, Prefilled) and event.request in read:
                    read[event.request] = (read[event.request][1],) * 2
                if read and isinstance(event, Reading | Prefilled):
                    tokens, totals = zip(*read.values(), strict=True)
                    progress("reading", sum(tokens), sum(totals))
                if error := event.request.error:
                    self._fail(error)
                    raise error
                if event.request.finish_reason != "cancelled":
                    yield event

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read pieces of new prompts, and decide at least one token of every request that is read. Returns the events.

        While answers are under way, a step reads only as much as it can in about `HELD` seconds. An error of one request
        alone, such as NaN logits (`BadNumbers`) or an error in its `choose`, ends that request: it is `Finished`, with the
        finish reason "failed" and its `error`. Any other error is raised, and ends all requests. A talk of a request that
        failed starts anew, since its memory may be half-written.
        """
        self._beginnings.go_on(self.requests)
        new = [request for request in self.requests if not request.prefilled and request not in self._beginnings]
        ready = [request for request in self.requests if request.prefilled]
        reading = self._pieces(new, min(self.pace.rows(len(ready)), MOST_READ) if ready else MOST_READ)
        rows = sum(end - request.sequence.run for request, end in reading)
        started = time.perf_counter()
        try:
            decided = self._step([(request, end) for request, end in reading if request.sequence.run < end], ready)
            self._took(rows, len(ready), time.perf_counter() - started)
            events = [event for each in decided for event in self._emit(*each)]
        except BaseException as error:
            self._fail(error)
            raise
        events += [_progress_of(request) for request, _ in reading]
        for request in [request for request in self.requests if request.error]:
            self.requests.remove(request)
            events.append(Finished(request))
        return events

    def _took(self, rows: int, deciding: int, seconds: float) -> None:
        """Note the time of a step in which so many tokens of prompts were read, and so many requests decided."""
        if rows:
            self.pace.note(rows + deciding, seconds)
        reading = seconds * rows / max(1, rows + deciding)
        self.seconds["prefill"] += reading
        self.seconds["decode"] += seconds - reading

    def _fail(self, error: BaseException) -> None:
        """End all requests with an error."""
        for request in self.requests:
            request.fail(error)
        self.requests.clear()

    def _pieces(self, requests: list[Request], rows: int) -> list[tuple[Request, int]]:
        """The prompts that a step reads, and up to which position: about so many rows in all, but no prompt's last token.

        Half of the rows go to the oldest prompt, the others to the prompts with the fewest tokens left. So long and short
        prompts do not hold each other up.
        """
        ends = {request: self._end_of_piece(request) for request in requests}
        pieces: dict[Request, int] = {}

        def give(request: Request, most: int) -> int:
            """Give a prompt up to so many rows. Returns how many it takes."""
            begin, end = pieces.get(request, request.sequence.run), ends[request]
            end = min(end, begin + most) if self._steppers.may_cut(request.choose) else end
            pieces[request] = end
            return end - begin

        if requests:
            half = -(-rows // 2)
            rows -= min(half, give(requests[0], half))
        for request in sorted(requests, key=self._left):
            if rows > 0 or ends[request] == request.sequence.run:
                rows -= give(request, rows)
        return [*pieces.items()]

    def _end_of_piece(self, request: Request) -> int:
        """Where the next piece of a prompt ends, if there is time: at the prompt's end, a pause, or a step's limit."""
        begin = request.sequence.run
        return min([begin + min(PIECE, self._left(request)), *(place for place in request.pauses if place > begin)])

    def _left(self, request: Request) -> int:
        """How many tokens are left to read of a prompt, or of a beginning that others wait for."""
        places = [len(request.sequence.ids) - 1, *self._beginnings.pauses(request)]
        return min(place for place in places if place >= request.sequence.run) - request.sequence.run

    def _step(self, reading: list[tuple[Request, int]], deciding: list[Request]) -> list[tuple[Request, list[Decision]]]:
        """Let the steppers step these requests, each its own."""
        asked = [*(request for request, _ in reading), *deciding]
        steppers = {request: self._steppers.of(request.choose) for request in asked}
        decided = []
        for stepper in dict.fromkeys(steppers.values()):
            pieces = [piece for piece in reading if steppers[piece[0]] is stepper]
            decided += stepper.step(pieces, [request for request in deciding if steppers[request] is stepper])
        return decided

    def _emit(self, request: Request, decisions: list[Decision]) -> list[Event]:
        """Accept decided tokens, up to the one that ends the request, and return their events."""
        events: list[Event] = []
        for place, decision in enumerate(decisions, 1):
            with self.plan.timed("text"), request.own():
                events.append(Decided(request, request.accept(decision, decisions[place:])))
            if request.error:
                break
            if request.finish_reason:
                self.requests.remove(request)
                events.append(Finished(request))
                break
        return events

    def _sequence(self, ids: list[int], remaining: int, talk: Talk, stepper: Stepper) -> Sequence:
        """The talk's sequence if these ids continue it, else a new one, which the talk keeps."""
        if any(request.sequence is talk.sequence for request in self.requests):
            raise BadInput("Another request is continuing this talk.", "Wait for its end, or use another talk.")
        if talk.sequence is not None:
            talk.sequence.forget_what_differs(ids)
        if talk.sequence is not None and not self.plan.steppers_share and talk.sequence.stepper is not stepper:
            talk.sequence = None
        if talk.sequence is not None and talk.sequence.continued_by(ids, self.plan.open_exits):
            talk.sequence.ids, talk.sequence.prompt = [*ids], len(ids)
            talk.sequence.deep_passes = talk.sequence.rejected = 0  # those of this answer
            talk.sequence.state.reserve(len(ids) + remaining)
        else:
            gated = self.plan.policy.confidence == "gate"
            exits = [OpenExit.of(exit, index, self.plan.parts, gated) for exit, index in self.plan.open_exits]
            talk.sequence = Sequence([*ids], self.plan.backbone.state(len(ids) + remaining), exits, len(ids))
        talk.sequence.stepper = stepper
        return talk.sequence


def _progress_of(request: Request) -> Reading | Prefilled:
    """The event of a request after a piece of its prompt has been read."""
    run, total = request.sequence.run, len(request.sequence.ids) - 1
    request.prefilled = run == total
    return Prefilled(request) if request.prefilled else Reading(request, run, total)


def _check_limits(limits: Limits) -> None:
    """Raises `TypeError` for a misspelt limit, and `BadInput` for limits that cannot be kept."""
    for name in limits:
        if name not in Limits.__annotations__:
            raise TypeError(f"unexpected argument '{name}': the limits are {', '.join(Limits.__annotations__)}")
    if isinstance(limits.get("stop", ()), str):
        raise BadInput("The stop texts must be a tuple of texts, not one text.", 'For example: stop=("\\n",)')
    if limits.get("max_tokens", 1) < 1:
        raise BadInput(f"{limits['max_tokens']} tokens cannot be generated.", "Give --max-tokens 1 or more.")
