"""The decode step: the newest token of every sequence climbs through the blocks, and leaves at the first exit that is sure.

Exits divide the blocks into segments. A climb runs a segment, then asks the exit at its end.

    embed ─ segment 0 ─┬─ segment 1 ─┬─ segment 2 ─ norm ─ head
                     exit 0        exit 1

At an exit the gate reads the hidden state. If its confidence is above the threshold, the read-out turns the hidden state
into logits, and the token leaves; the fill (`decode.fills`) decides what the skipped blocks remember of it. Otherwise the
token runs the next segment, in one chunk with all tokens that wait at this exit.

With `verify`, a token that left is a draft, and the sequence climbs again at once. When a climb reaches the top, the full
model's logits decide: drafts that agree stand, the first draft that differs is replaced, and all drafts after it are
rejected.

A token that climbs alone does not stop at exits whose gate is not sure enough: blocks and gates run in one call
(`decode.gating`). Of several climbs, those that are furthest behind run first. So sequences that go deep wait for each
other, and share one pass over the weights. Exits whose threshold is 1 never fire and are left out: full depth costs nothing
extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from offramp.decode.asking import leave, run_ahead, run_on, runs_ahead, runs_on
from offramp.decode.climb import Climb
from offramp.decode.detokenizer import Detokenizer
from offramp.decode.embedding import embed_all
from offramp.decode.heads import Head
from offramp.decode.plan import Plan
from offramp.decode.request import Decided, Event, Finished, Limits, Prefilled, Reading, Request, Talk
from offramp.decode.sampling import Choose
from offramp.decode.sequence import Decision, OpenExit, Sequence, looked_up
from offramp.errors import BadInput
from offramp.progress import Progress, silent

# Most tokens of a prompt that one step reads. More would be no faster, and progress would be seldom.
PIECE = 512
MOST_READ = 512  # tokens of prompts that a step reads, about; other answers wait for so long

# Most drafts from prompt look-up. A pass over four rows costs little more than over one; a pass over eight costs more.
LOOKED_UP = 3


class Batch:
    """Requests that are decoded side by side. Make it with `Engine.batch`.

    Requests join with `add` and leave with `cancel` between steps, or when they finish. Each sequence has its own memory,
    exits and drafts; nothing is padded; only the passes over the weights are shared (in compiled blocks; in
    the library's, sequences take turns).
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.requests: list[Request] = []
        self._has_read = False  # whether the last step read prompts
        self._oldest_first = False  # whether the last step that read prompts began with the oldest one
        self._drafts = True  # whether sequences draft in this step

    def add(
        self, ids: list[int], talk: Talk | None = None, choose: Choose | None = None, **limits: Unpack[Limits]
    ) -> Request:
        """Add a request to continue these token ids; the next step starts on it.

        A `talk` keeps what is computed for this request, and gives it what was computed for the beginning of the same text.
        `choose` takes the place of the plan's own. Raises `BadInput` for an empty prompt, for one that leaves no room in
        the context, for ids that are no tokens, for `max_tokens` below 1, and for a talk that another request is using.
        """
        backbone, max_tokens = self.plan.backbone, limits.get("max_tokens", 128)
        _check_limits(limits)
        backbone.prompts.check(ids)
        remaining = min(max_tokens, backbone.context - len(ids))
        self.plan.check_use(remaining)
        sequence = self._sequence(ids, remaining, talk or Talk())
        detokenizer = Detokenizer(backbone.tokenizer, limits.get("stop", ()))
        end_ids = limits.get("end_ids", backbone.stop_ids)
        request = Request(sequence, remaining, end_ids, detokenizer, choose or self.plan.choose)
        self.requests.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Drop a request: no more of its tokens are decoded. Does nothing for a request that is not in the batch."""
        if request in self.requests:
            self.requests.remove(request)
            request.finish_reason = "cancelled"

    def run(self, progress: Progress = silent) -> Iterator[Event]:
        """Step until every request has finished; yield what happens, but for requests that were cancelled meanwhile.

        `progress` is told how many tokens have been read of the prompts that take several steps. The error of a request
        ends all of them, and is raised.
        """
        read: dict[Request, tuple[int, int]] = {}  # of these prompts: the tokens read, and all tokens
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
        """Read a piece of each new prompt, or decide at least one token of every request that is read. Returns the events.

        While there is work of both kinds, steps take turns, so that a long prompt does not hold up other answers. What
        goes wrong for one request alone, such as NaN logits (`BadNumbers`) or its `choose`, ends that request: it is
        `Finished`, with the finish reason "failed" and its `error`. Any other error is raised, and all requests end so. A
        talk of a request that failed starts anew, since its memory may be half-written.
        """
        new = [request for request in self.requests if not request.prefilled]
        ready = [request for request in self.requests if request.prefilled]
        self._has_read = bool(new) and not (ready and self._has_read)
        try:
            events = self._prefill(new) if self._has_read else self._decode(ready)
        except BaseException as error:
            self._fail(error)
            raise
        for request in [request for request in self.requests if request.error]:
            self.requests.remove(request)
            events.append(Finished(request))
        return events

    def _fail(self, error: BaseException) -> None:
        """End all requests with an error."""
        for request in self.requests:
            request.fail(error)
        self.requests.clear()

    def _prefill(self, requests: list[Request]) -> list[Event]:
        """Run a piece of each prompt at full depth, but not its last token; recurrent gates and read-outs see it too.

        Prompts whose pieces would make more than about `MOST_READ` rows wait for the next step. The oldest prompt and that
        of which least is left go first in turn: so a long prompt does not hold up short ones, nor they it.
        """
        self._oldest_first = not self._oldest_first
        if not self._oldest_first:
            requests = sorted(requests, key=lambda request: len(request.sequence.ids) - request.sequence.run)
        climbs: list[Climb] = []
        reading: list[Request] = []
        rows = 0
        for request in requests:
            if rows >= MOST_READ:
                break
            sequence = request.sequence
            pause = min((place for place in request.pauses if place > sequence.run), default=len(sequence.ids))
            end = min(len(sequence.ids) - 1, sequence.run + PIECE, pause)
            reading.append(request)
            if sequence.run < end:
                rows += end - sequence.run
                climbs.append(Climb(request, end, may_leave=False, counted=False))
                self._embed(climbs[-1:])
        for number in range(len(self.plan.segments)):
            self._run_blocks(number, climbs)
            if number < self.plan.top:
                self._pass_exit(number, climbs)
        for climb in climbs:
            climb.sequence.deep = climb.deep(-1)
            for follower in climb.sequence.followers:
                follower.catch_up()
        events: list[Event] = []
        for request in reading:
            sequence, total = request.sequence, len(request.sequence.ids) - 1
            sequence.settle()
            request.prefilled = sequence.run == total
            events.append(Prefilled(request) if request.prefilled else Reading(request, sequence.run, total))
        return events

    def _decode(self, requests: list[Request]) -> list[Event]:
        """Let the requests' sequences climb until a token of each is decided. The climbs furthest behind run first."""
        events: list[Event] = []
        drafting = self.plan.drafting
        self._drafts = drafting is None or drafting.pays_beside(len(requests))
        if len(requests) == 1 and runs_ahead(self.plan, requests[0]):
            events, climb = self._run_ahead(requests[0])
            if climb is None or climb.request.finish_reason:
                return events
            more, climbs = self._at_exit(climb.segment, [climb])
            events += more
        else:
            climbs = [self._set_out(request) for request in requests]
        self._embed(climbs)
        while climbs:
            if len(climbs) == 1 and runs_on(self.plan, climbs[0]):
                run_on(self.plan, climbs[0])
                number, at_segment, further_up = climbs[0].segment, climbs, []
            else:
                number = min(climb.segment for climb in climbs)
                at_segment = [climb for climb in climbs if climb.segment == number]
                further_up = [climb for climb in climbs if climb.segment != number]
                self._run_blocks(number, at_segment)
            if number == self.plan.top:
                events += self._judge(at_segment)
                climbs = further_up
                continue
            more, going_on = self._at_exit(number, at_segment)
            events += more
            climbs = [*going_on, *further_up]
        return events

    def _at_exit(self, number: int, climbs: list[Climb]) -> tuple[list[Event], list[Climb]]:
        """Let climbs leave at an exit. Returns the events, and the climbs that go on; a draft's sets out anew."""
        decisions, events = leave(self.plan, number, climbs), []
        going_on = [climb for climb in climbs if climb not in decisions and not climb.request.error]
        self._pass_exit(number, going_on)
        if self.plan.fill.verifies:
            anew = [self._draft(climb, decision) for climb, decision in decisions.items()]
            self._embed(anew)
            return [], [*going_on, *anew]
        for climb, decision in decisions.items():
            with climb.request.own():
                climb.sequence.settle()
                events += self._emit(climb.request, [decision])
        return events, going_on

    def _run_ahead(self, request: Request) -> tuple[list[Event], Climb | None]:
        """Decide tokens in one call. Returns their events, and the climb of a token that an exit may let leave."""
        events: list[Event] = []
        climb: Climb | None = None
        with request.own():
            passes, climb = run_ahead(self.plan, request)
            for made in passes:
                request.sequence.deep_passes += 1
                request.sequence.rejected += made.rejected
                if not request.finish_reason:
                    events += self._emit(request, made.decisions)
            request.sequence.settle()
        return events, climb

    def _set_out(self, request: Request) -> Climb:
        """Start a climb of a sequence's newest token, together with drafts that are looked up in its text."""
        sequence, ids = request.sequence, request.sequence.ids
        if not self._drafts:
            return Climb(request, len(ids), may_leave=False)
        if not sequence.drafts and self.plan.lookup:
            limit = min(LOOKED_UP, self.plan.max_pending, request.remaining - 1)
            draft_ids = looked_up(ids, self.plan.lookup, limit)
            sequence.drafts += [Decision(id, 0, None) for id in draft_ids]
            ids += draft_ids
            may_leave, end = not draft_ids, len(ids)
        else:
            # A draft that ends the text is verified, but the climb does not start from it.
            text_ends = bool(sequence.drafts) and (len(sequence.drafts) == request.remaining or ids[-1] in request.end_ids)
            may_leave, end = not text_ends, len(ids) - text_ends
        return Climb(request, end, may_leave and sequence.pending < self.plan.max_pending)

    def _draft(self, climb: Climb, decision: Decision) -> Climb:
        """Take the token that a climb left with as a draft, and set out again."""
        climb.sequence.drafts.append(decision)
        return self._set_out(climb.request)

    def _embed(self, climbs: list[Climb]) -> None:
        """Embed the climbs' tokens that have not been run yet."""
        setting_out = [climb for climb in climbs if climb.sequence.run < climb.end]
        if not setting_out:
            return
        with self.plan.timed("embedding"):
            sequences = [climb.sequence for climb in setting_out]
            texts = [[climb.sequence.ids[climb.sequence.run : climb.end]] for climb in setting_out]
            embedded = embed_all(self.plan.backbone, texts, [sequence.run for sequence in sequences])
        for climb, (h, step) in zip(setting_out, embedded, strict=True):
            climb.h, climb.step, climb.sequence.run = h, step, climb.end

    def _run_blocks(self, number: int, climbs: list[Climb]) -> None:
        """Run a segment's blocks for all climbs that are at it, in one pass over the weights."""
        plan, segment = self.plan, self.plan.segments[number]
        moving = [climb for climb in climbs if climb.h is not None]
        if not moving:
            return
        for climb in moving:
            climb.make_room(segment.start, segment.stop, plan.first_tail)
            if climb.counted:
                tokens = climb.hidden.shape[1]
                climb.work = climb.work.plus(plan.work(segment.start, segment.stop, tokens, climb.end))
        with plan.timed(plan.part_of(number)):
            start = segment.start
            if plan.middle and number == plan.top:
                for climb, h in zip(moving, self._through(moving, start, plan.middle), strict=True):
                    climb.h = climb.middle = h
                start = plan.middle
            hidden = self._through(moving, start, segment.stop)
        for climb, h in zip(moving, hidden, strict=True):
            climb.h = h
            if number < plan.top:
                climb.sequence.exits[number].see(h, climb.sequence.deep)

    def _through(self, climbs: list[Climb], start: int, stop: int) -> list[Tensor]:
        """The climbs' hidden states after blocks `start` to `stop` - 1."""
        return self.plan.backbone.run_all([climb.part for climb in climbs], start, stop)

    def _pass_exit(self, number: int, climbs: list[Climb]) -> None:
        """Go on past an exit, and take along the tokens that are pending there."""
        for climb in climbs:
            climb.segment = number + 1
            pending = climb.sequence.exits[number].pending
            if pending:
                climb.h = torch.cat(pending if climb.h is None else [*pending, climb.h], dim=1)
                climb.step = self.plan.backbone.step(climb.h, climb.end - climb.h.shape[1])
                pending.clear()

    def _judge(self, climbs: list[Climb]) -> list[Event]:
        """Let full depth decide at the top: drafts that agree stand, and one token of its own follows."""
        plan, verifies = self.plan, self.plan.fill.verifies
        by_head: dict[Head, list[Climb]] = {}
        for climb in climbs:
            by_head.setdefault(plan.whole_head if climb.request.reads_all else plan.head, []).append(climb)
        events: list[Event] = []
        for head, those in by_head.items():
            hidden = [h if verifies or h.shape[1] == 1 else h[:, -1:] for h in (climb.hidden for climb in those)]
            for climb, h, logits in zip(those, hidden, plan.logits_of(head, hidden), strict=True):
                with climb.request.own():
                    plan.check_numbers(logits)
                    climb.spend(h.shape[1] * head.flops)
                    decisions = self._compare(climb, h, logits)
                    climb.sequence.settle()
                    events += self._emit(climb.request, decisions)
        return events

    def _compare(self, climb: Climb, h: Tensor, logits: Tensor) -> list[Decision]:
        """The drafts that full depth chooses too, then the token that it chooses instead of the first that differs.

        Row i of h (1, n, D) and logits (n, V) decides the position of draft i. The drafts from that token on are rejected.
        """
        sequence, ids = climb.sequence, climb.sequence.ids
        drafts, first = sequence.drafts, len(ids) - len(sequence.drafts)
        sequence.deep_passes += 1
        for row, scores in enumerate(logits):
            sequence.deep = climb.deep(row - len(logits))  # tokens that only waited come before those that are judged
            position = first + row
            with self.plan.timed("sampling"):
                id = climb.request.choose(scores, ids[:position])
            if position < len(ids) and id == ids[position]:
                continue
            rejected = drafts[row:]
            if rejected:
                sequence.rejected += len(rejected)
                with self.plan.timed("rollback"):
                    sequence.crop(position)
            ids.append(id)
            work = climb.work.plus(*(draft.work for draft in rejected))
            return [*drafts[:row], Decision(id, self.plan.backbone.n_blocks, None, work)]
        # The last draft ends the text, and all drafts stand.
        return [*drafts[:-1], replace(drafts[-1], work=drafts[-1].work.plus(climb.work))]

    def _emit(self, request: Request, decisions: list[Decision]) -> list[Event]:
        """Accept decided tokens, up to the one that ends the request, and return their events."""
        events: list[Event] = []
        for decision in decisions:
            with self.plan.timed("text"):
                events.append(Decided(request, request.accept(decision)))
            if request.finish_reason:
                self.requests.remove(request)
                events.append(Finished(request))
                break
        return events

    def _sequence(self, ids: list[int], remaining: int, talk: Talk) -> Sequence:
        """The talk's sequence if these ids continue it, else a new one, which the talk keeps."""
        if any(request.sequence is talk.sequence for request in self.requests):
            raise BadInput("Another request is continuing this talk.", "Wait for its end, or use another talk.")
        if talk.sequence is not None:
            talk.sequence.forget_what_differs(ids)
        if talk.sequence is not None and talk.sequence.continued_by(ids, self.plan.open_exits):
            talk.sequence.ids, talk.sequence.prompt = [*ids], len(ids)
            talk.sequence.state.reserve(len(ids) + remaining)
        else:
            exits = [OpenExit.of(exit, index, self.plan.parts) for exit, index in self.plan.open_exits]
            talk.sequence = Sequence([*ids], self.plan.backbone.state(len(ids) + remaining), exits, len(ids))
        return talk.sequence


def _check_limits(limits: Limits) -> None:
    """Raises `TypeError` for a misspelt limit, and `BadInput` for limits that cannot be kept."""
    for name in limits:
        if name not in Limits.__annotations__:
            raise TypeError(f"unexpected argument '{name}': the limits are {', '.join(Limits.__annotations__)}")
    if isinstance(limits.get("stop", ()), str):
        raise BadInput("The stop texts are one text, not a tuple of texts.", 'For example: stop=("\\n",)')
    if limits.get("max_tokens", 1) < 1:
        raise BadInput(f"{limits['max_tokens']} tokens cannot be generated.", "Give --max-tokens 1 or more.")
