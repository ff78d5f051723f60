"""What drafts cost, and how often they are right: the numbers of a model and its exits that core/drafts.c decides by.

Drafts are made and checked in C alone. A draft comes from an exit, or for nothing from the text, where it repeats itself
(prompt look-up: A. Saxena, "Prompt Lookup Decoding", 2023), or from a table of n-grams. Costs are in steps of full depth:
passes of one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offramp.errors import CorruptFile
from offramp.exits.exits import Exit, Exits
from offramp.exits.ngrams import Ngrams
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import DEPTHS


@dataclass(frozen=True)
class DraftRule:
    """The costs and the table of the drafts of one plan.

    `rows`: the cost of 0, 1, … more rows of a pass; `asking`: that of asking each open exit; `ngrams`: the table, if there
    is one. `accepted`: the shares of an exit's first, second and later drafts that were right in its training, `DEPTHS` of
    them (0: unknown).
    """

    rows: tuple[float, ...]
    asking: tuple[float, ...] = ()
    ngrams: Ngrams | None = None
    accepted: tuple[float, ...] = (0.0,) * DEPTHS


def accepted_by(exits: Exits, exit: Exit, with_table: bool = False) -> tuple[float, ...]:
    """The shares of the exit's first, second and later drafts that were right on held-out text, by its training's record.

    `with_table`: of the exit's and the table's, where the record has them. 0 if the record does not say. Raises
    `CorruptFile` for a damaged record.
    """
    try:
        held: dict[str, Any] = next((row for row in exits.validation if row["block"] == exit.block), {})
        own = held.get("acceptance") or ([held["agreement"]] if held else [])
        known = (held.get("with_table") if with_table else None) or own
        shares = [float(share) for share in known]
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"shares of {shares}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # a stranger's record may hold anything
        raise CorruptFile(f"The exits' record of their training is damaged: {error!r}.", "Train them again.") from error
    return tuple(shares + (shares[-1:] or [0.0]) * (DEPTHS - len(shares)))[:DEPTHS]


def asking_cost(backbone: Backbone, exit: Exit, head: int) -> float:
    """The bytes that are read to ask an exit, as a share of those of a step of full depth.

    Counted are the blocks before the exit, its tail, its read-out and the head. As in compiled code, an entry of the last
    two takes 4 bytes with float32 weights, half a byte with 4-bit ones, else 1.
    """
    runtime = backbone.runtime
    entry = {"float32": 4.0, "int4": 0.5}.get(backbone.precision, 1.0)
    blocks = [*range(exit.block), *range(backbone.n_blocks - exit.tail, backbone.n_blocks)]
    asked = sum(map(runtime.block_bytes, blocks)) + entry * (exit.adapter.flops() + head) / 2
    return asked / backbone.step_bytes
