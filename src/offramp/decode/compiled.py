"""The compiled stepper: any number of requests in one call of the C library (core/step.c).

It serves plans whose blocks, gates and read-outs are all compiled, and requests that choose by `Sampling`, perhaps within a
grammar. `decode.reference` serves the others. Both follow the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from offramp.decode.plan import Plan
from offramp.decode.request import Request
from offramp.decode.sampling import sampler_of
from offramp.decode.sequence import SOURCES, Decision, Work
from offramp.decode.timing import Timer
from offramp.errors import NothingFits
from offramp.exits import gates, readouts
from offramp.exits.exits import Exit
from offramp.exits.ngrams import LONGEST_CONTEXT, SHORTEST_CONTEXT
from offramp.model.compiled.formats import Int4
from offramp.model.compiled.library import DEPTHS, MOST_DRAFTS, CompiledPart, constant
from offramp.model.compiled.runtime import Compiled
from offramp.model.compiled.session import Session
from offramp.model.compiled.steps import MOST_ROUNDS, PARTS, CompiledPlan, ExitRules, Lane, Rules, known
from offramp.model.compiled.weights import Int8, Weight

# The work of one call. Its weights in float32 are 4.4 GB, which take less than 0.1 s at 50 GB/s: a new request waits no
# longer than that. Larger models decide few tokens in a call.
BURST_FLOPS = 2_200_000_000


class CompiledStepper:
    """The `Stepper` in C, for requests of one plan."""

    def __init__(self, plan: Plan, compiled: CompiledPlan, keeps_deep: bool) -> None:
        self._plan, self._compiled, self._keeps_deep = plan, compiled, keeps_deep
        self.rules = compiled.rules
        self._burst = max(1, min(MOST_ROUNDS, BURST_FLOPS // plan.costs.full(1)))
        self._lanes: WeakKeyDictionary[Request, Lane] = WeakKeyDictionary()

    @classmethod
    def of(cls, plan: Plan) -> CompiledStepper | None:
        """The stepper of a plan; None if a part of it cannot be compiled."""
        runtime: object = plan.backbone.runtime
        if not isinstance(runtime, Compiled):
            return None
        if not all(map(known, (plan.fill.name, plan.policy.confidence, plan.policy.key))):
            return None
        found = [_exit_rules(plan, runtime, exit, index, number) for number, (exit, index) in enumerate(plan.open_exits)]
        rules = [each for each in found if each]
        if len(rules) < len(found):
            return None
        return cls(plan, runtime.plan(_rules(plan, runtime, rules)), bool(rules))

    def step(
        self, reading: Sequence[tuple[Request, int]], deciding: Sequence[Request]
    ) -> list[tuple[Request, list[Decision]]]:
        """`Stepper.step`, in one call."""
        asked: list[tuple[Request, Lane]] = []
        for request, end in reading:
            asked.append((request, self._lane(request)))
            asked[-1][1].read(request.sequence.run, end)
        alone = bool(reading)
        for request in deciding:
            with request.own():
                allowed = self._allowed(request)
                asked.append((request, self._lane(request)))
                asked[-1][1].decide(request.sequence.run, request.remaining, allowed)
                alone |= bool(allowed is not None or request.detokenizer.stops or self._waits_for_first(request))
        if not asked:
            return []
        seconds = self._compiled.step([lane for _, lane in asked], 1 if alone else self._rounds(len(deciding)))
        if isinstance(self._plan.timed, Timer):
            for part, spent in zip(PARTS, seconds, strict=True):
                if spent:
                    self._plan.timed.add(part, spent)
        return [(request, decisions) for request, lane in asked if (decisions := self._heard(request, lane))]

    def _rounds(self, requests: int) -> int:
        """The most passes of a call: with drafts, each gives about two tokens."""
        return max(1, self._burst // (requests * (2 if self._plan.drafts else 1)))

    def _waits_for_first(self, request: Request) -> bool:
        """Whether a request waits for the first token of a large model. Then a call decides only this token."""
        return not request.tokens and self._burst < MOST_ROUNDS

    def _lane(self, request: Request) -> Lane:
        lane = self._lanes.get(request)
        if lane is None:
            sequence, sampler = request.sequence, sampler_of(request.choose)
            assert sampler
            assert isinstance(sequence.state, Session)
            lane = Lane(
                sequence.state, sequence.ids, sequence.prompt, request.remaining, sampler, request.ends, request.reads_all,
            )  # fmt: skip
            if self._keeps_deep:
                sequence.deep = self._deep(sequence.deep)
                lane.keep_deep(sequence.deep)
            self._lanes[request] = lane
        return lane

    def _deep(self, known: Tensor | None) -> Tensor:
        """Deep states (1, 1, D), or (1, 1, 2 D) with a middle one: those that are known, and then zeros."""
        deep = torch.zeros(1, 1, self._plan.backbone.hidden_size * (2 if self._plan.middle else 1))
        if known is not None:
            deep[..., : known.shape[-1]] = known
        return deep

    def _allowed(self, request: Request) -> np.ndarray | None:
        """The bits of the tokens that a request's grammar allows next."""
        grammar: Any = request.choose
        if not hasattr(grammar, "allowed"):
            return None
        given: np.ndarray = grammar.allowed(request.sequence.ids)
        words = np.zeros((self._plan.backbone.vocab_size + 31) // 32, np.uint32)
        words[: len(given)] = given[: len(words)]
        return words

    def _heard(self, request: Request, lane: Lane) -> list[Decision]:
        """Copy a call's results to a request. Returns its decisions."""
        sequence, failed = request.sequence, lane.given.failed
        passes, rejected = sequence.deep_passes, sequence.rejected
        decisions = [
            Decision(
                d.id,
                d.block,
                None if d.confidence != d.confidence else d.confidence,
                Work(d.flops, d.blocks),
                passes + d.passes,
                rejected + d.rejected,
                SOURCES[d.source],
            )
            for d in lane.decided()
        ]
        sequence.run = lane.given.run
        sequence.ids += [decision.id for decision in decisions]
        if decisions:
            sequence.deep_passes, sequence.rejected = decisions[-1].deep_passes, decisions[-1].rejected
        if failed == constant("OFFRAMP_NOT_FINITE"):
            request.fail(self._plan.backbone.bad_numbers())
        elif failed:
            request.fail(NothingFits("No token of the model fits the schema here.", "Make the schema simpler."))
        return [] if failed else decisions


def _exit_rules(plan: Plan, runtime: Compiled, exit: Exit, index: int, number: int) -> ExitRules | None:
    """The rules of an open exit, which has `number` exits before it; None if its parts cannot be compiled."""
    policy, plain = plan.policy, plan.backbone.precision == "float32"
    dtype = torch.float32 if plain else torch.bfloat16
    gate = gates.compiled(exit.gate, dtype) if policy.confidence == "gate" else None
    readout = readouts.compiled(exit.adapter, _draft_weight(plan, runtime), dtype)
    if readout is None or (gate is None and policy.confidence == "gate"):
        return None
    has_key = policy.has_key(index)
    return ExitRules(
        exit.block, exit.tail, gate, readout, policy.thresholds[index],
        policy.perhaps[index] if has_key else 1.0, policy.keys[index] if has_key else 1.0,
        plan.drafts.asking[number] if plan.drafts else 0.0, exit.gate.flops(), exit.adapter.flops(),
    )  # fmt: skip


def _draft_weight(plan: Plan, runtime: Compiled) -> type[Weight]:
    """The format of read-outs. A draft may be rougher than a decision."""
    if not plan.fill.verifies or plan.backbone.precision == "float32":
        return Weight
    return Int4 if plan.backbone.precision == "int4" else Int8


def _rules(plan: Plan, runtime: Compiled, open_exits: list[ExitRules]) -> Rules:
    policy, costs, exits = plan.policy, plan.costs, plan.exits
    sketch = exits.sketch if exits else None
    at_top = policy.candidates if sketch and not plan.fill.verifies else 0
    shortlist, guesses = exits.shortlist if exits else None, plan.drafts.ngrams if plan.drafts else None
    at_exits = 0 if shortlist is not None else policy.exit_candidates or at_top
    listed = None
    if shortlist is not None:
        kind = _draft_weight(plan, runtime)
        picked = runtime.head.pick(shortlist)
        head = picked if kind is Weight or runtime.head.columns % 32 else kind.of(picked.dense())
        listed = CompiledPart("shortlist", head=head, tokens=shortlist.long().contiguous())
    table = None
    if guesses:
        table = CompiledPart(
            "guesses", keys=guesses.keys, values=guesses.values, shortest=SHORTEST_CONTEXT, longest=LONGEST_CONTEXT
        )
    return Rules(
        exits=open_exits,
        fill=plan.fill.name,
        confidence=policy.confidence,
        key=policy.key if policy.keys else "max-prob",
        middle=plan.middle,
        pending=plan.max_pending,
        alike=plan.lookup,
        decay=policy.decay,
        sketch=runtime.sketch(*sketch, at_top) if sketch and at_top else None,
        exit_sketch=runtime.sketch(*sketch, at_exits) if sketch and at_exits and open_exits else None,
        shortlist=listed,
        guesses=table,
        costs=[costs.of_block(index) for index in range(costs.n_blocks)],
        head_flops=plan.head.flops,
        exit_head_flops=plan.exit_head.flops,
        row_costs=plan.drafts.rows if plan.drafts else (0.0,) * (MOST_DRAFTS + 1),
        accepted=plan.drafts.accepted if plan.drafts else (0.0,) * DEPTHS,
    )
