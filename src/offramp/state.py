"""What each block remembers of the tokens it has seen, each block with a length of its own.

A block that was skipped by an early exit is behind the others until its fill catches up, so there is no single
"past length" here: every block's memory counts for itself. `State.update` has the signature under which the
library's blocks store their keys and values, so a `State` is passed to them in place of a `transformers.Cache`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class KV:
    """Keys and values of one attention block, written in place into buffers that double when full.

    The tensors have the library's layout (batch, KV heads, tokens, head dim); `keys` and `values` are views of the
    first `length` tokens.
    """

    def __init__(self, capacity: int = 256) -> None:
        self.length = 0
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        assert self._keys is not None, "nothing stored yet"
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        assert self._values is not None, "nothing stored yet"
        return self._values[:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        end = self.length + keys.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            capacity = max(self._capacity, end if self._keys is None else 2 * end)
            self._keys = self._grown(self._keys, keys, capacity)
            self._values = self._grown(self._values, values, capacity)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end

    def _grown(self, old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        batch, heads, _, dim = like.shape
        new = like.new_empty(batch, heads, capacity, dim)
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)

    def select(self, rows: Tensor) -> None:
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, rows)
            self._values = self._values.index_select(0, rows)


class State:
    """The memory of a backbone's blocks for one batch of sequences that share their positions."""

    def __init__(self, kinds: list[str], capacity: int = 256) -> None:
        unknown = set(kinds) - {"attention"}
        if unknown:
            raise NotImplementedError(f"no state for blocks of kind {sorted(unknown)}")
        self.blocks = [KV(capacity) for _ in kinds]

    def length(self, block: int) -> int:
        """Tokens that `block` has in memory."""
        return self.blocks[block].length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append to block `layer_idx` and return all its keys and values: what the library calls `Cache.update`."""
        block = self.blocks[layer_idx]
        block.append(keys, values)
        return block.keys, block.values

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on, in every block."""
        for block in self.blocks:
            block.crop(length)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order; a row named twice is copied."""
        for block in self.blocks:
            block.select(rows)
