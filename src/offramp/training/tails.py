"""The model's last blocks over texts in which some tokens jumped: they left at an exit, and came in again before its tail.

Every position of a text has its exact hidden state, from the teacher. At the positions of a `Jumped`, the adapter's output
replaces it. So the tail's blocks see the same mix as in decoding: exact tokens and jumped ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.exits.exits import Exit, Exits
from offramp.model.backbone import Backbone
from offramp.model.runtime import Runtime

LEAST_SHARE = 0.4  # of a text's tokens, for jumps in training; the share is drawn from here to 1 for each text


@dataclass(frozen=True)
class Jumped:
    """Tokens that jumped at one exit: their places `where` (B, T), and their adapted states `h` (n, D), in that order."""

    exit: Exit
    where: Tensor
    h: Tensor


def first_tail(exits: Exits, n_blocks: int) -> int:
    """The number of blocks before the longest tail; N if no exit has a tail."""
    return n_blocks - max(exit.tail for exit in exits)


def through_tails(backbone: Backbone, runtime: Runtime, exact: Tensor, jumps: list[Jumped]) -> Tensor:
    """Hidden states (B, T, D) before the longest of the jumps' tails → those at the top, (B, T, D).

    `runtime`: the backbone's own, or that of `Backbone.trainable_from`, through which gradients pass.
    """
    starts = [backbone.n_blocks - jump.exit.tail for jump in jumps]
    state, step = runtime.state(exact.shape[1]), runtime.step(exact, 0)
    h, at = exact, min(starts)
    for start, jump in sorted(zip(starts, jumps, strict=True), key=lambda pair: pair[0]):
        if start > at:
            h = runtime.run_all([(h, state, step)], at, start)[0]
            at = start
        h = h.masked_scatter(jump.where[..., None], jump.h.to(h.dtype))
    return runtime.run_all([(h, state, step)], at, backbone.n_blocks)[0]


def drawn_exits(counted: Tensor, exits: int, share: Tensor | float, generator: torch.Generator) -> Tensor:
    """For each position (B, T), the index of the exit that its token leaves at; −1 where it does not leave.

    `share`, (B, 1) or the same for all, of the `counted` positions leaves; all exits are equally likely.
    """
    drawn = torch.rand(counted.shape, generator=generator) / share
    return torch.where(counted & (drawn < 1), (drawn * exits).long(), -1)
