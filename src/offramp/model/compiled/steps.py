"""What compiled decoding is asked for, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import addressof, byref, c_float, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.model.compiled.library import CGates, CPass, CSteps, Model, Part, pointers


class Gates:
    """The gates of a model's open exits, in order, which compiled blocks ask (`exits.gates`)."""

    def __init__(self, blocks: Sequence[int], parts: Sequence[Part], width: int) -> None:
        """`blocks`: the number of blocks before each gate, which reads states of `width` dims."""
        self.blocks, self.parts, self.width = blocks, parts, width

    def ahead(self, thresholds: Sequence[float], tokens: int = 1) -> Asked:
        """The last of the gates, on the way of tokens; a threshold for each logit."""
        first = len(self.parts) - len(thresholds)
        return Asked(self.parts[first:], self.blocks[first:], thresholds, torch.empty(len(thresholds), self.width), tokens)


class Asked:
    """Gates on the way of tokens: hidden states `seen` (n, D) of the newest token, and n `logits` for each token."""

    def __init__(
        self, parts: Sequence[Part], blocks: Sequence[int], thresholds: Sequence[float], seen: Tensor, tokens: int
    ) -> None:
        self.count, self.seen, self.logits = len(parts), seen, (c_float * (len(parts) * tokens))()
        # The structure holds addresses only.
        self._alive = parts, pointers(parts), (c_int64 * len(parts))(*blocks), (c_float * len(parts))(*thresholds)
        addresses = map(addressof, self._alive[1:])
        self.compiled = CGates(self.count, *addresses, seen.data_ptr(), addressof(self.logits))


@dataclass(frozen=True)
class Ask:
    """Greedy decoding of one sequence, asked for.

    `ids`: the newest of the text's ids, the last of which is the token to begin with; decoding stops when `enough` tokens
    are chosen (`most` at most), or after one of the `ends` (n,). `sketch` and `drafter` are parts of those kinds, `asked`
    are gates that may stop a token, and `deep` (1, 1, D or 2D) is what a drafter reads of the token before. `penalty`: the
    repetition penalty, of all `ids`; 1 is none.
    """

    ids: Sequence[int]
    enough: int
    most: int
    ends: Tensor
    sketch: Part | None = None
    asked: Asked | None = None
    deep: Tensor | None = None
    drafter: Part | None = None
    penalty: float = 1.0


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


def take(model: Model, session: int, ask: Ask, width: int) -> Steps:
    """Take the steps that are asked for, in a session of a model whose hidden states have `width` dims."""
    known = len(ask.ids)
    ids = (c_int64 * (known + ask.most))(*ask.ids)
    passes, confidences = (CPass * ask.most)(), (c_float * ask.most)()
    reads = ask.drafter.fields["middle"] if ask.drafter else 0
    h, deep = torch.empty(1, 1, width), torch.zeros(1, 1, width * (2 if reads else 1))
    if ask.drafter and ask.deep is not None:
        deep.copy_(ask.deep)
    steps = CSteps(
        addressof(ids), known, ask.enough, ask.most, ask.ends.data_ptr(), len(ask.ends), ask.penalty,
        ask.sketch and ask.sketch.pointer, ask.drafter and ask.drafter.pointer,
        addressof(ask.asked.compiled) if ask.asked else None, 0, 0, 0,
        addressof(passes), addressof(confidences), h.data_ptr(), deep.data_ptr(),
    )  # fmt: skip
    model.call("offramp_decode", session, byref(steps))
    rounds, first = [], 0
    for made in passes[: steps.passes_count]:
        sure = [None if math.isnan(p) else p for p in confidences[first : first + made.stood]]
        rounds.append(Round(sure, made.drafts, made.asked))
        first += made.stood + 1
    return Steps(ids[known : known + steps.decided], rounds, steps.run, h, deep, tuple(steps.seconds))
