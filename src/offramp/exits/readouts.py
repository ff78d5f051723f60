"""Read-outs: an adapter that prepares the hidden state at an exit for the part of the backbone that reads it next.

Without a tail, that part is the final norm and the head. With a tail of m blocks, it is the model's own last m blocks: the
exit jumps over the middle of the network, and the adapter maps the state after block k to one that block N - m + 1 expects.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.exits.parts import ExitPart, MambaBlock, Memory, Standardise, unit
from offramp.model.compiled.library import CompiledPart
from offramp.model.compiled.rounding import GROUP
from offramp.model.compiled.weights import Weight


class Jump(nn.Module):
    """The common part of all adapters before a tail: a full linear map, and the scale of the states that the tail expects.

    The adapter's output is h + spread ⊙ (W x + c), for the hidden state h, its standardised form x, and the correction c of
    the kind of read-out. `spread` (D,) is the standard deviation, over the training text, of the states before the tail.
    """

    spread: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.direct = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.direct.weight)
        nn.init.zeros_(self.direct.bias)
        self.register_buffer("spread", torch.ones(hidden))

    def fit(self, x: Tensor, h: Tensor, target: Tensor) -> Tensor:
        """Start from the linear map that brings h (n, D), standardised x (n, D), closest to `target` (n, D).

        If x has more columns than D, their map (D, K − D) is returned.
        """
        self.spread.copy_(target.std(0).clamp(min=1e-6))
        ones = torch.ones(len(x), 1, device=x.device)
        found = _nearest(torch.cat([x, ones], dim=1), ((target - h) / self.spread).clamp(-8, 8))
        with torch.no_grad():
            self.direct.weight.copy_(found[:, : h.shape[1]])
            self.direct.bias.copy_(found[:, -1])
        return found[:, h.shape[1] : -1]

    def forward(self, h: Tensor, x: Tensor, correction: Tensor) -> Tensor:
        jumped: Tensor = h + self.spread * (self.direct(x) + correction)
        return jumped


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    """The map (D, K), a little shrunk, that brings x (n, K) closest to y (n, D)."""
    x = x.double()
    gram = x.T @ x
    gram.diagonal().add_(1e-2 * len(x))
    found: Tensor = torch.linalg.solve(gram, x.T @ y.double())
    return found.float().T


class Readout(ExitPart):
    """Base of read-outs: hidden states (B, T, D) → (B, T, D), which the tail, or the final norm and the head, then read.

    `reads`: how many states of the previous token it also reads (deep memory), the top one first: (B, T, (1 + reads) D). A
    subclass gives the `correction` of a hidden state.
    """

    reads: int = 0

    def __init__(self, hidden: int, width: int, tail: int = 0) -> None:
        super().__init__()
        self.jump = Jump(hidden) if tail else None
        self.norm = Standardise(hidden)

    def correction(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Standardised hidden states x (B, T, D) → the correction, and the new memory."""
        raise NotImplementedError

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        x = self.norm(h)
        correction, memory = self.correction(x, memory)
        if self.jump is not None:
            return self.jump(h, x, correction), memory
        return unit(h) + correction, memory


class NoAdapter(Readout):
    """Leaves the hidden state as it is. Nothing is trained: the tail, or the backbone's own norm and head, read it."""

    def __init__(self, hidden: int, width: int, tail: int = 0) -> None:
        ExitPart.__init__(self)

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        return h, None


class LinearAdapter(Readout):
    """A linear map through a bottleneck of `width`."""

    def __init__(self, hidden: int, width: int, tail: int = 0) -> None:
        super().__init__(hidden, width, tail)
        self.down = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.up.weight)

    def correction(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return self.up(self.down(x)), None


class FFNAdapter(Readout):
    """A gated SiLU network of `width`, like a transformer block's feed-forward part."""

    def __init__(self, hidden: int, width: int, tail: int = 0) -> None:
        super().__init__(hidden, width, tail)
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.down.weight)

    def correction(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return self.down(F.silu(self.gate(x)) * self.up(x)), None


class MambaAdapter(Readout):
    """A Mamba block with an inner width of `width`. It also sees the tokens before."""

    recurrent = True

    def __init__(self, hidden: int, width: int, tail: int = 0) -> None:
        super().__init__(hidden, width, tail)
        self.mixer = MambaBlock(hidden, width, hidden)
        nn.init.zeros_(self.mixer.project_out.weight)

    def correction(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        out, memory = self.mixer(x, memory)
        return out, memory


class DeepAdapter(Readout):
    """A gated feed-forward network of `width` over the hidden state and deep ones of the token before (deep memory).

    The top state of the token before holds most of what a shallow block lacks; EAGLE (arXiv 2401.15077) drafts from it
    alone, and EAGLE-3 (arXiv 2503.01840) from states of several depths. Reads x (B, T, (1 + reads) D): the hidden state,
    the top one, and with `reads` = 2 a middle one. In a run of drafts, the deep states of the previous token are unknown.
    The read-out's output (or the tail's) replaces the top one. The middle one stays that of the last token that full depth
    has run.
    """

    def __init__(self, hidden: int, width: int, tail: int = 0, reads: int = 1) -> None:
        super().__init__(hidden, width, tail)
        self.reads, inputs = reads, (1 + reads) * hidden
        self.skip = nn.Linear(inputs, hidden, bias=False)
        self.gate = nn.Linear(inputs, width, bias=False)
        self.up = nn.Linear(inputs, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.down.weight)
        with torch.no_grad():  # before `fit`, the output is the hidden state alone
            self.skip.weight.zero_() if tail else self.skip.weight.copy_(torch.eye(hidden, inputs) / 2)

    def fit(self, h: Tensor, deep: Tensor, target: Tensor) -> None:
        """Start from the linear map of h (n, D) and the deep states (n, reads · D) that comes closest to `target` (n, D).

        The target is the state before the tail, or without a tail the one at the top.
        """
        x = self._inputs(self.norm(h), deep)
        with torch.no_grad():
            if self.jump is None:
                self.skip.weight.copy_(_nearest(x, unit(target)))
            else:
                self.skip.weight[:, h.shape[1] :] = self.jump.fit(x, h, target)

    def _inputs(self, known: Tensor, deep: Tensor) -> Tensor:
        """A standardised state (…, D) and deep ones (…, reads · D), scaled, side by side."""
        return torch.cat([known, *map(unit, deep.chunk(self.reads, dim=-1))], dim=-1)

    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """The read-out as a map, a constant that is added to its product, and `down` (D, W).

        The map (D + 2W, (1 + reads) D) is `skip`, `gate` and `up`, one above the other. The constant is (D + 2W,). A jump's
        direct map is part of `skip`.
        """
        skip, constant = self.skip.weight.detach().clone(), torch.zeros(len(self.skip.weight) + 2 * len(self.gate.weight))
        if self.jump is not None:
            skip[:, : len(skip)] += self.jump.direct.weight
            constant[: len(skip)] = self.jump.direct.bias
        return torch.cat([skip, self.gate.weight, self.up.weight]).detach(), constant, self.down.weight.detach()

    def forward(self, x: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        h, deep = x.split([x.shape[-1] // (1 + self.reads), x.shape[-1] // (1 + self.reads) * self.reads], dim=-1)
        known = self.norm(h)
        x = self._inputs(known, deep)
        return self._output(h, known, self.skip(x), self.gate(x), self.up(x)), None

    def _output(self, h: Tensor, known: Tensor, skip: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """The output for hidden states (…, D), given what the three maps made of the inputs."""
        correction: Tensor = skip + self.down(F.silu(gate) * up)
        return correction if self.jump is None else self.jump(h, known, correction)

    def drafter(self, h: Tensor, middle: Tensor | None = None) -> Callable[[Tensor, int], Tensor]:
        """A function that reads hidden states h (B, T, D) several times, as the first, second, … drafts of runs.

        It takes the top states (B, T, D) of the tokens before and the draft's number n, and returns what `forward` would;
        the `middle` states are read n tokens back. The maps read h and the middle states only once for all of its calls.
        For runs of three drafts, that halves the products with them in training.
        """
        known, maps = self.norm(h), (self.skip.weight, self.gate.weight, self.up.weight)
        columns = torch.cat(maps).split(h.shape[-1], dim=1)  # of the hidden state, the top one and the middle one
        always = F.linear(known, columns[0])
        back = None if middle is None else F.linear(unit(middle), columns[2])

        def read(before: Tensor, number: int) -> Tensor:
            products = always + F.linear(unit(before), columns[1])
            if back is not None:
                products = products + moved(back, number)
            return self._output(h, known, *products.split([len(weight) for weight in maps], dim=-1))

        return read


def moved(h: Tensor, places: int) -> Tensor:
    """The states (B, T, D), moved by so many places: each token gets that of an earlier one, or zeros at the beginning."""
    return F.pad(h, (0, 0, places, 0))[:, : h.shape[1]]


def compiled(readout: ExitPart, kind: type[Weight], dtype: torch.dtype = torch.float32) -> CompiledPart | None:
    """The read-out as a part of the C library; None for a recurrent one.

    Its maps are weights of this kind: in `dtype`, or as integers if their rows are a whole number of groups long.
    """
    if isinstance(readout, NoAdapter):
        return CompiledPart("readout")
    if not isinstance(readout, LinearAdapter | FFNAdapter | DeepAdapter):
        return None
    inward, constant, down = readout.maps() if isinstance(readout, DeepAdapter) else _maps(readout)

    def weight(values: Tensor, bias: Tensor | None = None) -> Weight:
        if kind is Weight or values.shape[1] % GROUP:
            return Weight.of(values.to(dtype), bias)
        return kind.of(values.float().contiguous(), bias)

    mean, spread, scale = (
        None if vector is None else vector.float().contiguous()
        for vector in (readout.norm.mean, readout.norm.spread, None if readout.jump is None else readout.jump.spread)
    )
    gated = not isinstance(readout, LinearAdapter)
    return CompiledPart(
        "readout", in_=weight(inward, constant), down=weight(down), mean=mean, spread=spread, scale=scale, gated=gated
    )


def _maps(readout: LinearAdapter | FFNAdapter) -> tuple[Tensor, Tensor, Tensor]:
    """As `DeepAdapter.maps`. Without a jump, there is no direct map."""
    if isinstance(readout, LinearAdapter):
        inward, down = [readout.down.weight], readout.up.weight
    else:
        inward, down = [readout.gate.weight, readout.up.weight], readout.down.weight
    constants = [part.new_zeros(len(part)) for part in inward]
    if readout.jump is not None:
        inward, constants = [readout.jump.direct.weight, *inward], [readout.jump.direct.bias, *constants]
    return torch.cat(inward).detach(), torch.cat(constants).detach(), down.detach()


READOUTS: dict[str, type[Readout]] = {
    "none": NoAdapter,
    "linear": LinearAdapter,
    "ffn": FFNAdapter,
    "mamba": MambaAdapter,
    "deep": DeepAdapter,
}
