"""The memory of the library's blocks: what each keeps of the tokens so far (`compiled.session` is for compiled blocks).

Each block's memory has its own length: a block that an early exit skipped is behind the others until its fill catches up.
`State.update` has the signature by which the library's blocks store their keys and values, so a `State` is passed to
them in place of a `transformers.Cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class KV:
    """Keys and values of one attention block, written in place into one buffer, which at least doubles when full.

    A token's keys and values stand together, at the place of its position: (batch, capacity, keys then values, head
    dim). `keys` and `values` are views of the first `length` tokens in the library's layout (batch, KV heads, tokens,
    head dim). Lowering `length` forgets tokens.
    """

    def __init__(self, capacity: int = 256) -> None:
        self.length = 0
        self._capacity = capacity
        self._buffer: Tensor | None = None

    def __deepcopy__(self, _: Any) -> KV:
        """A copy of this memory, which goes on independently. It has no more room than its tokens need."""
        twin = KV(self._capacity)
        twin.length = self.length
        if self._buffer is not None:
            twin._buffer = self._buffer[:, : self.length].clone()
        return twin

    @property
    def nbytes(self) -> int:
        """The bytes that the tokens take, and that a copy takes; the buffer may have more room."""
        return 0 if self._buffer is None else self._buffer[:, : self.length].nbytes

    def bytes_for(self, tokens: int) -> int:
        """The bytes of a buffer that has room for so many tokens like those in memory."""
        return 0 if self._buffer is None else self._buffer[:, :1].nbytes * tokens

    @property
    def keys(self) -> Tensor:
        """A view (B, KV heads, tokens, head dim)."""
        return self._view(0)

    @property
    def values(self) -> Tensor:
        """A view (B, KV heads, tokens, head dim)."""
        return self._view(1)

    def _view(self, half: int) -> Tensor:
        assert self._buffer is not None, "nothing stored yet"
        return self._buffer[:, : self.length].chunk(2, dim=2)[half].transpose(1, 2)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of T more tokens: (B, KV heads, T, head dim) each.

        Raises `ValueError` for tokens of another batch size, shape or dtype than those in memory.
        """
        new = torch.cat([keys, values], dim=1).transpose(1, 2)
        old, end = self._buffer, self.length + new.shape[1]
        if old is not None and (old.dtype != new.dtype or len(old) != len(new) or old.shape[2:] != new.shape[2:]):
            raise ValueError(
                f"the memory holds {old.dtype} {tuple(old.shape)}, the tokens are {new.dtype} {tuple(new.shape)}"
            )
        if old is None or end > old.shape[1]:
            capacity = self._capacity if end <= self._capacity else end if old is None else 2 * end
            self._buffer = new.new_empty(len(new), capacity, *new.shape[2:])
            if old is not None:
                self._buffer[:, : self.length] = old[:, : self.length]
        assert self._buffer is not None
        self._buffer[:, self.length : end] = new
        self.length = end

    def reserve(self, capacity: int) -> None:
        """Give the buffer room for this many tokens when it next grows."""
        self._capacity = max(self._capacity, capacity)

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on."""
        self.length = min(self.length, length)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(0, rows)


Replay = Callable[[Tensor, int], Tensor]


class SSM:
    """What a Mamba block remembers: the convolution's last inputs and the scan's state; None before the first token.

    `window` is (B, W - 1, E + 2 G N) for Mamba-2, (B, W - 1, E) for Mamba-1; `h` is (B, H, P, N) or (B, E, N). Neither
    grows with the text. Tokens can be forgotten only during a watch, in which a journal records what each token did. `crop`
    goes back to where the watch began and repeats the tokens that stay, without the block's weights.
    """

    def __init__(self) -> None:
        self.window: Tensor | None = None
        self.h: Tensor | None = None
        self.length = 0
        self._start: tuple[int, Tensor | None, Tensor | None] | None = None
        self._journal: list[tuple[Tensor, Replay]] = []

    def __deepcopy__(self, _: Any) -> SSM:
        """A copy of this memory, which goes on independently. A journal's entries are only read, so both share them."""
        twin = SSM()
        twin.window, twin.h = (None if part is None else part.clone() for part in (self.window, self.h))
        twin.length, twin._start, twin._journal = self.length, self._start, [*self._journal]
        return twin

    @property
    def nbytes(self) -> int:
        """The bytes of the window and the state."""
        return sum(part.nbytes for part in (self.window, self.h) if part is not None)

    @property
    def watched(self) -> bool:
        """Whether tokens taken in now can be forgotten."""
        return self._start is not None

    def watch(self) -> None:
        """Begin a watch: tokens taken in from now on can be forgotten. Does nothing during a watch."""
        if self._start is None:
            window, h = self.window, self.h
            self._start = self.length, None if window is None else window.clone(), None if h is None else h.clone()

    def settle(self) -> None:
        """End the watch: keep all tokens for good."""
        self._start = None
        self._journal.clear()

    def record(self, tokens: int, inputs: Tensor | None = None, replay: Replay | None = None) -> None:
        """Count T more `tokens` that the block has taken in, and during a watch keep how to repeat them.

        `inputs` (1, T, C) are the convolution's. replay(h, n) gives the state after the first n of the tokens, from state
        h, which it may write into. Raises `ValueError` if a batch is to be repeated, since its sequences may
        have to forget different tokens.
        """
        self.length += tokens
        if self._start is not None and inputs is not None and replay is not None:
            if len(inputs) > 1:
                raise ValueError("a batch of sequences cannot be watched")
            self._journal.append((inputs, replay))

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on. Raises `ValueError` for tokens that came before the watch."""
        if length >= self.length:
            return
        if self._start is None or length < self._start[0]:
            raise ValueError("a Mamba state cannot forget tokens that it took in without a watch")
        assert self.window is not None
        assert self.h is not None
        first, window, h = self._start
        # Copies, since the next tokens may be written into them.
        window = torch.zeros_like(self.window) if window is None else window.clone()
        h = torch.zeros_like(self.h) if h is None else h.clone()
        kept, remaining = [], length - first
        for inputs, replay in self._journal:
            tokens = min(remaining, inputs.shape[1])
            if tokens:
                h = replay(h, tokens)
                window = torch.cat([window, inputs[:, :tokens].to(window.dtype)], dim=1)[:, tokens:]
                kept.append((inputs[:, :tokens], replay))
            remaining -= tokens
        self.window, self.h, self.length, self._journal = window.contiguous(), h, length, kept

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        if self.window is not None and self.h is not None:
            self.window, self.h = self.window.index_select(0, rows), self.h.index_select(0, rows)


KINDS = ("attention", "mamba", "both", "neither")  # the kinds of memory; a hybrid model has blocks of several kinds


class State:
    """The memory of a backbone's blocks for one batch of sequences that share their positions.

    `kv[i]` holds the keys and values of block i, and `ssm[i]` its Mamba state; None where the block has no such part.
    """

    def __init__(self, kinds: list[str], capacity: int = 256) -> None:
        if unknown := set(kinds) - set(KINDS):
            raise NotImplementedError(f"no state for blocks of kind {sorted(unknown)}")
        self.kv = [KV(capacity) if kind in ("attention", "both") else None for kind in kinds]
        self.ssm = [SSM() if kind in ("mamba", "both") else None for kind in kinds]

    def length(self, block: int) -> int:
        """Tokens that `block` has in memory; 0 for a block that remembers nothing."""
        memory = self.kv[block] or self.ssm[block]
        return 0 if memory is None else memory.length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append to block `layer_idx` and return all its keys and values. The library calls this as `Cache.update`."""
        block = self.kv[layer_idx]
        assert block is not None
        block.append(keys, values)
        # The fill `copy` may have begun the memory with keys of a block that runs on another device.
        return block.keys.to(keys.device), block.values.to(keys.device)

    @property
    def bytes(self) -> int:
        """The bytes of all memories, without room to grow."""
        return sum(memory.nbytes for memory in (*self.kv, *self.ssm) if memory is not None)

    def bytes_for(self, tokens: int) -> int:
        """The bytes of memories like these with room for so many tokens. Mamba states count twice: a watch keeps a copy."""
        kv = sum(kv.bytes_for(tokens) for kv in self.kv if kv is not None)
        return kv + sum(2 * ssm.nbytes for ssm in self.ssm if ssm is not None)

    def reserve(self, capacity: int) -> None:
        """Expect this many tokens: a memory that grows gets room for all of them at once."""
        for kv in self.kv:
            if kv is not None:
                kv.reserve(capacity)

    def watch(self, start: int, stop: int) -> None:
        """From now on, blocks `start` to `stop` - 1 can forget the tokens they take in, until `settle`."""
        for ssm in self.ssm[start:stop]:
            if ssm is not None:
                ssm.watch()

    def settle(self) -> None:
        """Keep all tokens for good, and drop the journals."""
        for ssm in self.ssm:
            if ssm is not None:
                ssm.settle()

    def crop(self, length: int, start: int = 0, stop: int | None = None) -> None:
        """Forget every token from position `length` on, in blocks `start` to `stop` - 1 (by default, in all).

        Raises `ValueError` where a Mamba state took in one of them without a watch.
        """
        for block in (*self.kv[start:stop], *self.ssm[start:stop]):
            if block is not None:
                block.crop(length)

    def can_forget(self, length: int) -> bool:
        """Whether `crop` can forget tokens, those from position `length` on, without a watch."""
        return length >= 0 and not any(self.ssm)

    def copy_keys(self, source: int, goal: int, tokens: int) -> None:
        """Append to block `goal` the keys and values of the newest `tokens` of block `source`."""
        kept = self.kv[source]
        assert kept is not None
        self.update(kept.keys[:, :, -tokens:], kept.values[:, :, -tokens:], goal)

    def take_back(self, start: int) -> None:
        """Forget the newest token, in blocks `start` and after. Raises as `crop` does."""
        for block in (*self.kv[start:], *self.ssm[start:]):
            if block is not None:
                block.crop(block.length - 1)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order; a row that is named twice is copied."""
        for block in (*self.kv, *self.ssm):
            if block is not None:
                block.select(rows)
