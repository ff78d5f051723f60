"""Plans and steps of the C library: several requests decoded in one call (core/offramp.h, "Exits" and "Decoding")."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_double, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from offramp.model.compiled.library import (
    MOST_DRAFTS,
    CBlockCosts,
    CDecision,
    CExit,
    CompiledPart,
    CRequest,
    CRules,
    CSampling,
    Model,
    Owned,
    Settings,
    call,
    constant,
)
from offramp.model.compiled.session import Session

MOST_ROUNDS = 16  # of a call
MOST_LANES = 1024  # of a call: requests that it steps
PARTS = ("blocks", "exits", "heads", "steps")  # what the seconds of a step are spent on


@dataclass(frozen=True)
class ExitRules:
    """`offramp_exit`: `after` blocks run before the exit, and the last `tail` ones after its read-out."""

    after: int
    tail: int
    gate: CompiledPart | None
    readout: CompiledPart
    threshold: float
    perhaps: float
    key: float
    asking: float
    gate_flops: int
    readout_flops: int


@dataclass(frozen=True)
class Rules:
    """`offramp_rules`. `costs`: for each block its FLOPs, those for each position seen, and those of a fill's parts."""

    exits: Sequence[ExitRules]
    fill: str
    confidence: str
    key: str
    middle: int
    pending: int
    alike: int
    decay: float
    sketch: CompiledPart | None
    exit_sketch: CompiledPart | None
    shortlist: CompiledPart | None
    guesses: CompiledPart | None
    costs: Sequence[tuple[int, int, int, int]]
    head_flops: int
    exit_head_flops: int
    row_costs: Sequence[float]
    accepted: Sequence[float]


class Lane:
    """A request to the library: a text and its session. What it holds stays at its place between calls."""

    def __init__(
        self,
        session: Session,
        ids: Sequence[int],
        prompt: int,
        most: int,
        settings: Settings,
        ends: Tensor,
        whole: bool,
    ) -> None:
        """`prompt`: how many of the ids are not the answer's; `most`: the tokens that may be decided in all; `ends` (n,):
        those that end the text, int64.
        """
        self._session, self._ends = session, ends
        self._ids = (c_int64 * (len(ids) + most + 1))(*ids)
        self._decisions = (CDecision * min(most, MOST_ROUNDS * (MOST_DRAFTS + 1)))()
        self._allowed = np.zeros(0, np.uint32)
        self.given = CRequest(
            ids=addressof(self._ids), known=len(ids), prompt=prompt, ends=ends.data_ptr(), ends_count=len(ends),
            how=CSampling.of(settings), whole=whole, decisions=addressof(self._decisions),
        )  # fmt: skip

    def keep_deep(self, deep: Tensor) -> None:
        """Let the library keep the deep states (2 D,) there."""
        self._deep = deep
        self.given.deep = deep.data_ptr()

    def read(self, run: int, end: int) -> None:
        """Ask for reading up to position `end`."""
        self.given.run, self.given.reads = run, end - run

    def decide(self, run: int, most: int, allowed: np.ndarray | None = None) -> None:
        """Ask for at most `most` tokens. `allowed` has a bit for each token that may come next, in words of uint32."""
        self.given.run, self.given.reads, self.given.most, self.given.allowed = run, 0, most, None
        if allowed is not None:
            self._allowed = allowed
            self.given.allowed = allowed.ctypes.data

    def decided(self) -> list[CDecision]:
        """What the last call decided, until the next call."""
        self.given.known += self.given.decided
        found: list[CDecision] = self._decisions[: self.given.decided]
        return found

    def set_out(self, plan: CompiledPlan) -> CRequest:
        """The request as the library takes it now, for a step of this plan."""
        self.given.session, self._session.plan = self._session.pointer, plan
        return self.given


class CompiledPlan(Owned):
    """`offramp_plan`: a model with its rules."""

    def __init__(self, model: Model, rules: Rules) -> None:
        """Raises `ValueError` for rules that do not fit the model."""
        self._model, self.rules = model, rules  # they hold the parts
        exits = (CExit * len(rules.exits))(*map(_exit, rules.exits))
        costs = (CBlockCosts * len(rules.costs))(*(CBlockCosts(*each) for each in rules.costs))
        parts = (part and part.pointer for part in (rules.sketch, rules.exit_sketch, rules.shortlist, rules.guesses))
        names = (rules.fill, rules.confidence, rules.key)
        given = CRules(
            addressof(exits), len(exits), *map(number_of, names), rules.middle, rules.pending, rules.alike, rules.decay,
            *parts, addressof(costs), rules.head_flops, rules.exit_head_flops, tuple(rules.row_costs),
            tuple(rules.accepted),
        )  # fmt: skip
        super().__init__(call("offramp_plan_new", model.pointer, byref(given)), "offramp_plan_free")

    def step(self, lanes: Sequence[Lane], rounds: int) -> list[float]:
        """Step requests, in `rounds` passes to the top at most. Returns the seconds spent on each of `PARTS`."""
        spent, seconds = [0.0] * len(PARTS), (c_double * len(PARTS))()
        self._model.use_threads()
        for start in range(0, len(lanes), MOST_LANES):
            some = [addressof(lane.set_out(self)) for lane in lanes[start : start + MOST_LANES]]
            requests = (c_void_p * len(some))(*some)
            call("offramp_step", self.pointer, addressof(requests), len(some), rounds, addressof(seconds))
            spent = [total + more for total, more in zip(spent, seconds, strict=True)]
        return spent


def known(name: str) -> bool:
    """Whether the library knows a fill or a confidence of this name."""
    return number_of(name) >= 0


def number_of(name: str) -> int:
    """The library's number of a fill or a confidence; -1 for an unknown one."""
    return constant(f"OFFRAMP_{name.upper().replace('-', '_')}")


def _exit(exit: ExitRules) -> CExit:
    gate = exit.gate and exit.gate.pointer
    policy = exit.threshold, exit.perhaps, exit.key, exit.asking
    return CExit(exit.after, exit.tail, gate, exit.readout.pointer, *policy, exit.gate_flops, exit.readout_flops)
