"""The decode step: the newest token of every sequence climbs through the blocks, and leaves at the first exit that is sure.

Exits divide the blocks into segments. A climb runs a segment, then asks the exit at its end.

    embed ─ segment 0 ─┬─ segment 1 ─┬─ segment 2 ─ norm ─ head
                     exit 0        exit 1

At an exit the gate reads the hidden state. If its confidence is above the threshold, the read-out turns the hidden state
into logits, and the token leaves; what the skipped blocks remember of it is the fill's business (`decode.fills`). Otherwise
the token goes on through the next segment, and takes along, as one chunk, all tokens that wait at this exit.

With `verify`, a token that left is a draft, and the sequence climbs again at once. When it gets to the top, the full
model's logits decide: the drafts that agree stand, the first that differs is replaced, and all after it are taken back.

Of all climbs, those that are furthest behind go first. So sequences that go deep wait for each other below, and share one
pass over the weights. Exits whose threshold is 1 never fire and are left out: full depth costs nothing extra.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from offramp.decode.detokenizer import Detokenizer
from offramp.decode.heads import Head
from offramp.decode.request import Decided, Event, Finished, Limits, Prefilled, Request, Talk
from offramp.decode.sequence import Decision, OpenExit, Sequence, looked_up
from offramp.errors import BadInput, BadNumbers
from offramp.exits.policy import PATIENCE, TRAINING_FREE
from offramp.model.lean.base import joined
from offramp.model.runtime import Part, Step

if TYPE_CHECKING:
    from offramp.decode.engine import Engine

LOOKED_UP = 3  # drafts from a place where the text repeats itself: four rows cost little more than one, eight do


@dataclass(eq=False)
class Climb:
    """The newest tokens of a request's sequence on their way to the top.

    h (1, n, D): hidden states of the tokens up to position `end`, after the blocks before `segment`; None while the only
    tokens to run are pending further up. `may_leave`: exits are asked. `counted`: FLOPs are (those of a prompt are not).
    `tops`: what each exit on the way read out as the most probable token, for the confidence `patience`.
    """

    request: Request
    end: int
    may_leave: bool
    counted: bool = True
    h: Tensor | None = None
    step: Step | None = None
    segment: int = 0
    flops: int = 0
    tops: list[int] = field(default_factory=list)

    @property
    def sequence(self) -> Sequence:
        return self.request.sequence

    @property
    def hidden(self) -> Tensor:
        """`h`, where there must be one: at an exit that was asked, and at the top."""
        assert self.h is not None
        return self.h

    @property
    def part(self) -> Part:
        """What the backbone needs to run the tokens."""
        assert self.step is not None
        return self.hidden, self.sequence.state, self.step


@dataclass(frozen=True, eq=False)
class ReadOut:
    """What an exit says of a climb's newest token: logits (1, V) or over the short list, read from h (1, 1, D)."""

    climb: Climb
    logits: Tensor
    h: Tensor


class Batch:
    """Requests that are decoded side by side. Make it with `Engine.batch`.

    Requests join with `add` and leave with `cancel` between steps, or when they finish. Each sequence has its own memory,
    exits and drafts; nothing is padded; only the passes over the weights are shared (where the lean path is compiled;
    elsewhere sequences take turns).
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.requests: list[Request] = []

    def add(self, ids: list[int], talk: Talk | None = None, **limits: Unpack[Limits]) -> Request:
        """A request to go on with these token ids. It is worked on from the next step on.

        With a `talk`, what was computed for the beginning of the same text is used again, and kept for the next turn.
        Raises `BadInput` for an empty prompt, for one that leaves no room in the context, and for `max_tokens` below 1.
        """
        backbone = self.engine.backbone
        max_tokens = limits.get("max_tokens", 128)
        if max_tokens < 1:
            raise BadInput(f"{max_tokens} tokens cannot be generated.", "Give --max-tokens 1 or more.")
        backbone.prompts.check(ids)
        remaining = min(max_tokens, backbone.context - len(ids))
        sequence = self._sequence(ids, remaining, talk or Talk())
        detokenizer = Detokenizer(backbone.tokenizer, limits.get("stop", ()))
        request = Request(sequence, remaining, limits.get("end_ids", backbone.stop_ids), detokenizer)
        self.requests.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Drop a request: no more of its tokens are decoded."""
        if request in self.requests:
            self.requests.remove(request)
        request.finish_reason = "cancelled"

    def run(self) -> Iterator[Event]:
        """Step until every request has finished; yield what happens."""
        while self.requests:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read the prompts of new requests, or else decide at least one token of every request. Returns what happened.

        Raises `BadNumbers` for NaN logits.
        """
        new = [request for request in self.requests if not request.prefilled]
        return self._prefill(new) if new else self._decode()

    def _prefill(self, requests: list[Request]) -> list[Event]:
        """All of each prompt but its last token, at full depth; parts that remember see it too."""
        climbs = []
        for request in requests:
            end = len(request.sequence.ids) - 1
            if request.sequence.run < end:
                climbs.append(Climb(request, end, may_leave=False, counted=False))
        for climb in climbs:
            self._embed(climb)
        for number in range(len(self.engine.segments)):
            self._run_blocks(number, climbs)
            if number < self.engine.top:
                self._pass_exit(number, climbs)
        for climb in climbs:
            climb.sequence.top = climb.hidden[:, -1:]
            for follower in climb.sequence.followers:
                follower.catch_up()
        for request in requests:
            request.sequence.settle()
            request.prefilled = True
        return [Prefilled(request) for request in requests]

    def _decode(self) -> list[Event]:
        """Every sequence climbs until a token of it is decided: the furthest behind go first."""
        events: list[Event] = []
        climbs = [self._set_out(request) for request in self.requests]
        while climbs:
            number = min(climb.segment for climb in climbs)
            here = [climb for climb in climbs if climb.segment == number]
            others = [climb for climb in climbs if climb.segment != number]
            self._run_blocks(number, here)
            if number == self.engine.top:
                events += self._judge(here)
                climbs = others
                continue
            left = self._leave(number, here)
            going_on = [climb for climb in here if climb not in left]
            self._pass_exit(number, going_on)
            climbs = [*going_on, *others]
            for climb, decision in left.items():
                if self.engine.fill.verifies:
                    climb.sequence.drafts.append(decision)
                    climbs.append(self._set_out(climb.request))
                else:
                    climb.sequence.settle()
                    events += self._stand(climb.request, [decision])
        return events

    def _set_out(self, request: Request) -> Climb:
        """Begin to run the newest token of a sequence, together with drafts that were looked up in its text."""
        sequence, ids = request.sequence, request.sequence.ids
        if not sequence.drafts and self.engine.lookup:
            most = min(LOOKED_UP, self.engine.max_pending, request.remaining - 1)
            looked = looked_up(ids, self.engine.lookup, most)
            sequence.drafts += [Decision(id, 0, None, 0) for id in looked]
            ids += looked
            may_leave, end = not looked, len(ids)
        else:
            # The last draft ends the text: verify it, but do not go on from it.
            ends = bool(sequence.drafts) and (len(sequence.drafts) == request.remaining or ids[-1] in request.end_ids)
            may_leave, end = not ends, len(ids) - ends
        climb = Climb(request, end, may_leave and sequence.pending < self.engine.max_pending)
        self._embed(climb)
        return climb

    def _embed(self, climb: Climb) -> None:
        """Embed the tokens that have not been run yet."""
        sequence, backbone = climb.sequence, self.engine.backbone
        if sequence.run < climb.end:
            with self.engine.timed("embedding"):
                ids = torch.tensor([sequence.ids[sequence.run : climb.end]], device=backbone.device)
                climb.h, climb.step = backbone.embed(ids, sequence.run)
            sequence.run = climb.end

    def _run_blocks(self, number: int, climbs: list[Climb]) -> None:
        """Run a segment's blocks for all climbs that are there, in one pass over the weights."""
        engine, segment = self.engine, self.engine.segments[number]
        moving = [climb for climb in climbs if climb.h is not None]
        if not moving:
            return
        for climb in moving:
            if climb.sequence.drafts:  # they may have to be forgotten
                climb.sequence.state.watch(segment.start, segment.stop)
            if climb.counted:
                climb.flops += engine.segment_flops(segment, climb.hidden.shape[1], climb.end)
        with engine.timed(engine.part_of(number)):
            hidden = engine.backbone.run_all([climb.part for climb in moving], segment.start, segment.stop)
        for climb, h in zip(moving, hidden, strict=True):
            climb.h = h
            if number < engine.top:
                climb.sequence.exits[number].see(h, climb.sequence.top)

    def _pass_exit(self, number: int, climbs: list[Climb]) -> None:
        """Go on past an exit, and take along the tokens that are pending there."""
        for climb in climbs:
            climb.segment = number + 1
            pending = climb.sequence.exits[number].pending
            if pending:
                climb.h = torch.cat(pending if climb.h is None else [*pending, climb.h], dim=1)
                climb.step = self.engine.backbone.step(climb.h, climb.end - climb.h.shape[1])
                pending.clear()

    def _leave(self, number: int, climbs: list[Climb]) -> dict[Climb, Decision]:
        """The climbs that end at this exit, and what the exit says their next tokens are."""
        engine, left = self.engine, {}
        for read, confidence in self._sure(number, [climb for climb in climbs if climb.may_leave and climb.h is not None]):
            climb, sequence = read.climb, read.climb.sequence
            exit = sequence.exits[number]
            with engine.timed("sampling"):
                id = engine.choose(engine.exit_head.over_vocabulary(read.logits)[-1], sequence.ids)
            with engine.timed("fill"):
                engine.fill.leave(exit, climb.part)
            left[climb] = Decision(id, exit.block, confidence, climb.flops + engine.fill.flops(exit.block, engine.costs))
            sequence.ids.append(id)
            sequence.top = read.h
        return left

    def _sure(self, number: int, climbs: list[Climb]) -> list[tuple[ReadOut, float]]:
        """The newest tokens whose confidence at this exit is above the threshold: their read-outs and confidences."""
        if self.engine.policy.confidence == "gate":
            asked = {climb: self._ask_gate(climb, number) for climb in climbs}
            confidences = {climb: confidence for climb, confidence in asked.items() if confidence is not None}
            return [(read, confidences[read.climb]) for read in self._read_out(number, list(confidences))]
        reads = [(read, self._training_free(read)) for read in self._read_out(number, climbs)]
        return [(read, confidence) for read, confidence in reads if confidence > self._threshold(read.climb, number)]

    def _ask_gate(self, climb: Climb, number: int) -> float | None:
        """The gate's confidence if it is above the threshold, else None. A threshold of 0 asks no gate."""
        threshold = self._threshold(climb, number)
        if not threshold > 0:
            return 1.0
        with self.engine.timed("exits"):
            score, flops = climb.sequence.exits[number].gate.read()
            climb.flops += flops
            confidence = float(score.sigmoid())
        return confidence if confidence > threshold else None

    def _threshold(self, climb: Climb, number: int) -> float:
        """What a confidence must exceed here. A draft is worth only what all drafts before it are worth, too."""
        sequence = climb.sequence
        decided = len(sequence.ids) - sequence.prompt
        threshold = self.engine.policy.threshold(sequence.exits[number].index, decided)
        return threshold / math.prod(draft.confidence or 1.0 for draft in sequence.drafts)

    def _read_out(self, number: int, climbs: list[Climb]) -> list[ReadOut]:
        """The logits of the climbs' newest tokens at an exit."""
        if not climbs:
            return []
        head, adapted = self.engine.exit_head, []
        with self.engine.timed("exits"):
            for climb in climbs:
                h, flops = climb.sequence.exits[number].readout.read()
                climb.flops += flops + head.flops
                adapted.append(h)
        rows = self._logits(head, [h.to(self.engine.backbone.dtype) for h in adapted])
        return [ReadOut(climb, logits, h) for climb, logits, h in zip(climbs, rows, adapted, strict=True)]

    def _training_free(self, read: ReadOut) -> float:
        """A confidence that needs no gate, from the logits alone."""
        kind, tops = self.engine.policy.confidence, read.climb.tops
        if kind != PATIENCE:
            return float(TRAINING_FREE[kind](read.logits[0]))
        tops.append(int(read.logits[0].argmax()))
        agreeing = takewhile(tops[-1].__eq__, reversed(tops))
        return sum(1 for _ in agreeing) / len(self.engine.open_exits)

    def _judge(self, climbs: list[Climb]) -> list[Event]:
        """Full depth decides the tokens that reached the top: drafts that agree stand, and a token of its own follows."""
        head, verifies = self.engine.head, self.engine.fill.verifies
        hidden = [h if verifies or h.shape[1] == 1 else h[:, -1:] for h in (climb.hidden for climb in climbs)]
        events: list[Event] = []
        for climb, h, logits in zip(climbs, hidden, self._logits(head, hidden), strict=True):
            climb.flops += h.shape[1] * head.flops
            decisions = self._compare(climb, h, logits)
            climb.sequence.settle()
            events += self._stand(climb.request, decisions)
        return events

    def _compare(self, climb: Climb, h: Tensor, logits: Tensor) -> list[Decision]:
        """The drafts that full depth chooses too, and the token that it chooses in place of the first that differs.

        Row i of h (1, n, D) and logits (n, V) is what full depth says at the place of draft i. The rest is taken back.
        """
        sequence, ids = climb.sequence, climb.sequence.ids
        drafts, first = sequence.drafts, len(ids) - len(sequence.drafts)
        sequence.deep_passes += 1
        for row, scores in enumerate(logits):
            sequence.top = h[:, row : row + 1]
            place = first + row
            with self.engine.timed("sampling"):
                id = self.engine.choose(scores, ids[:place])
            if place < len(ids) and id == ids[place]:
                continue
            wasted = drafts[row:]
            if wasted:
                sequence.rejected += len(wasted)
                with self.engine.timed("rollback"):
                    sequence.crop(place)
            ids.append(id)
            flops = climb.flops + sum(draft.flops for draft in wasted)
            return [*drafts[:row], Decision(id, self.engine.backbone.n_blocks, None, flops)]
        # The last draft ends the text, and all drafts stand.
        return [*drafts[:-1], replace(drafts[-1], flops=drafts[-1].flops + climb.flops)]

    def _stand(self, request: Request, decisions: list[Decision]) -> list[Event]:
        """Give out tokens that are decided, until the request ends."""
        events: list[Event] = []
        for decision in decisions:
            with self.engine.timed("text"):
                events.append(Decided(request, request.accept(decision)))
            if request.finish_reason:
                self.requests.remove(request)
                events.append(Finished(request))
                break
        return events

    def _logits(self, head: Head, hidden: Many[Tensor]) -> list[Tensor]:
        """The head on the rows of all climbs at once: hidden states (1, n, D) each → logits (n, V) each."""
        with self.engine.timed("heads"):
            logits = head.logits(joined(list(hidden), dim=1))[0]
        if not torch.isfinite(logits.amax()):
            backbone = self.engine.backbone
            raise BadNumbers(
                f"{backbone.name} gave NaN or infinite logits in {backbone.weight_format}.",
                "Try --dtype float32; if that fails too, the weights are damaged: fetch them again.",
            )
        return [logits] if len(hidden) == 1 else list(logits.split([h.shape[1] for h in hidden]))

    def _sequence(self, ids: list[int], remaining: int, talk: Talk) -> Sequence:
        """The talk's sequence if these ids continue it, else a new one, which the talk keeps."""
        if talk.continues(ids) and talk.sequence is not None:
            talk.sequence.ids, talk.sequence.prompt = [*ids], len(ids)
        else:
            exits = [OpenExit.of(exit, index) for exit, index in self.engine.open_exits]
            talk.sequence = Sequence([*ids], self.engine.backbone.state(len(ids) + remaining), exits, len(ids))
        return talk.sequence
