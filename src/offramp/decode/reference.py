"""The reference stepper: the newest token of every sequence climbs through the blocks, and leaves at the first sure exit.

Exits divide the blocks into segments. A climb runs a segment, then asks the exit at its end.

    embed ─ segment 0 ─┬─ segment 1 ─┬─ segment 2 ─ norm ─ head
                     exit 0        exit 1

At an exit the gate reads the hidden state. If its confidence is above the threshold, the read-out turns the hidden state
into logits, and the token leaves; the fill (`decode.fills`) decides what the skipped blocks remember of it. Otherwise the
token runs the next segment, in one chunk with all tokens that wait at this exit.

Climbs that are furthest behind run first. So sequences that go deep wait for each other, and share one pass over the
weights in compiled blocks. In the library's blocks, sequences take turns. Closed exits never let a token
leave and are left out, so full depth costs nothing extra.

This code is meant to be read. It runs with any runtime's blocks, exits of all kinds and any `choose`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.decode.climb import Climb
from offramp.decode.embedding import embed_all
from offramp.decode.leaving import leave
from offramp.decode.plan import Plan
from offramp.decode.request import Request
from offramp.decode.sequence import Decision


class Reference:
    """The `Stepper` in Python, for requests of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def step(
        self, reading: Sequence[tuple[Request, int]], deciding: Sequence[Request]
    ) -> list[tuple[Request, list[Decision]]]:
        """Read pieces of prompts, then decide at least one token of each request in `deciding`."""
        if reading:
            read(self.plan, reading)
        return decide(self.plan, deciding) if deciding else []


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


def decide(plan: Plan, requests: Sequence[Request]) -> list[tuple[Request, list[Decision]]]:
    """Let the requests' sequences climb until a token of each is decided. The climbs furthest behind run first."""
    decided: dict[Request, list[Decision]] = {}
    climbs = [set_out(plan, request) for request in requests]
    embed(plan, climbs)
    while (number := min((climb.segment for climb in climbs), default=plan.top)) < plan.top:
        here = [climb for climb in climbs if climb.segment == number]
        run_segment(plan, number, here)
        left = leave(plan, number, [climb for climb in here if climb.may_leave])
        climbs = [climb for climb in climbs if climb not in left and not climb.request.error]
        decided |= {climb.request: [decision] for climb, decision in left.items()}
        pass_exit(plan, number, [climb for climb in here if climb in climbs])
    run_segment(plan, plan.top, climbs)
    decided |= choose_at_top(plan, climbs)
    for request in decided:
        request.sequence.settle()
    return [(request, decided[request]) for request in requests if request in decided]


def set_out(plan: Plan, request: Request) -> Climb:
    """Start a climb of a sequence's newest token. Exits are asked unless too many tokens wait."""
    sequence = request.sequence
    return Climb(request, len(sequence.ids), may_leave=sequence.pending < plan.max_pending)


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


def choose_at_top(plan: Plan, climbs: list[Climb]) -> dict[Request, list[Decision]]:
    """Let full depth choose the next token of each climb, by its newest row: the rows before it only waited."""
    decided = {}
    for head in dict.fromkeys((plan.head, plan.whole_head)):
        those = [climb for climb in climbs if head is (plan.whole_head if climb.request.reads_all else plan.head)]
        hidden = [climb.hidden[:, -1:] for climb in those]
        for climb, logits in zip(those, plan.logits_of(head, hidden) if those else [], strict=True):
            with climb.request.own():
                plan.check_numbers(logits)
                climb.spend(head.flops)
                decided[climb.request] = [chosen_at_top(plan, climb, logits[0])]
    return decided


def chosen_at_top(plan: Plan, climb: Climb, logits: Tensor) -> Decision:
    """Full depth's next token by its logits (V,), which the sequence takes."""
    sequence = climb.sequence
    with plan.timed("sampling"):
        id = climb.request.choose(logits, sequence.ids)
    sequence.deep = climb.deep(-1)
    sequence.deep_passes += 1
    sequence.ids.append(id)
    return Decision(id, plan.backbone.n_blocks, None, climb.work, sequence.deep_passes)
