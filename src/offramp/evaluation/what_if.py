"""What exits and drafts would save if they agreed with full depth so often: `offramp inspect --what-if`.

One answer at a time, each token reads the weights of the blocks that run. Memory is what limits that on most machines, so a
token's time is taken as the bytes that it moves, divided by the bandwidth. A model's config is enough.

Exits. If exit i agrees with full depth on a share a_i of the tokens, a gate that makes no mistake lets a_1 of them leave at
the first exit, and max(0, a_i − max(a_1 … a_{i−1})) at each later one. That is a bound: no gate is so good.

Drafts. If draft j stands with probability a_j where those before it stood, n drafts give 1 + a_1 + a_1 a_2 + … tokens for
one chunk of n + 1 rows (Leviathan et al., arXiv 2211.17192). The chunk costs 1 + rows[n] steps of full depth, and a draft
costs `draft_bytes` / `full_bytes` of a step. The best n counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.decode.row_costs import costs_in_table
from offramp.errors import BadInput
from offramp.evaluation.anatomy import Anatomy
from offramp.model.compiled.library import MOST_DRAFTS

HINT = "For example: --what-if agreement=0.5,0.6,0.7 --what-if drafts=0.5 --what-if bandwidth=900"


@dataclass(frozen=True)
class Scenario:
    """What is assumed.

    agreement: the share of tokens on which each exit agrees with full depth. drafts: how often a first, second, … draft
    stands, where those before it stood; the last share holds for all later ones. bandwidth: GB/s, or None. rows: what each
    further row of a chunk costs, in steps of full depth; None: as in this machine's table (`decode.row_costs`).
    """

    agreement: tuple[float, ...]
    drafts: tuple[float, ...]
    bandwidth: float | None = None
    rows: float | None = None

    @classmethod
    def parse(cls, entries: Sequence[str]) -> Scenario:
        """Read NAME=NUMBERS entries. Raises `BadInput`."""
        given: dict[str, tuple[float, ...]] = {}
        for entry in entries:
            name, _, numbers = entry.partition("=")
            try:
                given[name] = tuple(map(float, numbers.split(",")))
            except ValueError:
                raise BadInput(f"--what-if {entry} is no name with numbers.", HINT) from None
        shares = [share for name in ("agreement", "drafts") for share in given.get(name, ())]
        if not shares or set(given) - {"agreement", "drafts", "bandwidth", "rows"}:
            raise BadInput("--what-if takes agreement, drafts, bandwidth and rows, and needs one of the first two.", HINT)
        one = {name: given[name][0] for name in ("bandwidth", "rows") if name in given}
        if any(not 0 <= share <= 1 for share in shares) or not one.get("bandwidth", 1) > 0 or not one.get("rows", 0) >= 0:
            raise BadInput("Shares are from 0 to 1, a bandwidth is above 0, and rows cost at least 0.", HINT)
        return cls(given.get("agreement", ()), given.get("drafts", ()), **one)


@dataclass(frozen=True)
class Saving:
    """What a token costs on average: bytes that it moves, and FLOPs; and how that comes about, in words.

    speed: how many times as fast as full depth. ms: milliseconds at the scenario's bandwidth, or None.
    """

    what: str
    bytes: float
    flops: float
    speed: float
    ms: float | None
    how: str


def what_if(facts: Anatomy, scenario: Scenario) -> list[Saving]:
    """Full depth, and what the scenario gives. Raises `BadInput` where it names more or fewer exits than there are."""
    whole = (facts.full_bytes, facts.full_flops)
    found = [_saving(facts, scenario, "full depth", *whole, "")]
    if scenario.agreement:
        found.append(_saving(facts, scenario, "exits", *_left(facts, scenario.agreement)))
    if scenario.drafts:
        found.append(_saving(facts, scenario, "verify", *_verified(facts, scenario)))
    return found


def _saving(facts: Anatomy, scenario: Scenario, what: str, moved: float, flops: float, how: str) -> Saving:
    ms = None if scenario.bandwidth is None else moved / scenario.bandwidth / 1e6
    return Saving(what, moved, flops, facts.full_bytes / moved, ms, how)


def _left(facts: Anatomy, agreement: Sequence[float]) -> tuple[float, float, str]:
    """Bytes, FLOPs, and where tokens leave."""
    *exits, stays = facts.leaving
    if len(agreement) == 1:
        agreement = [agreement[0]] * len(exits)
    if len(agreement) != len(exits):
        blocks = ", ".join(str(leaving.after_block) for leaving in exits)
        raise BadInput(f"The exits are after blocks {blocks}, and --what-if names {len(agreement)} shares.", HINT)
    best, shares = 0.0, []
    for share in agreement:
        shares.append(max(0.0, share - best))
        best = max(best, share)
    rows = [*zip(exits, shares, strict=True), (stays, 1 - best)]
    how = ", ".join(f"{share:.0%} leave after block {leaving.after_block}" for leaving, share in rows[:-1] if share)
    return sum(row.bytes * share for row, share in rows), sum(row.flops * share for row, share in rows), how


def _verified(facts: Anatomy, scenario: Scenario) -> tuple[float, float, str]:
    """Bytes (a dearer chunk counts as more of them), FLOPs, and how many drafts are made, at the best number of drafts."""
    table = costs_in_table(facts.precision, facts.full_bytes)
    tokens = chance = 1.0
    found = [(float(facts.full_bytes), float(facts.full_flops), "no drafts")]
    for count in range(1, MOST_DRAFTS + 1):
        chance *= scenario.drafts[min(count, len(scenario.drafts)) - 1]
        tokens += chance
        rows = table[count] if scenario.rows is None else count * scenario.rows
        moved = facts.full_bytes * (1 + rows) + count * facts.draft_bytes
        flops = (count + 1) * facts.full_flops + count * facts.draft_flops
        found.append((moved / tokens, flops / tokens, f"{count} draft{'s' * (count > 1)}, {tokens:.2f} tokens a pass"))
    return min(found)
