"""Compiled gates: a token that climbs alone runs blocks and the open exits' gates in one call.

They are used where the gate's confidence decides and every open gate can be compiled. Elsewhere gates are asked as modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.exits.exits import Exit
from offramp.exits.gates import compiled
from offramp.model.backbone import Backbone
from offramp.model.compiled.runtime import Compiled
from offramp.model.compiled.steps import Asked, Gates
from offramp.model.runtime import Part


class Gating:
    """Runs blocks and asks gates in one call. Confidences are numbers in [0, 1]."""

    def __init__(self, runtime: Compiled, gates: Gates) -> None:
        self._runtime, self._gates = runtime, gates

    @classmethod
    def of(cls, backbone: Backbone, exits: Sequence[Exit]) -> Gating | None:
        """The gates of these exits; None if there are none, or if one of them cannot be compiled."""
        runtime = backbone.runtime
        if not isinstance(runtime, Compiled):
            return None
        dtype = torch.float32 if runtime.weight_format == "float32" else torch.bfloat16
        parts = [made for exit in exits if (made := compiled(exit.gate, dtype))]
        if not parts or len(parts) < len(exits):
            return None
        return cls(runtime, Gates([exit.block for exit in exits], parts, backbone.hidden_size))

    def run(self, part: Part, start: int, lowest: Sequence[float]) -> tuple[Tensor, int, list[tuple[Tensor, float]]]:
        """Run one token from block `start` on, up to the first gate whose confidence is above `lowest`, or to the top.

        `lowest`: a number for each of the last gates, all of which stand after block `start`; 0 stops every token. Returns
        the token's hidden state (1, 1, D), the number of blocks before it, and for each gate on the way the hidden state
        and the confidence.
        """
        asked = self.asked(lowest)
        h, reached = self._runtime.run_until(part, start, asked)
        return h, reached, self.said(asked, reached)

    def asked(self, lowest: Sequence[float], tokens: int = 1) -> Asked:
        """Gates to ask about so many tokens, as for `run`."""
        return self._gates.ahead([_logit(confidence) for confidence in lowest], tokens)

    def said(self, asked: Asked, reached: int, token: int = 0) -> list[tuple[Tensor, float]]:
        """What `run` returns for each gate before block `reached` + 1, about the newest token, which has this number."""
        count = asked.count
        logits = asked.logits[token * count : (token + 1) * count]
        blocks = self._gates.blocks[len(self._gates.parts) - count :]
        return [
            (seen[None, None], _sigmoid(logit))
            for block, seen, logit in zip(blocks, asked.seen, logits, strict=True)
            if block <= reached
        ]

    def ask(self, number: int, h: Tensor) -> float:
        """The confidence of one of the gates about a hidden state (1, 1, D)."""
        return _sigmoid(self._runtime.ask(self._gates.parts[number], h))


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit > 0 else math.exp(logit) / (1 + math.exp(logit))


def _logit(confidence: float) -> float:
    if not 0 < confidence < 1:
        return -math.inf if confidence <= 0 else math.inf
    return math.log(confidence / (1 - confidence))
