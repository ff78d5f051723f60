"""Read-outs: an adapter that corrects the hidden state before the backbone's own final norm and head."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.exits.parts import MambaBlock, Memory, Part, Standardise, unit


class Readout(Part):
    """Base of read-outs: hidden states (B, T, D) → (B, T, D), which the final norm and the head then read.

    `reads_top`: it reads (B, T, 2 D), the hidden state beside the top hidden state of the token before (deep memory).
    """

    reads_top: ClassVar[bool] = False


class NoAdapter(Readout):
    """Leaves the hidden state as it is. Nothing is trained: the backbone's own norm and head read out."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        return h, None


class LinearAdapter(Readout):
    """A residual linear map through a bottleneck of `width`."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = Standardise(hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        return unit(h) + self.up(self.down(self.norm(h))), None


class MambaAdapter(Readout):
    """A residual Mamba block with an inner width of `width`. It also sees the tokens before."""

    recurrent = True

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = Standardise(hidden)
        self.mixer = MambaBlock(hidden, width, hidden)
        nn.init.zeros_(self.mixer.project_out.weight)

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        correction, memory = self.mixer(self.norm(h), memory)
        return unit(h) + correction, memory


class DeepAdapter(Readout):
    """A gated feed-forward network of `width` over the hidden state and the top one of the token before (deep memory).

    The top state of the token before holds most of what a shallow block lacks; EAGLE (arXiv 2401.15077) drafts from it
    alone. Reads x (B, T, 2 D), both side by side. In a run of drafts a token's own top state is unknown: the read-out's
    output stands in for it when the next token is drafted.
    """

    reads_top = True

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = Standardise(hidden)
        self.skip = nn.Linear(2 * hidden, hidden, bias=False)
        self.gate = nn.Linear(2 * hidden, width, bias=False)
        self.up = nn.Linear(2 * hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.down.weight)
        with torch.no_grad():  # untrained, it passes on the hidden state alone
            self.skip.weight.copy_(torch.eye(hidden, 2 * hidden) / 2)

    def forward(self, x: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        h, top = x.chunk(2, dim=-1)
        x = torch.cat([self.norm(h), unit(top)], dim=-1)
        return self.skip(x) + self.down(F.silu(self.gate(x)) * self.up(x)), None


READOUTS: dict[str, type[Readout]] = {
    "none": NoAdapter,
    "linear": LinearAdapter,
    "mamba": MambaAdapter,
    "deep": DeepAdapter,
}
