"""Policies by precision: at each exit, the thresholds above which a given share of the tokens that leave are right.

A threshold means something else at each exit, and for each gate. A precision means the same everywhere. So a calibration
goes along a line of precisions. If the fill is approximate, the later tokens that a token changes also count as wrong
(`Evidence.worth`). For each precision, every exit gets the rule that saves most among those that reach it on labelled text:

- the gate alone: a token leaves above a threshold;
- the gate and the second key: above a lower threshold the exit reads out, and the token leaves if the read-out's own
  confidence is above the key. This leaves fewer wrong tokens, and costs a read-out for each token that then stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from offramp.exits.exits import Exit, Exits
from offramp.exits.policy import Policy
from offramp.model.costs import Costs
from offramp.training.validation import Evidence, lowest

CONTEXT = 128  # context, in tokens, for the costs that decide between the rules
# Shares of the tokens that may be asked for the second key. The best is often a few percent.
ASKED = (0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.27, 0.33, 0.4, 0.5, 0.65, 0.8)
# If the next lower precision saves more than twice as much, policies that let only these shares of its tokens leave come
# first.
SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Rule:
    """When a token leaves at one exit, as `Policy` has it, and the FLOPs saved for a mean token."""

    threshold: float = 1.0
    perhaps: float = 1.0
    key: float = 1.0
    saved: float = 0.0


def rule(known: Evidence, precision: float, gain: float, price: float) -> Rule:
    """The rule that reaches the precision and saves most.

    `gain`: FLOPs saved by a token that leaves; `price`: FLOPs of a read-out that then keeps the token.
    """
    best = Rule()
    tokens = len(known.agrees)
    if not tokens:
        return best
    threshold, leaving = lowest(known.gate, known.worth, precision)
    if leaving:
        best = Rule(threshold=threshold, saved=gain * leaving / tokens)
    for perhaps in [0.0, *torch.quantile(known.gate.float(), 1 - torch.tensor(ASKED)).tolist()]:
        asked = known.gate > perhaps
        key, leaving = lowest(known.key[asked], known.worth[asked], precision)
        saved = (gain * leaving - price * (int(asked.sum()) - leaving)) / tokens
        if leaving and saved > best.saved:
            best = Rule(perhaps=perhaps, key=key, saved=saved)
    return best


def narrowed(wide: Rule, known: Evidence, share: float) -> Rule:
    """A rule for about this share of the tokens that leave by the `wide` rule: those with the highest gate.

    Its saving is assumed to be the same share.
    """
    leaving = (known.gate > wide.threshold) | ((known.gate > wide.perhaps) & (known.key > wide.key))
    if not leaving.any():
        return wide
    bound, saved = float(known.gate[leaving].double().quantile(1 - share)), share * wide.saved
    return replace(wide, perhaps=bound, saved=saved) if wide.key < 1 else replace(wide, threshold=bound, saved=saved)


def saved(exits: Exits, shown: list[Evidence], costs: Costs, precision: float) -> float:
    """The sum of the FLOPs that each exit by itself saves for a mean token at this precision."""
    return sum(_rule_at(exits, exit, known, costs, precision, 0, 0).saved for exit, known in zip(exits, shown, strict=True))


def policies(
    exits: Exits, known: list[Evidence], costs: Costs, precisions: Sequence[float], candidates: int, at_exits: int
) -> list[Policy]:
    """A policy for each precision; `candidates` and `at_exits` are the policies' `candidates` and `exit_candidates`.

    A precision that opens no exit is left out, and so is a policy that equals the one before. Before a wide step come
    narrower policies (`SHARES`).
    """
    steps: list[list[Rule]] = []
    before = 0.0
    for precision in precisions:
        rules = [
            _rule_at(exits, exit, tokens, costs, precision, candidates, at_exits)
            for exit, tokens in zip(exits, known, strict=True)
        ]
        saved = sum(each.saved for each in rules)
        if saved > 2 * before:
            pairs = list(zip(rules, known, strict=True))
            steps += [[narrowed(each, tokens, share) for each, tokens in pairs] for share in SHARES]
        steps.append(rules)
        before = saved
    found: list[Policy] = []
    for rules in steps:
        policy = Policy(
            tuple(each.threshold for each in rules),
            candidates=candidates,
            exit_candidates=at_exits,
            perhaps=tuple(each.perhaps for each in rules),
            keys=tuple(each.key for each in rules),
        )
        if any(map(policy.opens, range(len(exits)))) and policy not in found:
            found.append(policy)
    return found


def _rule_at(
    exits: Exits, exit: Exit, known: Evidence, costs: Costs, precision: float, candidates: int, at_exits: int
) -> Rule:
    """The rule of one exit, with its own gain and price."""
    price = _read_out(exits, exit, costs, at_exits or candidates)
    return rule(known, precision, _skipped(exit, costs) + _head(exits, costs, candidates) - price, price)


def _skipped(exit: Exit, costs: Costs) -> int:
    """FLOPs of the blocks after an exit, without the `project` fill of those that a token skips."""
    filled = costs.projected(range(exit.block, costs.n_blocks - exit.tail))
    return costs.blocks(exit.block, costs.n_blocks, CONTEXT) - filled


def _read_out(exits: Exits, exit: Exit, costs: Costs, candidates: int) -> int:
    """FLOPs of an exit's adapter, tail and head."""
    tail = costs.blocks(costs.n_blocks - exit.tail, costs.n_blocks, CONTEXT)
    return exit.adapter.flops() + tail + _head(exits, costs, candidates)


def _head(exits: Exits, costs: Costs, candidates: int) -> int:
    if exits.sketch is None or not candidates:
        return costs.head
    return costs.sketched(len(exits.sketch[0]), candidates)
