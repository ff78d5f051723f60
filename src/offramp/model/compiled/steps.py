"""What compiled decoding is asked for, and what it gives back: gates between blocks, drafts, and steps of greedy decoding.

The C code is in gates.h, drafts.h and steps.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp.model.compiled.structures import (
    MOST_DRAFTS,
    CDrafter,
    CEstimates,
    CGate,
    CGates,
    CHead,
    CNgrams,
    CRound,
    CSketch,
    CSteps,
    CWeight,
    address,
)
from offramp.model.compiled.weights import Weight

FROM_EXIT = 1  # of drafts.h


@dataclass(frozen=True)
class GateParts:
    """What a gate is made of: `inward` (2W, D) and `out` (W,), or `inward` (1, D) alone; mean and spread (D,); a bias."""

    inward: Weight
    mean: Tensor
    spread: Tensor
    out: Tensor | None
    bias: float

    def compiled(self) -> CGate:
        """The gate as the C code takes it. It holds addresses only, so these parts must stay alive."""
        addresses = (address(tensor) for tensor in (self.mean, self.spread, self.out))
        return CGate(0, CWeight.of(self.inward), *addresses, self.bias, 0.0)


class Gates:
    """The gates of a model's open exits, in order, which compiled code asks between blocks (`exits.gates`)."""

    def __init__(self, blocks: Sequence[int], gates: Sequence[GateParts]) -> None:
        """`blocks`: the number of blocks before each gate."""
        self.blocks, self._parts = blocks, gates  # the latter keeps tensors alive
        self.compiled = (CGate * len(gates))(*(parts.compiled() for parts in gates))
        self.width = max(parts.inward.rows for parts in gates)

    def __len__(self) -> int:
        return len(self.compiled)

    def ahead(self, start: int, thresholds: Sequence[float], tokens: int = 1) -> Asked:
        """The last of the gates, on the way of tokens that set out before block `start`; a threshold for each logit."""
        first = len(self) - len(thresholds)
        gates = (CGate * len(thresholds))(*self.compiled[first:])
        for gate, blocks, threshold in zip(gates, self.blocks[first:], thresholds, strict=True):
            gate.after, gate.threshold = blocks - start, threshold
        return Asked(gates, torch.empty(len(gates), self._parts[0].mean.numel(), dtype=torch.float32), tokens)


class Asked:
    """Gates on the way of tokens: hidden states `seen` (n, D) of the newest token, and n `logits` for each token."""

    def __init__(self, gates: Any, seen: Tensor, tokens: int) -> None:
        self.gates, self.seen, self.logits = gates, seen, (c_float * (len(gates) * tokens))()

    def compiled(self) -> CGates:
        """The gates as the C code takes them."""
        return CGates(self.gates, len(self.gates), self.seen.data_ptr(), ctypes.addressof(self.logits))


@dataclass(frozen=True)
class DrafterParts:
    """What an exit that drafts is made of (`exits.readouts.DeepAdapter`).

    It stands after block `after`, and `tail` of the model's last blocks run after it. It reads the state of the token
    before at the top, and after block `middle` if that is not 0. `inward` (D + 2W, 2D or 3D) is the map that is added to
    the output, above the gate and the up projection; `down` (D, W). `mean` and `spread` (D,) are those of the hidden states
    that it reads; `scale` (D,): the output is h + scale ⊙ y, or y if it is None. `tokens` (n,): the ids that it drafts, or
    None for all; `list` (n, D) are their rows of the head.

    A round has at most `most` drafts. Where the last `alike` tokens stand earlier in the text, what followed them is a
    draft, too (0: never), and so is what `ngrams` (or None) expect. Costs are in steps of full depth: `rows` of 0, 1, …
    more rows of a chunk, `asking` of one draft. `floor`: what a draft's chance to stand must exceed.
    """

    after: int
    tail: int
    middle: int
    inward: Weight
    down: Weight
    list: Weight
    mean: Tensor
    spread: Tensor
    scale: Tensor | None
    tokens: Tensor | None
    ngrams: CNgrams | None
    most: int
    alike: int
    rows: tuple[float, ...]
    asking: float
    floor: float

    def compiled(self, norm: Tensor, eps: float) -> CDrafter:
        """The drafter as the C code takes it, with the final norm's weight. These parts must stay alive."""
        return CDrafter(
            self.after, self.tail, self.middle, CWeight.of(self.inward), CWeight.of(self.down),
            *map(address, (self.mean, self.spread, self.scale)),
            CHead(CWeight.of(self.list), address(norm), eps), address(self.tokens),
            ctypes.pointer(self.ngrams) if self.ngrams else None, self.most, self.alike, self.rows, self.asking, self.floor,
        )  # fmt: skip


def new_estimates() -> CEstimates:
    """Estimates for a sequence that nothing has been drafted for, as if half of a few drafts had been right."""
    return CEstimates((0.0, 0.5, 0.5, 0.5), (1.0, 4.0, 4.0, 4.0), 0.5, 1.0, 1.0, 0, 16)


@dataclass(frozen=True)
class Ask:
    """Greedy decoding of one sequence, asked for.

    `ids`: the newest of the text's ids, the last of which is the token to begin with; decoding stops when `enough` tokens
    are chosen (`most` at most), or after one of the `ends` (n,). `asked`: gates that may stop a token. The embedding
    (V, D), the head, and perhaps its sketch, or a drafter with what is known of its drafts; then `deep` (1, 1, D or 2D) is
    what it reads of the token before. `penalty`: the repetition penalty, of all `ids`; 1 is none.
    """

    ids: Sequence[int]
    enough: int
    most: int
    ends: Tensor
    embedding: Tensor
    head: CHead
    sketch: CSketch | None = None
    asked: Asked | None = None
    deep: Tensor | None = None
    drafter: CDrafter | None = None
    estimates: CEstimates = field(default_factory=new_estimates)
    penalty: float = 1.0

    @property
    def rows(self) -> int:
        """The most rows that are run at once."""
        return MOST_DRAFTS + 1 if self.drafter else 1


@dataclass(frozen=True)
class Round:
    """One pass to the top: `sure` are the confidences of drafts that stand (None for one that was looked up).

    `drafts` were made, of which `asked` by the exit, and `rows` were run to the top.
    """

    sure: list[float | None]
    drafts: int
    asked: int

    @property
    def rows(self) -> int:
        """The rows that were run to the top."""
        return self.drafts + 1


@dataclass(frozen=True)
class Steps:
    """What greedy decoding found: the chosen `ids`; -1 stands where logits were not finite.

    `rounds`: the passes to the top that chose them, in order; in each, drafts that stand come before the token that full
    depth chose. `run`: the number of blocks run of a last token that a gate stopped, 0 if there is none. `h` (1, 1, D) is
    the newest token's hidden state, `deep` what drafts read of the newest that reached the top. `seconds`: spent on
    embeddings, blocks, heads, choices, and drafts.
    """

    ids: list[int]
    rounds: list[Round]
    run: int
    h: Tensor
    deep: Tensor
    seconds: tuple[float, ...]


class Stepping:
    """An `Ask` in the form that the C code takes, and what it has written."""

    def __init__(self, ask: Ask) -> None:
        width = ask.embedding.shape[1]
        self._before = len(ask.ids) - 1
        self._ids = (c_int64 * (len(ask.ids) + ask.most))(*ask.ids)
        self._h = torch.empty(1, ask.rows, width, dtype=torch.float32)
        self._middles = torch.empty_like(self._h) if ask.drafter else None
        self._deep = torch.empty(1, 1, width, dtype=torch.float32)
        if ask.drafter:
            self._deep = self._deep.new_zeros(1, 1, width * (2 if ask.drafter.middle else 1))
        if ask.drafter and ask.deep is not None:
            self._deep.copy_(ask.deep)
        self._rounds = (CRound * ask.most)()
        self.compiled = CSteps(
            ask.embedding.data_ptr(), ask.embedding.dtype == torch.float32, ctypes.pointer(ask.head),
            ctypes.pointer(ask.sketch) if ask.sketch else None, ctypes.pointer(ask.drafter) if ask.drafter else None,
            ctypes.pointer(ask.estimates), ask.penalty, ask.ends.data_ptr(), len(ask.ends), ask.enough, ask.most,
            self._before, ctypes.addressof(self._ids) + self._before * ctypes.sizeof(c_int64),
            self._h.data_ptr(), address(self._middles), self._deep.data_ptr(), 0, 0, self._rounds,
        )  # fmt: skip
        self.gates = ask.asked.compiled() if ask.asked else None

    def found(self) -> Steps:
        """What the C code has found."""
        steps, first = self.compiled, self._before + 1
        rounds = []
        for made in self._rounds[: steps.rounds_count]:
            sources, sure = made.source[: made.stood], made.sure[: made.stood]
            confidences = [p if source == FROM_EXIT else None for source, p in zip(sources, sure, strict=True)]
            rounds.append(Round(confidences, made.drafts, list(made.source).count(FROM_EXIT)))
        ids = self._ids[first : first + steps.decided]
        return Steps(ids, rounds, steps.run, self._h, self._deep, tuple(steps.seconds))
