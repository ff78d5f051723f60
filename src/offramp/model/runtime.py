"""The protocol of a runtime: the code that runs a backbone's blocks. There are two runtimes.

`library_blocks.LibraryBlocks` calls the modules of the library (`transformers`). `compiled.runtime.Compiled` runs compiled
blocks, for the families that have them. `Backbone` holds one of them, and treats both alike.

Shapes: B batch, T tokens of this call, D hidden size, V vocabulary, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offramp.model.compiled.session import Session
from offramp.model.state import State


@dataclass
class Step:
    """What all blocks of one call share: the number of sequences, of tokens in each, and the position of the first one.

    Each runtime adds fields that it needs.
    """

    batch: int
    tokens: int
    first: int


AnyState = State | Session  # the memory of the library's blocks, or of compiled ones
BlockInput = tuple[Tensor, AnyState, Step]  # hidden states (B, T, D), what the blocks remember, what the blocks share


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The parts as one tensor; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class Runtime(Protocol):
    """Runs the blocks and the head of one model."""

    @property
    def engine(self) -> str:
        """The name of the code that runs: `library blocks` or `compiled blocks`."""
        ...

    @property
    def weight_format(self) -> str:
        """The format of the weights: a name in `formats.FORMATS`, or the name of the library model's dtype."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states."""
        ...

    @property
    def kept_dtype(self) -> torch.dtype:
        """The dtype in which keys and values are kept."""
        ...

    @property
    def bits(self) -> float:
        """The bits of a weight: the mean of all that a token is multiplied with."""
        ...

    def exact(self) -> AbstractContextManager[None]:
        """While the context is open, results are rounded as little as these weights allow, however long it takes.

        The library's model must have its weights in float32 meanwhile (`lending.lent`).
        """
        ...

    def state(self, capacity: int) -> AnyState:
        """An empty memory for all blocks. So many tokens are expected."""
        ...

    def embed(self, ids: Tensor, first: int) -> tuple[Tensor, Step]:
        """Token ids (B, T) at positions `first`, `first` + 1, … → hidden states (B, T, D) and what the blocks share."""
        ...

    def step(self, h: Tensor, first: int) -> Step:
        """What the blocks share for tokens h (B, T, D) at positions `first`, `first` + 1, …"""
        ...

    def run_all(self, parts: Sequence[BlockInput], start: int, stop: int) -> list[Tensor]:
        """Run each part's hidden states through blocks `start` to `stop` - 1, which remember its tokens."""
        ...

    def remember_all(self, parts: Sequence[BlockInput], start: int, stop: int) -> None:
        """Store only: each of blocks `start` to `stop` - 1 stores what it would if a part's h were its input."""
        ...

    def remember_keys(self, h: Tensor, index: int, state: AnyState, step: Step) -> None:
        """Do the attention part of `remember_all` for one h (B, T, D). Does nothing in a block without attention."""
        ...

    def remember_state(self, h: Tensor, index: int, state: AnyState) -> None:
        """Do the Mamba part of `remember_all` for one h (B, T, D). Does nothing in a block without a Mamba mixer."""
        ...

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Final norm, head, scale and soft cap: h (…, D) → (…, V) in float32, or (…, n) for the n tokens `rows`.

        Gradients pass through with `rows`.
        """
        ...

    def head_of(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that gives the `logits` of the n tokens `rows` only, (…, D) → (…, n). It is meant for many calls."""
        ...

    def sketched(self, reduce: Tensor, expand: Tensor, candidates: int) -> Callable[[Tensor], Tensor]:
        """A function like `logits`, for the tokens only that a sketch of the head finds likeliest.

        The sketch takes what the head takes times `reduce` (k, D), and multiplies it with the head times `expand` (D, k).
        The result gives the logits of each row's `candidates` likeliest tokens (more if estimates are equal), and −inf for
        all others.
        """
        ...

    def final(self, h: Tensor) -> Tensor:
        """The final norm of h (…, D), in float32."""
        ...

    def head_weight(self) -> Tensor:
        """The head's matrix, (V, D) in float32."""
        ...

    def block_bytes(self, index: int) -> int:
        """Bytes of the weights of block `index` that one token reads."""
        ...

    def head_bytes(self) -> int:
        """Bytes of the head's weights."""
        ...

    def drop_spare_weights(self) -> None:
        """Free the weights of the library's modules that this runtime has copies of."""
        ...
