"""Asking an exit: which tokens leave there, and with which next token.

The gate reads the hidden state at the exit. Where it is sure, or where it says "perhaps" and there is a second key, the
read-out runs: the adapter, then the exit's tail if it has one, then the head. With a second key, or with a confidence that
needs no gate, the logits decide. What the tail's blocks remember of a token that then stays is taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from offramp.decode.climb import Climb
from offramp.decode.plan import MOST_AHEAD, Plan
from offramp.decode.request import Request
from offramp.decode.sampling import Greedy
from offramp.decode.sequence import Decision, Sequence, Work
from offramp.decode.timing import Timer
from offramp.errors import NothingFits
from offramp.exits.policy import PATIENCE, TRAINING_FREE
from offramp.model.compiled.library import MOST_DRAFTS
from offramp.model.compiled.steps import Ask, Steps

LOOKED_BACK = 1024  # tokens of a text in which compiled code looks up what followed the last ones


@dataclass(frozen=True, eq=False)
class ReadOut:
    """An exit's output for a climb's newest token: logits (1, V), or over the short list.

    `h` (1, 1, D) is the state that they were read from: the adapter's output, or that of the tail if there is one.
    """

    climb: Climb
    logits: Tensor
    h: Tensor


@dataclass(frozen=True)
class Pass:
    """One pass to the top: the tokens decided by it, and how many drafts it rejected."""

    decisions: list[Decision]
    rejected: int


def leave(plan: Plan, number: int, climbs: list[Climb]) -> dict[Climb, Decision]:
    """The climbs that end at this exit, each with the next token that the exit chose."""
    decisions = {}
    may_leave = [climb for climb in climbs if climb.may_leave and climb.h is not None]
    for readout, confidence in _sure(plan, number, may_leave):
        with readout.climb.request.own():
            try:
                decisions[readout.climb] = _left(plan, number, readout, confidence)
            except NothingFits:  # full depth reads out more tokens
                _stay(plan, number, readout.climb)
    return decisions


def _left(plan: Plan, number: int, readout: ReadOut, confidence: float) -> Decision:
    """Let a climb leave at an exit, with the next token that the exit chooses. Raises `NothingFits` before it has left."""
    climb, sequence = readout.climb, readout.climb.sequence
    exit = sequence.exits[number]
    with plan.timed("sampling"):
        id = climb.request.choose(plan.exit_head.over_vocabulary(readout.logits)[-1], sequence.ids)
    with plan.timed("fill"):
        _watch_tails(plan, climb)
        plan.fill.leave(exit, climb.part)
    climb.spend(plan.fill.flops(exit.exit, plan.costs))
    sequence.ids.append(id)
    known = sequence.deep
    own = [readout.h] if known is None else [readout.h, known[..., readout.h.shape[-1] :].to(readout.h.dtype)]
    sequence.deep = torch.cat(own, dim=-1)
    return Decision(id, exit.block, confidence, climb.work)


def _stay(plan: Plan, number: int, climb: Climb) -> None:
    """Take back what an exit's tail remembers of a token that then stays."""
    tail = climb.sequence.exits[number].tail
    if tail:
        climb.sequence.state.take_back(plan.backbone.n_blocks - tail)


def runs_on(plan: Plan, climb: Climb) -> bool:
    """Whether a climb can run on through several exits: it has one token, and none waits at an exit on its way."""
    ahead = climb.sequence.exits[climb.segment :]
    alone = climb.h is not None and climb.h.shape[1] == 1 and not any(exit.pending for exit in ahead)
    return bool(plan.gating and ahead and climb.may_leave and alone)


def run_on(plan: Plan, climb: Climb) -> None:
    """Let a climb run up to the first exit whose gate is sure enough to leave or to read out, or else to the top."""
    assert plan.gating
    numbers, start = range(climb.segment, plan.top), plan.segments[climb.segment].start
    lowest = [_lowest(plan, climb.request, number) for number in numbers]
    climb.make_room(start, plan.backbone.n_blocks, plan.first_tail)
    with plan.timed("blocks"):
        climb.h, reached, said = plan.gating.run(climb.part, start, lowest)
    climb.work = climb.work.plus(plan.work(start, reached, 1, climb.end))
    _hear(plan, climb, reached, lowest, said)


def runs_ahead(plan: Plan, request: Request) -> bool:
    """Whether several tokens of a request can be decided in one call: greedy ones, of full depth or drafted."""
    sequence = request.sequence
    alone = sequence.run + 1 == len(sequence.ids) and not (sequence.pending or sequence.drafts or sequence.watched)
    runtime: object = plan.backbone.runtime
    ready = plan.ahead is not None and plan.ahead[0] is runtime
    return ready and alone and isinstance(request.choose, Greedy)


def run_ahead(plan: Plan, request: Request) -> tuple[list[Pass], Climb | None]:
    """Decide tokens in one call, up to one that ends the text, or that an exit's gate may let leave.

    Returns the passes to the top, and the climb of the token at such an exit. One token is decided at a time where
    thresholds decay, and at first if the model is not small, so that it comes soon. One pass is made where a stop string
    may end the text.
    """
    assert plan.ahead
    sequence = request.sequence
    runtime, sketch, burst = plan.ahead
    lowest = [] if plan.drafting else [_lowest(plan, request, number) for number in range(plan.top)]
    first = not request.tokens and burst < MOST_AHEAD
    one_by_one = request.detokenizer.stops or plan.policy.decay or first
    enough = min(request.remaining, 1 if one_by_one else burst)
    most = enough if first or not plan.drafting else min(request.remaining, enough + MOST_DRAFTS)
    asked = plan.gating.asked(lowest, most) if plan.gating else None
    drafter = plan.drafting.part if plan.drafting else None
    assert isinstance(request.choose, Greedy)
    penalty = request.choose.repetition_penalty
    ids = sequence.ids if penalty != 1 else sequence.ids[-LOOKED_BACK if drafter else -1 :]
    ask = Ask(ids, enough, most, request.ends, sketch, asked, sequence.deep, drafter, penalty)
    steps = runtime.take_steps(ask, sequence.state)
    if isinstance(plan.timed, Timer):
        for part, seconds in zip(("embedding", "blocks", "heads", "sampling", "exits"), steps.seconds, strict=True):
            if seconds:
                plan.timed.add(part, seconds)
    if -1 in steps.ids:
        raise plan.bad_numbers()
    passes = _passes(plan, steps, sequence, sum(_gate_flops(sequence, lowest)))
    if steps.ids:
        sequence.deep = steps.deep
        for follower in sequence.followers:
            follower.pass_by(len(steps.ids))
    sequence.ids += steps.ids
    sequence.run += len(steps.ids)
    if not steps.run:
        return passes, None
    assert plan.gating
    assert asked
    sequence.run += 1
    end = sequence.run
    climb = Climb(request, end, may_leave=True, h=steps.h, step=plan.backbone.step(steps.h, end - 1))
    climb.work = plan.work(0, steps.run, 1, end)
    _hear(plan, climb, steps.run, lowest, plan.gating.said(asked, steps.run, len(steps.ids)))
    return passes, climb


def _gate_flops(sequence: Sequence, lowest: list[float]) -> list[int]:
    """FLOPs of the gates that a token of full depth asks."""
    gates = zip(sequence.exits, lowest, strict=False)
    return [exit.gate.flops_per_token for exit, least in gates if least > 0]


def _passes(plan: Plan, steps: Steps, sequence: Sequence, gate_flops: int) -> list[Pass]:
    """The passes of compiled steps that go on from where a sequence ends, each with its decisions and their work.

    A round's work is that of its last token: what ran up to the exit for each of its rows, the drafts, and the chunk.
    """
    depth, drafting = plan.backbone.n_blocks, plan.drafting
    passes, first = [], 0
    for made in steps.rounds:
        stood, end = len(made.sure), sequence.run + first + made.rows
        ids = steps.ids[first : first + stood + 1]
        work = plan.work(0, depth, made.rows, end).plus(Work(made.rows * plan.head.flops + gate_flops))
        if drafting and made.asked:
            exit = sequence.exits[0]
            tails = plan.work(depth - exit.tail, depth, made.asked, end)
            work = work.plus(tails, Work(made.asked * (exit.readout.flops_per_token + plan.exit_head.flops)))
        drafts = [
            Decision(id, 0 if sure is None else plan.segments[0].stop, sure)
            for id, sure in zip(ids, made.sure, strict=False)
        ]
        passes.append(Pass([*drafts, Decision(ids[-1], depth, None, work)], made.drafts - stood))
        first += stood + 1
    return passes


def _hear(plan: Plan, climb: Climb, reached: int, lowest: list[float], said: list[tuple[Tensor, float]]) -> None:
    """Note what gates on a climb's way said; it is then at the exit that stopped it, or at the top."""
    first = plan.top - len(lowest)
    climb.segment = plan.top
    for number, (h, confidence) in enumerate(said, first):
        exit = climb.sequence.exits[number]
        exit.see(h, climb.sequence.deep)
        if lowest[number - first] > 0:
            climb.spend(exit.gate.flops_per_token)
            climb.gates[number] = confidence
        if exit.block == reached:
            climb.segment = number


def _sure(plan: Plan, number: int, climbs: list[Climb]) -> list[tuple[ReadOut, float]]:
    """Read-outs and confidences of the newest tokens that leave at this exit. The others' tails are taken back."""
    policy = plan.policy
    confidences: dict[Climb, float] = {}
    kind, key_threshold = policy.confidence, policy.threshold
    if kind == "gate":
        climbs = [climb for climb in climbs if _ask_gate(plan, climb, number, confidences)]
        kind, key_threshold = policy.key, policy.key_threshold
    leaving = []
    for readout in _read_out(plan, number, climbs):
        climb = readout.climb
        with climb.request.own():
            plan.check_numbers(readout.logits)
            sure = climb in confidences and confidences[climb] > _threshold(plan, climb.request, number, policy.threshold)
            confidence = confidences[climb] if sure else _training_free(plan, kind, readout)
            if sure or confidence > _threshold(plan, climb.request, number, key_threshold):
                leaving.append((readout, confidence))
            else:
                _stay(plan, number, climb)
    return leaving


def _ask_gate(plan: Plan, climb: Climb, number: int, confidences: dict[Climb, float]) -> bool:
    """Note the gate's confidence. Returns whether the exit is to read out. A threshold of 0 asks no gate."""
    if not _threshold(plan, climb.request, number, plan.policy.threshold) > 0:
        confidences[climb] = 1.0
        return True
    if number in climb.gates:
        confidences[climb] = climb.gates[number]
    else:
        with plan.timed("exits"):
            confidences[climb] = _gate_says(plan, climb, number)
    return confidences[climb] > _lowest(plan, climb.request, number)


def _gate_says(plan: Plan, climb: Climb, number: int) -> float:
    """The confidence of the gate at an exit for a climb's newest token."""
    gate = climb.sequence.exits[number].gate
    if plan.gating:
        climb.spend(gate.flops_per_token)
        return plan.gating.ask(number, climb.hidden[:, -1:])
    score, flops = gate.read()
    climb.spend(flops)
    return float(score.sigmoid())


def _lowest(plan: Plan, request: Request, number: int) -> float:
    """What the gate's confidence must exceed, or the token goes on without a read-out."""
    index, policy = request.sequence.exits[number].index, plan.policy
    threshold = _threshold(plan, request, number, policy.threshold)
    return min(threshold, policy.perhaps[index]) if policy.has_key(index) else threshold


def _threshold(plan: Plan, request: Request, number: int, of: Callable[[int, int], float]) -> float:
    """The threshold at this exit. A draft stands only if all before it do, so their confidences raise the threshold."""
    sequence = request.sequence
    decided = len(sequence.ids) - sequence.prompt
    threshold = of(sequence.exits[number].index, decided)
    return threshold / math.prod(draft.confidence or 1.0 for draft in sequence.drafts)


def _read_out(plan: Plan, number: int, climbs: list[Climb]) -> list[ReadOut]:
    """The logits of the climbs' newest tokens at an exit, after the exit's tail if it has one."""
    if not climbs:
        return []
    head, adapted, dtype = plan.exit_head, [], plan.backbone.dtype
    with plan.timed("exits"):
        for climb in climbs:
            h, flops = climb.sequence.exits[number].readout.read()
            climb.spend(flops + head.flops)
            adapted.append(h)
    tail, tops = climbs[0].sequence.exits[number].tail, adapted
    if tail:
        tops = _run_tail(plan, tail, climbs, [h.to(dtype) for h in adapted])
    rows = plan.logits_of(head, [h.to(dtype) for h in tops])
    return [ReadOut(*parts) for parts in zip(climbs, rows, tops, strict=True)]


def _watch_tails(plan: Plan, climb: Climb) -> None:
    """Let the tails' blocks be able to forget what a token leaves there, if that may be necessary."""
    if plan.longest_tail and (plan.takes_back or climb.request.reads_all):
        climb.sequence.watch(plan.first_tail, plan.backbone.n_blocks)


def _run_tail(plan: Plan, tail: int, climbs: list[Climb], adapted: list[Tensor]) -> list[Tensor]:
    """The climbs' newest tokens, adapted (1, 1, D) each, through the model's last `tail` blocks."""
    stop = plan.backbone.n_blocks
    parts = []
    for climb, h in zip(climbs, adapted, strict=True):
        climb.work = climb.work.plus(plan.work(stop - tail, stop, 1, climb.end))
        _watch_tails(plan, climb)
        _, state, step = climb.part
        parts.append((h, state, step if step.tokens == 1 else plan.backbone.step(h, climb.end - 1)))
    with plan.timed("tails"):
        return plan.backbone.run_all(parts, stop - tail, stop)


def _training_free(plan: Plan, kind: str, readout: ReadOut) -> float:
    """A confidence that needs no gate, from the logits alone."""
    tops = readout.climb.tops
    if kind != PATIENCE:
        return float(TRAINING_FREE[kind](readout.logits[0]))
    tops.append(int(readout.logits[0].argmax()))
    agreeing = takewhile(tops[-1].__eq__, reversed(tops))
    return sum(1 for _ in agreeing) / len(plan.open_exits)
