"""The shape of exits, and their default places."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp.errors import OfframpError
from offramp.exits.gates import GATES
from offramp.exits.readouts import READOUTS

if TYPE_CHECKING:
    from offramp.model.backbone import Backbone


@dataclass(frozen=True)
class ExitsConfig:
    """The shape of a set of exits.

    `layers`: for each exit, the number of blocks that run before it (0 for a deep read-out, which then reads the
    embedding). `tails`: for each exit, how many of the model's last blocks run after its adapter (0: none); empty where no
    exit has a tail. Widths are bottlenecks, in dims. `shortlist`: read out only this many frequent tokens (0: all).
    `sketch`: dims of a sketch of the head (0: none). `candidates`: among so many tokens that the sketch finds likeliest,
    the head's is nearly always. `ngrams`: slots of a table of n-grams for drafts (0: none). `middle`: a deep read-out also
    reads the previous token's state after so many blocks (0: it does not).
    """

    layers: tuple[int, ...]
    gate: str = "mamba"
    readout: str = "ffn"
    gate_width: int = 64
    readout_width: int = 512
    shortlist: int = 0
    sketch: int = 0
    tails: tuple[int, ...] = ()
    ngrams: int = 0
    middle: int = 0
    candidates: int = 4096

    @property
    def places(self) -> list[tuple[int, int]]:
        """For each exit, the blocks before it and its tail."""
        return list(zip(self.layers, self.tails or [0] * len(self.layers), strict=True))

    def check(self, backbone: Backbone) -> None:
        """Check the config against a backbone. Raises `OfframpError` for exits that cannot be made for it."""
        layers, last, least = list(self.layers), backbone.n_blocks - 1, 0 if self.readout == "deep" else 1
        if not layers and self.sketch:  # no exit was worth its bytes, but the sketch of the head is
            layers = [least]
        if not layers or layers != sorted(set(layers)) or not least <= layers[0] <= layers[-1] <= last:
            raise OfframpError(
                f"Exits after blocks {', '.join(map(str, layers)) or '(none)'} do not fit a model of {backbone.n_blocks}.",
                f"Give rising numbers from {least} to {last}, such as 10,15,20.",
            )
        if len(self.tails) not in (0, len(layers)) or not all(
            0 <= tail < backbone.n_blocks - layer for layer, tail in zip(layers, self.tails, strict=False)
        ):
            raise OfframpError(
                f"Tails of {', '.join(map(str, self.tails))} blocks do not fit exits after blocks "
                f"{', '.join(map(str, layers))} of {backbone.n_blocks}.",
                "Give each exit a tail of fewer blocks than it skips, such as 3,3,3; 0 for none.",
            )
        for kind, known, part in ((self.gate, GATES, "gate"), (self.readout, READOUTS, "read-out")):
            if kind not in known:
                raise OfframpError(f"There is no {part} '{kind}'.", f"Choose from {', '.join(known)}.")
        if self.middle and not (self.readout == "deep" and layers[-1] <= self.middle <= last):
            raise OfframpError(
                f"A {self.readout} read-out cannot read the state after block {self.middle} of {backbone.n_blocks}.",
                f"Only a deep read-out reads a middle state, after a block from {layers[-1]} to {last}.",
            )
        if self.sketch % 32 or not 0 <= self.sketch <= backbone.hidden_size:
            raise OfframpError(
                f"A sketch of {self.sketch} dims cannot be made.",
                f"Give a multiple of 32, at most {backbone.hidden_size}; 0 for none.",
            )
        if self.sketch and self.candidates < 1:
            raise OfframpError(f"A sketch cannot name {self.candidates} candidates.", "4096 are usual.")
        # Mamba parts have heads of 32 dims.
        for width, unit, part in ((self.gate_width, 16, "gate"), (self.readout_width, 32, "read-out")):
            if width < unit or width % unit:
                raise OfframpError(f"A {part} {width} dims wide cannot be made.", f"Give a multiple of {unit}.")


def suggested_places(n_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The default places: exits after a third, a half and two thirds of the blocks, with tails of a tenth of the blocks.

    In models of 20 blocks or more, the tail of the first exit, which knows least, is one block longer.
    """
    layers = sorted({min(n_blocks - 1, max(1, math.floor(n_blocks * part + 0.5))) for part in (1 / 3, 1 / 2, 2 / 3)})
    tail = max(1, round(n_blocks / 10))
    tails = [tail + (index == 0 and n_blocks >= 20) for index in range(len(layers))]
    return tuple(layers), tuple(min(tail, n_blocks - layer - 1) for layer, tail in zip(layers, tails, strict=True))
