"""Train exits to draft: each token of a text is drafted as the first, the second and the third draft of a run.

A draft reads the top state of the previous token. Full depth has run that token only for the first draft of a run. The
later drafts read the exit's own state in its place. An exit that learned only first drafts fails at later ones. So it
learns all of them (training-time test: EAGLE-3, arXiv 2503.01840, section 3; HASS, arXiv 2408.15766).

All tokens of a text are drafted at once. In the tail's blocks, a token sees the exact keys and values of the tokens before
its run, the exit's keys and values of the tokens in its run, and its own.

The loss asks for any token that full depth finds nearly as likely as its own. This makes more drafts right than distilling
the whole distribution does (docs/experiments/draft-exit.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp.errors import BadInput
from offramp.exits.exits import Exit
from offramp.exits.readouts import DeepAdapter, moved
from offramp.model.backbone import Backbone
from offramp.model.library_blocks import LibraryBlocks
from offramp.model.runtime import Runtime

LENGTH = 3  # drafts of a run
NEAR = 0.5  # a draft will do if full depth finds it so many times as likely as its own token
WEIGHTS = (1.0, 0.6, 0.36)  # each later draft's loss weighs less, since a draft counts only if those before it are right


def check_tails(backbone: Backbone, tails: tuple[int, ...]) -> None:
    """Raise `BadInput` if drafts cannot be trained through these tails."""
    longest = max(tails, default=0)
    if longest and set(backbone.kinds[-longest:]) != {"attention"}:
        raise BadInput(
            f"The last {longest} blocks of {backbone.name} are not all attention: drafts cannot be trained through them.",
            f"Give drafts no tail: --tails {','.join('0' * len(tails))}.",
        )


def runs(
    backbone: Backbone,
    runtime: Runtime,
    exit: Exit,
    middle: int,
    hidden: Mapping[int, Tensor],
    length: int = LENGTH,
) -> list[Tensor]:
    """The top states, (B, T, D) each, that the exit gives every token as draft number 1, 2, … `length` of a run.

    `hidden`: exact states (B, T, D) by the number of blocks before them: at the exit, before its tail, at the top, and at
    `middle` if that is not 0. `runtime` is that of `Backbone.trainable_from`, through which gradients pass.
    """
    assert isinstance(exit.adapter, DeepAdapter)
    read = exit.adapter.drafter(hidden[exit.block], hidden[middle] if middle else None)
    tail = _Tail(backbone, runtime, exit.tail, hidden) if exit.tail else None
    tops, before = [], hidden[backbone.n_blocks]
    for number in range(1, length + 1):
        adapted = read(moved(before, 1), number)
        tops.append(tail.run(adapted) if tail else adapted)
        before = tops[-1]
    return tops


class _Tail:
    """The model's last blocks over all tokens of texts as the first drafts of runs, then as the second ones, and so on."""

    def __init__(self, backbone: Backbone, runtime: Runtime, tail: int, hidden: Mapping[int, Tensor]) -> None:
        assert isinstance(runtime, LibraryBlocks)
        self._runtime, self._blocks = runtime, range(backbone.n_blocks - tail, backbone.n_blocks)
        self._state = _Appended()
        self._windows = {index: backbone.window(index) for index in self._blocks}
        h = hidden[self._blocks.start].to(runtime.dtype)
        with torch.no_grad():
            for index in self._blocks:
                runtime.remember_keys(h, index, self._state, runtime.step(h, 0))  # type: ignore[arg-type]
                if index < self._blocks[-1]:
                    h = runtime.run_all([(h, runtime.state(h.shape[1]), runtime.step(h, 0))], index, index + 1)[0]
        self._passes = 0

    def run(self, adapted: Tensor) -> Tensor:
        """The adapter's output of each token → the states at the top (B, T, D), as the next draft of its run."""
        self._passes += 1
        h, tokens = adapted.to(self._runtime.dtype), adapted.shape[1]
        step = self._runtime.step(h, 0)
        for index in self._blocks:
            step.masks = {(self._windows[index], self._passes * tokens): self._mask(tokens, self._windows[index])}
            h = self._runtime.run_all([(h, self._state, step)], index, index + 1)[0]  # type: ignore[list-item]
        return h.float()

    def _mask(self, tokens: int, window: int | None) -> Tensor:
        """Which keys each token sees, (1, 1, T, (n + 1) T) in the n-th pass: the exact ones, and those of each pass."""
        position = torch.arange(tokens)
        behind = position[:, None] - position
        near = behind < (window or tokens)
        sees = [(behind >= self._passes) & near]
        sees += [(behind == self._passes - number) & near for number in range(1, self._passes + 1)]
        return self._runtime.as_mask(torch.cat(sees, dim=1), self._runtime.dtype)


class _Appended:
    """Keys and values of attention blocks, in new tensors each time, so that gradients pass through all of them."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def length(self, block: int) -> int:
        """Tokens whose keys and values a block has in memory."""
        return self._kept[block][0].shape[2] if block in self._kept else 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append to a block and return all of its keys and values, as `State.update` does."""
        if layer_idx in self._kept:
            old_keys, old_values = self._kept[layer_idx]
            keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
        self._kept[layer_idx] = keys, values
        return keys, values
