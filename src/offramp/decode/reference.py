"""The reference stepper: the newest token of every sequence climbs through the blocks, and leaves at the first sure exit.

Exits divide the blocks into segments. A climb runs a segment, then asks the exit at its end.

    embed ─ segment 0 ─┬─ segment 1 ─┬─ segment 2 ─ norm ─ head
                     exit 0        exit 1

At an exit the gate reads the hidden state. If its confidence is above the threshold, the read-out turns the hidden state
into logits, and the token leaves; the fill (`decode.fills`) decides what the skipped blocks remember of it. Otherwise the
token runs the next segment, in one chunk with all tokens that wait at this exit.

With `verify`, a token that left is a draft, and the sequence climbs again at once. When a climb reaches the top, the full
model's logits decide: drafts that agree stand, the first draft that differs is replaced, and all drafts after it are
rejected.

Climbs that are furthest behind run first. So sequences that go deep wait for each other, and share one pass over the
weights in compiled blocks. In the library's blocks, sequences take turns. Closed exits never let a token
leave and are left out, so full depth costs nothing extra.

This code is meant to be read. It runs with any runtime's blocks, exits of all kinds and any `choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offramp.decode.climb import Climb
from offramp.decode.drafts import Chunk, Round, Source
from offramp.decode.embedding import embed_all
from offramp.decode.leaving import leave
from offramp.decode.request import Request
from offramp.decode.sequence import SOURCES, Decision

if TYPE_CHECKING:
    from offramp.decode.plan import Plan


class Reference:
    """The `Stepper` in Python, for requests of one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def step(
        self, reading: Sequence[tuple[Request, int]], deciding: Sequence[Request]
    ) -> list[tuple[Request, list[Decision]]]:
        """Read pieces of prompts, then decide at least one token of each request in `deciding`."""
        rows = sum(end - request.sequence.run for request, end in reading)
        if reading:
            read(self._plan, reading)
        return decide(self._plan, deciding, rows) if deciding else []


def read(plan: Plan, reading: Sequence[tuple[Request, int]]) -> None:
    """Run a piece of each prompt at full depth; recurrent gates and read-outs see it too."""
    climbs = [Climb(request, end, may_leave=False, counted=False) for request, end in reading]
    embed(plan, climbs)
    for number in range(plan.top):
        run_segment(plan, number, climbs)
        pass_exit(plan, number, climbs)
    run_segment(plan, plan.top, climbs)
    for climb in climbs:
        climb.sequence.deep = climb.deep(-1)
        climb.sequence.settle()


def decide(plan: Plan, requests: Sequence[Request], beside: int) -> list[tuple[Request, list[Decision]]]:
    """Let the requests' sequences climb until a token of each is decided. The climbs furthest behind run first.

    `beside`: so many rows of the step only read.
    """
    decided: dict[Request, list[Decision]] = {}
    climbs = [set_out(plan, *pair) for pair in zip(requests, begin_rounds(plan, requests, beside), strict=True)]
    embed(plan, climbs)
    while (number := min((climb.segment for climb in climbs), default=plan.top)) < plan.top:
        here = [climb for climb in climbs if climb.segment == number]
        run_segment(plan, number, here)
        left = leave(plan, number, [climb for climb in here if climb.may_leave])
        climbs = [climb for climb in climbs if not climb.request.error]
        if plan.fill.verifies:
            climbs = [set_out_anew(plan, climb, left[climb]) if climb in left else climb for climb in climbs]
            embed(plan, climbs)
        else:
            climbs = [climb for climb in climbs if climb not in left]
            decided |= {climb.request: [decision] for climb, decision in left.items()}
        pass_exit(plan, number, [climb for climb in here if climb in climbs])
    run_segment(plan, plan.top, climbs)
    decided |= judge(plan, climbs)
    for request in decided:
        request.sequence.settle()
    return [(request, decided[request]) for request in requests if request in decided]


def begin_rounds(plan: Plan, requests: Sequence[Request], beside: int) -> list[Round | None]:
    """A round of drafts for each request."""
    if not plan.drafts:
        return [None] * len(requests)
    chunk = Chunk(plan.drafts, len(requests), beside)
    return [Round(chunk, request.sequence.estimates) for request in requests]


def set_out(plan: Plan, request: Request, round: Round | None) -> Climb:
    """Start a climb of a sequence's newest token, together with drafts that cost nothing. Exits are asked if that pays."""
    sequence, ids = request.sequence, request.sequence.ids
    if not round:
        return Climb(request, len(ids), may_leave=sequence.pending < plan.max_pending)
    # A grammar cannot say what may follow a draft before full depth has decided about the draft.
    most = 0
    if plan.drafts and not hasattr(request.choose, "allowed"):
        most = min(plan.drafts.most, request.remaining - 1)
    while len(sequence.drafts) < most:
        guess = round.next(ids)
        if guess.source == Source.EXIT:
            return Climb(request, len(ids), may_leave=True, round=round)
        if guess.source == Source.NOTHING or not round.keeps_free(guess, request.end_ids):
            break
        sequence.drafts.append(Decision(guess.id, 0, None, source=SOURCES[guess.source]))
        ids.append(guess.id)
    return Climb(request, len(ids), may_leave=False, round=round)


def set_out_anew(plan: Plan, climb: Climb, decision: Decision) -> Climb:
    """Take the token that a climb left with as a draft, and set out again."""
    climb.sequence.drafts.append(decision)
    return set_out(plan, climb.request, climb.round)


def embed(plan: Plan, climbs: list[Climb]) -> None:
    """Embed the tokens of climbs that set out."""
    setting_out = [climb for climb in climbs if climb.h is None]
    if not setting_out:
        return
    with plan.timed("embedding"):
        sequences = [climb.sequence for climb in setting_out]
        texts = [[climb.sequence.ids[climb.sequence.run : climb.end]] for climb in setting_out]
        embedded = embed_all(plan.backbone, texts, [sequence.run for sequence in sequences])
    for climb, (h, step) in zip(setting_out, embedded, strict=True):
        climb.h, climb.step, climb.sequence.run = h, step, climb.end


def run_segment(plan: Plan, number: int, climbs: list[Climb]) -> None:
    """Run a segment's blocks for all climbs at it, in one pass over the weights. Then the exit at its end sees them."""
    if not climbs:
        return
    start, stop = plan.segments[number].start, plan.segments[number].stop
    for climb in climbs:
        climb.make_room(start, stop, plan.first_tail)
        if climb.counted:
            climb.work = climb.work.plus(plan.work(start, stop, climb.hidden.shape[1], climb.end))
    with plan.timed(plan.part_of(number)):
        if plan.middle and number == plan.top:
            run_blocks(plan, climbs, start, plan.middle)
            for climb in climbs:
                climb.middle = climb.h
            start = plan.middle
        run_blocks(plan, climbs, start, stop)
    if number < plan.top:
        with plan.timed("exits"):
            for climb in climbs:
                climb.spend(climb.sequence.exits[number].see(climb.hidden, climb.sequence.deep))


def run_blocks(plan: Plan, climbs: list[Climb], start: int, stop: int) -> None:
    """Run the climbs' hidden states through blocks `start` to `stop` - 1."""
    hidden: list[Tensor] = plan.backbone.run_all([climb.part for climb in climbs], start, stop)
    for climb, h in zip(climbs, hidden, strict=True):
        climb.h = h


def pass_exit(plan: Plan, number: int, climbs: list[Climb]) -> None:
    """Go on past an exit, and take along the tokens that are pending there."""
    for climb in climbs:
        climb.segment = number + 1
        pending = climb.sequence.exits[number].pending
        if pending:
            climb.h = torch.cat([*pending, climb.hidden], dim=1)
            climb.step = plan.backbone.step(climb.h, climb.end - climb.h.shape[1])
            pending.clear()


def judge(plan: Plan, climbs: list[Climb]) -> dict[Request, list[Decision]]:
    """Let full depth decide at the top which drafts stand (`compare`)."""
    decided = {}
    for head in dict.fromkeys((plan.head, plan.whole_head)):
        those = [climb for climb in climbs if head is (plan.whole_head if climb.request.reads_all else plan.head)]
        # The rows of tokens that only waited come first, then those of the newest token and of drafts.
        hidden = [climb.hidden[:, -1 - len(climb.sequence.drafts) :] for climb in those]
        for climb, logits in zip(those, plan.logits_of(head, hidden) if those else [], strict=True):
            with climb.request.own():
                plan.check_numbers(logits)
                climb.spend(len(logits) * head.flops)
                decided[climb.request] = compare(plan, climb, logits)
    return decided


def compare(plan: Plan, climb: Climb, logits: Tensor) -> list[Decision]:
    """The drafts that full depth chooses, then full depth's own token in place of the first other draft.

    Row i of the logits (n, V) decides the position of draft i; the last row decides the position after all drafts. The
    first other draft, and all after it, are rejected.
    """
    sequence, drafts = climb.sequence, climb.sequence.drafts
    first = len(sequence.ids) - len(drafts)
    for stood, scores in enumerate(logits):
        with plan.timed("sampling"):
            id = climb.request.choose(scores, sequence.ids[: first + stood])
        if stood == len(drafts) or id != drafts[stood].id:
            break
    newest = Decision(id, plan.backbone.n_blocks, None)
    rejected = drafts[stood:]
    sequence.deep = climb.deep(stood - len(logits))
    sequence.deep_passes += 1
    sequence.rejected += len(rejected)
    if stood < len(drafts):
        with plan.timed("rollback"):
            sequence.crop(first + stood)
    sequence.ids.append(newest.id)
    work = newest.work.plus(climb.work, *(draft.work for draft in rejected))
    decisions = [*drafts[:stood], replace(newest, work=work)]
    if climb.round:
        climb.round.learn([decision.id for decision in decisions])
    return [replace(each, deep_passes=sequence.deep_passes, rejected=sequence.rejected) for each in decisions]
