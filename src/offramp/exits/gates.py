"""Gates: hidden states (B, T, D) → logits (B, T), whose sigmoid is the confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.exits.parts import ExitPart, MambaBlock, Memory, Standardise
from offramp.model.compiled.library import CompiledPart
from offramp.model.compiled.weights import Weight


class LinearGate(ExitPart):
    """CALM's one-layer gate (arXiv 2207.07061, section 3.4): norm, then one linear map to a logit."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = Standardise(hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        return self.out(self.norm(h)).squeeze(-1), None


class FFNGate(ExitPart):
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


class MambaGate(ExitPart):
    """A Mamba block whose output projection gives one logit (DYNAMAX), in a bottleneck of `width`.

    Unlike the paper's gate, it also has a direct linear path and dropout. The block alone overfits if it is trained on some
    ten thousand tokens: on new text, it ranks tokens worse than a linear gate.
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


def compiled(gate: ExitPart, dtype: torch.dtype) -> CompiledPart | None:
    """The gate as a part of the C library, with its matrices in `dtype`; None for an unknown kind of gate."""
    if isinstance(gate, MambaGate):
        return _compiled_mamba(gate, dtype)
    if not isinstance(gate, LinearGate | FFNGate):
        return None
    inward, out = gate.out.weight, None
    if isinstance(gate, FFNGate):
        inward, out = torch.cat([gate.gate.weight, gate.up.weight]), _floats(gate.out.weight[0])
    mean, spread = _floats(gate.norm.mean), _floats(gate.norm.spread)
    return CompiledPart("gate", in_=_matrix(inward, dtype), mean=mean, spread=spread, out=out, bias=float(gate.out.bias))


def _compiled_mamba(gate: MambaGate, dtype: torch.dtype) -> CompiledPart:
    block = gate.mixer
    return CompiledPart(
        "mamba_gate",
        down=_matrix(gate.down.weight, dtype),
        in_=_matrix(block.project_in.weight, dtype),
        out=_matrix(block.project_out.weight, dtype),
        mean=_floats(gate.norm.mean),
        spread=_floats(gate.norm.spread),
        direct=_floats(gate.direct.weight),
        gated_norm=_floats(block.norm.weight),
        conv=_floats(block.conv_weight.T),
        conv_bias=_floats(block.conv_bias),
        dt_bias=_floats(block.dt_bias),
        decay=_floats(-block.A_log.float().exp()),
        skip=_floats(block.D),
        heads=block.heads,
        states=block.states,
        gated_eps=block.norm.eps,
        bias=float(block.project_out.bias),
    )


def _matrix(weight: Tensor, dtype: torch.dtype) -> Weight:
    return Weight({"w": weight.detach().to(dtype)})


def _floats(vector: Tensor) -> Tensor:
    return vector.detach().float().contiguous()


GATES: dict[str, type[ExitPart]] = {"linear": LinearGate, "ffn": FFNGate, "mamba": MambaGate}
