"""Compiled drafts: an exit that drafts runs in the same call as full depth, which decides about them (`asking.run_ahead`).

That needs the compiled path, one open exit with a deep read-out whose own probability decides, and greedy tokens. Elsewhere
`decode.batch` makes the drafts, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offramp.exits.exits import Exit, Exits
from offramp.exits.ngrams import LONGEST, SHORTEST
from offramp.exits.readouts import DeepAdapter
from offramp.model.backbone import Backbone
from offramp.model.lean.base import Lean
from offramp.model.lean.steps import DrafterParts
from offramp.model.lean.structures import MOST_DRAFTS, CDrafter, CNgrams
from offramp.model.lean.weights import Int8, Weight

# What one more row of a chunk costs, in steps of full depth. Where the processor multiplies bfloat16 and 8-bit integers.
ROW = {"float32": 0.4, "bfloat16": 0.08, "int8": 0.1, "int4": 0.14, "int4-head4": 0.14}


@dataclass(frozen=True)
class Drafting:
    """A compiled drafter. `block`: the number of blocks before the exit. The rest keeps alive what the C code points to."""

    block: int
    parts: DrafterParts
    compiled: CDrafter
    exits: Exits

    @classmethod
    def of(cls, backbone: Backbone, exit: Exit, exits: Exits, most: int, alike: int, floor: float) -> Drafting | None:
        """The drafter of one of the exits; None if it cannot be compiled. The rest is as in `DrafterParts`."""
        runtime, adapter = backbone.runtime, exit.adapter
        if not (isinstance(runtime, Lean) and isinstance(adapter, DeepAdapter)) or (
            exit.tail and "mamba" in backbone.kinds
        ):
            return None
        plain = runtime.weight_format == "float32" or backbone.hidden_size % 32 or adapter.down.in_features % 32
        kind = Weight if plain else Int8
        inward, constant, down = (part.float().contiguous() for part in adapter.maps())
        mean, spread = (part.float().contiguous() for part in (adapter.norm.mean, adapter.norm.spread))
        shortlist, ngrams = exits.shortlist, exits.ngrams
        rows = torch.arange(runtime.head.rows) if shortlist is None else shortlist
        table = None
        if ngrams is not None:
            table = CNgrams(ngrams.keys.data_ptr(), ngrams.values.data_ptr(), len(ngrams.keys) - 1, SHORTEST, LONGEST)
        weights = kind.of(inward, constant), kind.of(down), kind.of(runtime.head.pick(rows).dense())
        own = [*range(exit.block), *range(backbone.n_blocks - exit.tail, backbone.n_blocks)]
        asking = sum(weight.nbytes for weight in weights) + sum(map(runtime.block_bytes, own))
        step = sum(map(runtime.block_bytes, range(backbone.n_blocks))) + runtime.head_bytes()
        scale = None if adapter.jump is None else adapter.jump.spread.float().contiguous()
        row = ROW[runtime.weight_format]
        parts = DrafterParts(
            exit.block, exit.tail, exits.config.middle, *weights, mean, spread, scale, shortlist, table,
            min(most, MOST_DRAFTS), alike, row, asking / step, floor,
        )  # fmt: skip
        return cls(exit.block, parts, runtime.drafter(parts), exits)
