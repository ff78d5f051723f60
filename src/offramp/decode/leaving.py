"""Leaving at an exit: which tokens leave, and which next token they get.

The gate reads the hidden state at the exit. Where it is sure, or where it says "perhaps" and there is a second key, the
read-out runs: the adapter, then the exit's tail if it has one, then the head. With a second key, or with a confidence that
needs no gate, the logits decide. If the token then stays, the tail's blocks forget it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from offramp.decode.climb import Climb
from offramp.decode.plan import Plan
from offramp.decode.sequence import Decision
from offramp.errors import NothingFits
from offramp.exits.policy import PATIENCE, TRAINING_FREE


@dataclass(frozen=True, eq=False)
class ReadOut:
    """An exit's output for a climb's newest token: logits (1, V), or over the short list.

    `h` (1, 1, D) is the state that they were read from: the adapter's output, or that of the tail if there is one.
    """

    climb: Climb
    logits: Tensor
    h: Tensor


def leave(plan: Plan, number: int, climbs: list[Climb]) -> dict[Climb, Decision]:
    """The climbs that end at this exit, each with the next token that the exit chose."""
    decisions = {}
    gates = {}  # what the gates said
    for climb in climbs:
        said = _gate_says(plan, number, climb) if plan.policy.confidence == "gate" else None
        if said is None or said > _lowest(plan, number, climb):
            gates[climb] = said
    for readout in _read_out(plan, number, [*gates]):
        climb = readout.climb
        with climb.request.own():
            plan.check_numbers(readout.logits)
            confidence, leaves = _confidence(plan, number, readout, gates[climb])
            id = _choice(plan, readout) if leaves else None
            if id is not None:
                decisions[climb] = _left(plan, number, readout, id, confidence)
            else:
                _stay(plan, number, climb)
    return decisions


def _gate_says(plan: Plan, number: int, climb: Climb) -> float:
    """The confidence of the gate at an exit for a climb's newest token. A threshold of 0 asks no gate."""
    if not _threshold(plan, number, climb, plan.policy.threshold) > 0:
        return 1.0
    with plan.timed("exits"):
        score, flops = climb.sequence.exits[number].gate.read()
    climb.spend(flops)
    return float(score.sigmoid())


def _lowest(plan: Plan, number: int, climb: Climb) -> float:
    """The gate's confidence must exceed this, or the token goes on without a read-out."""
    index, policy = climb.sequence.exits[number].index, plan.policy
    threshold = _threshold(plan, number, climb, policy.threshold)
    return min(threshold, policy.perhaps[index]) if policy.has_key(index) else threshold


def _threshold(plan: Plan, number: int, climb: Climb, of: Callable[[int, int], float]) -> float:
    """The threshold at this exit, for the newest token of the answer."""
    sequence = climb.sequence
    return of(sequence.exits[number].index, len(sequence.ids) - sequence.prompt)


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


def _watch_tails(plan: Plan, climb: Climb) -> None:
    """Make sure that the tails' blocks can forget the newest tokens, if that may be necessary."""
    if plan.longest_tail and (plan.takes_back or climb.request.reads_all):
        climb.sequence.watch(plan.first_tail, plan.backbone.n_blocks)


def _confidence(plan: Plan, number: int, readout: ReadOut, gate: float | None) -> tuple[float, bool]:
    """The exit's confidence in a climb's newest token, after the gate, and whether the token leaves by the policy."""
    climb, policy = readout.climb, plan.policy
    if gate is not None and gate > _threshold(plan, number, climb, policy.threshold):
        return gate, True
    kind, threshold = (policy.confidence, policy.threshold) if gate is None else (policy.key, policy.key_threshold)
    confidence = _training_free(plan, kind, readout)
    return confidence, confidence > _threshold(plan, number, climb, threshold)


def _training_free(plan: Plan, kind: str, readout: ReadOut) -> float:
    """A confidence that needs no gate, from the logits alone."""
    tops = readout.climb.tops
    if kind != PATIENCE:
        return float(TRAINING_FREE[kind](readout.logits[0]))
    tops.append(int(readout.logits[0].argmax()))
    agreeing = takewhile(tops[-1].__eq__, reversed(tops))
    return sum(1 for _ in agreeing) / len(plan.open_exits)


def _choice(plan: Plan, readout: ReadOut) -> int | None:
    """The next token that an exit chooses; None if no token fits. Full depth reads out more tokens."""
    request = readout.climb.request
    with plan.timed("sampling"):
        try:
            return request.choose(plan.exit_head.over_vocabulary(readout.logits)[-1], request.sequence.ids)
        except NothingFits:
            return None


def _left(plan: Plan, number: int, readout: ReadOut, id: int, confidence: float) -> Decision:
    """Let a climb leave at an exit, with the next token."""
    climb, sequence = readout.climb, readout.climb.sequence
    exit = sequence.exits[number]
    with plan.timed("fill"):
        _watch_tails(plan, climb)
        plan.fill.leave(exit, climb.part)
    climb.spend(plan.fill.flops(exit.exit, plan.costs))
    sequence.ids.append(id)
    size, known = readout.h.shape[-1], sequence.deep
    middle = readout.h.new_zeros(1, 1, size * bool(plan.middle)) if known is None else known[..., size:].to(readout.h.dtype)
    sequence.deep = torch.cat([readout.h, middle], dim=-1)
    return Decision(id, exit.block, confidence, climb.work, sequence.deep_passes, sequence.rejected, "exit")


def _stay(plan: Plan, number: int, climb: Climb) -> None:
    """Let an exit's tail forget a token that stays."""
    tail = climb.sequence.exits[number].tail
    if tail:
        climb.sequence.state.take_back(plan.backbone.n_blocks - tail)
