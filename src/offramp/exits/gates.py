"""Gates: hidden states (B, T, D) → logits (B, T), whose sigmoid is the confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.exits.parts import MambaBlock, Memory, Part, Standardise
from offramp.model.compiled.library import Part as CompiledPart
from offramp.model.compiled.weights import Weight


class LinearGate(Part):
    """CALM's one-layer gate (arXiv 2207.07061, section 3.4): norm, then one linear map to a logit."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = Standardise(hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        return self.out(self.norm(h)).squeeze(-1), None


class FFNGate(Part):
    """A gated SiLU network like a transformer block's feed-forward part, with a bottleneck of `width` and one logit."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = Standardise(hidden)
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.out = nn.Linear(width, 1)

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        x = self.norm(h)
        return self.out(F.silu(self.gate(x)) * self.up(x)).squeeze(-1), None


class MambaGate(Part):
    """A Mamba block whose output projection gives one logit (DYNAMAX), in a bottleneck of `width`.

    Unlike the paper's gate, it also has a direct linear path and dropout. Trained on some ten thousand tokens, the block
    alone overfits: it ranks the tokens of new text worse than a linear gate does.
    """

    recurrent = True

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = Standardise(hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.mixer = MambaBlock(width, 2 * width, 1)
        self.direct = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.mixer.project_out.weight)

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        x = self.norm(h)
        logit, memory = self.mixer(F.dropout(self.down(x), 0.3, self.training), memory)
        return (logit + self.direct(x)).squeeze(-1), memory


def compiled(gate: Part, dtype: torch.dtype) -> CompiledPart | None:
    """What `Compiled.run_until` needs of a gate, with its matrices in `dtype`; None for one that cannot be asked there."""
    if not isinstance(gate, LinearGate | FFNGate):
        return None
    inward, out = gate.out.weight, None
    if isinstance(gate, FFNGate):
        inward, out = torch.cat([gate.gate.weight, gate.up.weight]), gate.out.weight[0].detach().float().contiguous()
    mean, spread = (vector.float().contiguous() for vector in (gate.norm.mean, gate.norm.spread))
    weight = Weight({"w": inward.detach().to(dtype)})
    return CompiledPart("gate", in_=weight, mean=mean, spread=spread, out=out, bias=float(gate.out.bias))


GATES: dict[str, type[Part]] = {"linear": LinearGate, "ffn": FFNGate, "mamba": MambaGate}
