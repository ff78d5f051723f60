"""Compiled drafts: an exit that drafts runs in the same call as full depth, which decides about them (`asking.run_ahead`).

That needs compiled blocks, one open exit with a deep read-out whose own probability decides, and greedy tokens. Elsewhere
`decode.batch` makes the drafts, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from offramp.errors import CorruptFile
from offramp.exits.exits import Exit, Exits
from offramp.exits.ngrams import LONGEST, SHORTEST
from offramp.exits.readouts import DeepAdapter
from offramp.machine import processor
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import MOST_DRAFTS, kernels
from offramp.model.compiled.library import Part as CompiledPart
from offramp.model.compiled.runtime import Compiled
from offramp.model.compiled.weights import Int4, Int8, Weight

# What 0, 1, … more rows of a chunk cost, in steps of full depth: for smollm2 on a maker's processors with these kernels, by
# benchmarks/growth.py --formats FORMAT ("verified rows"), beside a step of a compiled loop, which is shorter than a single
# one. On other processors, a guess.
ROWS = {
    ("AMD", "AVX-512 BF16 and VNNI"): {
        "float32": (0.0, 0.1, 0.21, 0.52, 0.84, 1.02, 1.2, 1.4),
        "bfloat16": (0.0, 0.03, 0.08, 0.18, 0.32, 0.4, 0.5, 0.58),
        "int8": (0.0, 0.05, 0.19, 0.4, 0.66, 0.86, 1.06, 1.26),
        "int4": (0.0, 0.02, 0.14, 0.37, 0.6, 0.8, 1.0, 1.2),
    },
    ("AMD", "AVX2"): {
        "float32": (0.0, 0.08, 0.15, 0.22, 0.34, 0.4, 0.47, 0.61),
        "bfloat16": (0.0, 0.11, 0.2, 0.38, 0.64, 0.83, 1.35, 1.65),
        "int8": (0.0, 0.47, 0.92, 1.4, 1.9, 2.5, 3.0, 3.25),
        "int4": (0.0, 0.57, 0.98, 1.59, 2.1, 2.67, 3.3, 3.6),
    },
    ("Intel", "AVX-512 and VNNI"): {
        "float32": (0.0, 0.02, 0.06, 0.22, 0.24, 0.26, 0.42, 0.43),
        "bfloat16": (0.0, 0.1, 0.2, 0.31, 0.42, 0.5, 0.6, 0.7),
        "int8": (0.0, 0.12, 0.27, 0.46, 0.68, 0.89, 1.05, 1.23),
        "int4": (0.0, 0.37, 0.8, 1.1, 1.4, 1.8, 2.1, 2.5),
    },
}
ELSEWHERE = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05)
PYTHON = 50e6  # bytes of weights that could be read in the time that a draft takes which Python makes


def row_costs(weight_format: str) -> tuple[float, ...]:
    """What 0 to 7 more rows of a chunk cost on this machine, in steps of full depth, by the table of machines."""
    for (maker, instructions), costs in ROWS.items():
        if maker in processor() and kernels() == instructions:
            return costs[weight_format.removesuffix("-head4")]
    return ELSEWHERE


@dataclass(frozen=True)
class Drafting:
    """A compiled drafter, `part`.

    `block`: the number of blocks before the exit. Costs are in steps of full depth: `rows` of 0, 1, … more rows of a chunk,
    `asking` of one draft, and `by_hand` of one that Python makes. `floor`: what a draft's chance to stand must exceed.
    """

    block: int
    rows: tuple[float, ...]
    asking: float
    by_hand: float
    floor: float
    part: CompiledPart
    exits: Exits

    @property
    def gain(self) -> float:
        """How many times as fast as full depth drafts should make decoding.

        It follows from their costs, and from how often they were right on held-out text when the exit was trained.
        """
        best = tokens = chance = 1.0
        for drafts, share in enumerate(self._right()[:MOST_DRAFTS], start=1):
            chance *= share
            tokens += chance
            best = max(best, tokens / (1 + self.rows[drafts] + drafts * self.asking))
        return best

    def pays_beside(self, answers: int) -> bool:
        """Whether a draft for each of so many answers side by side should make decoding faster, if Python makes it."""
        plain, drafted = self._chunk(answers), self._chunk(2 * answers) + self.by_hand
        return (1 + self._right()[0]) * plain > drafted

    def _chunk(self, rows: int) -> float:
        """What a chunk of so many rows costs, in steps of full depth. Beyond the table, each costs as its last row."""
        costs = self.rows
        beyond = max(0, rows - len(costs))
        return 1 + costs[min(rows, len(costs)) - 1] + beyond * (costs[-1] - costs[-2])

    def _right(self) -> list[float]:
        """How often a first, second, … draft was right on held-out text, by the record. Raises `CorruptFile`."""
        rows: list[dict[str, Any]] = self.exits.training.get("validation", [])
        try:
            held = next((row for row in rows if row["block"] == self.block), {})
            return [float(share) for share in held.get("acceptance") or [held.get("agreement", 0.0)] * 3]
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # a stranger's record may hold anything
            raise CorruptFile(f"The exits' record of their training is damaged: {error!r}.", "Train them again.") from error

    @classmethod
    def of(cls, backbone: Backbone, exit: Exit, exits: Exits, most: int, alike: int, floor: float) -> Drafting | None:
        """The drafter of one of the exits; None if it cannot be compiled.

        A round has at most `most` drafts. Where the last `alike` tokens stand earlier in the text, what followed them is a
        draft, too (0: never), and so is what the exits' n-grams expect. A draft's chance to stand must exceed `floor`.
        """
        runtime, adapter = backbone.runtime, exit.adapter
        mixers_in_tail = "mamba" in backbone.kinds[backbone.n_blocks - exit.tail :]
        if not isinstance(runtime, Compiled) or not isinstance(adapter, DeepAdapter) or mixers_in_tail:
            return None
        plain = runtime.weight_format == "float32" or backbone.hidden_size % 32 or adapter.down.in_features % 32
        kind = Weight if plain else Int4 if runtime.weight_format.startswith("int4") else Int8
        inward, constant, down = (part.float().contiguous() for part in adapter.maps())
        mean, spread = (part.float().contiguous() for part in (adapter.norm.mean, adapter.norm.spread))
        shortlist, ngrams = exits.shortlist, exits.ngrams
        rows = torch.arange(runtime.head.rows) if shortlist is None else shortlist
        table: dict[str, torch.Tensor | float] = {}
        if ngrams is not None:
            ngrams.check(runtime.head.rows)
            table = {"keys": ngrams.keys, "values": ngrams.values, "shortest": SHORTEST, "longest": LONGEST}
        weights = kind.of(inward, constant), kind.of(down), kind.of(runtime.head.pick(rows).dense())
        own = [*range(exit.block), *range(backbone.n_blocks - exit.tail, backbone.n_blocks)]
        asking = sum(weight.nbytes for weight in weights) + sum(map(runtime.block_bytes, own))
        step = sum(map(runtime.block_bytes, range(backbone.n_blocks))) + runtime.head_bytes()
        scale = None if adapter.jump is None else adapter.jump.spread.float().contiguous()
        costs = row_costs(runtime.weight_format)
        part = CompiledPart(
            "drafter", in_=weights[0], down=weights[1], head=weights[2], mean=mean, spread=spread, scale=scale,
            tokens=shortlist, costs=torch.tensor(costs), after=exit.block, tail=exit.tail, middle=exits.config.middle,
            most=min(most, MOST_DRAFTS), alike=alike, asking=asking / step, floor=floor, **table,
        )  # fmt: skip
        runtime.check(part)
        return cls(exit.block, costs, asking / step, (asking + PYTHON) / step, floor, part, exits)
